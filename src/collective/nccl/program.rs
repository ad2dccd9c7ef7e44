//! The additions of a tree as the kernel reads them: `sum.cu`.

use crate::collective::plan::Step;

pub(super) const SOURCE: &str = include_str!("sum.cu");

/// Its name there.
#[cfg(feature = "nccl")]
pub(super) const KERNEL: &str = "tree_sum";

/// The moves, with the places of their partial sums.
pub(super) fn encode(steps: &[Step], sources: &[usize]) -> Vec<u64> {
    let word = |step: &Step| match *step {
        Step::Load(i) => sources[i] as u64,
        Step::AddFrom(i) => 1 << 62 | sources[i] as u64,
        Step::Add => 2 << 62,
    };
    steps.iter().map(word).collect()
}

#[cfg(test)]
mod tests {
    use std::{ffi::CString, fs, process::Command};

    use super::*;
    use crate::collective::{Partial, plan::ReducePlan, reduce_tree};

    /// Runs the kernel's source on the host: three blocks of four threads, one after the other.
    const GRID: &str = r#"
        struct dim { unsigned x; };
        static dim blockIdx, threadIdx, blockDim = {4}, gridDim = {3};
        #define __global__
        #include "sum.cu"
        extern "C" void run(const u64 *program, u64 steps, float *memory, u64 out, u64 count) {
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
                for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
                    tree_sum(program, steps, memory, out, count);
        }"#;

    type Run = unsafe extern "C" fn(*const u64, u64, *mut f32, u64, u64);

    /// The kernel, compiled by this machine's C++ compiler.
    fn kernel() -> Run {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("sum.cu"), SOURCE).unwrap();
        fs::write(folder.path().join("grid.cpp"), GRID).unwrap();
        let mut compiler = Command::new("c++");
        compiler.args(["-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", "grid.so", "grid.cpp"]);
        assert!(compiler.current_dir(folder.path()).status().expect("a C++ compiler, c++").success());
        let path = CString::new(folder.path().join("grid.so").to_str().unwrap()).unwrap();
        // SAFETY: the path ends with a zero; the library has no initialisers and is never unloaded.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!library.is_null());
        // SAFETY: `run` is there, compiled from GRID with this very signature.
        unsafe {
            let run = libc::dlsym(library, c"run".as_ptr());
            assert!(!run.is_null());
            std::mem::transmute::<*mut libc::c_void, Run>(run)
        }
    }

    #[test]
    fn the_kernel_has_the_bits_of_the_tree() {
        const LEN: usize = 45;
        let run = kernel();
        let value =
            |i: usize, j: usize| ((i * 37 + j * 11) % 101) as f32 * 10f32.powi((i * 5 + j) as i32 % 9 - 4);
        for (leaves, nodes) in [
            (0, vec![]),
            (1, vec![(0, 0)]),
            (6, (0..6).map(|i| (0, i)).collect()),
            (11, vec![(1, 1), (0, 0), (0, 1), (2, 1), (3, 1)]),
            (13, vec![(2, 3), (0, 4), (1, 3), (0, 5), (2, 2), (2, 0)]),
            (64, (0..64).map(|i| (0, 63 - i)).collect()),
        ] {
            // (2, 2) covers leaves 8 to 11, (2, 3) leaf 12 alone.
            let partials: Vec<Partial> = nodes
                .iter()
                .enumerate()
                .map(|(i, &(level, index))| {
                    let values = (0..LEN).map(|j| value(i, j)).collect();
                    Partial { level, index, values }
                })
                .collect();
            let expected = reduce_tree(leaves, LEN, &partials).unwrap();
            let plan = ReducePlan::new(leaves, &nodes).unwrap();
            // The sum in front, then every partial sum with a gap before it.
            let sources: Vec<usize> = (0..nodes.len()).map(|i| (i + 1) * (LEN + 3)).collect();
            let mut memory = vec![f32::NAN; (nodes.len() + 2) * (LEN + 3)];
            for (partial, at) in partials.iter().zip(&sources) {
                memory[*at..at + LEN].copy_from_slice(&partial.values);
            }
            let program = encode(&plan.steps, &sources);
            // SAFETY: the program's places and the sum's lie inside `memory`, each with LEN values.
            unsafe { run(program.as_ptr(), program.len() as u64, memory.as_mut_ptr(), 0, LEN as u64) };
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&memory[..LEN]), bits(&expected), "{leaves} leaves");
            assert!(memory[LEN..LEN + 3].iter().all(|v| v.is_nan()), "it wrote behind its end");
        }
    }
}
