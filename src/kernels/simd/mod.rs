//! Sixteen lanes, whatever the machine: kernels are written once and compiled for each path.
//!
//! A vector is 16 f32 on every path: one AVX-512 register, two of AVX2, four of NEON. Each
//! operation rounds once, products are fused, and sums over lanes have one tree; so the paths do not
//! differ in a single bit, and neither do a small and a large machine of one cluster.
//!
//! A value of a path's type is the proof that the CPU has it: only [`run`] makes one, after
//! asking.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use self::{avx2::Avx2, avx512::Avx512};
use super::{WeightDtype, amx, pair::Pair};
use plain::Plain;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// [`Path::Avx512Bf16`], and AMX for products of bf16 with bf16, with [bits of its own](amx).
    #[cfg(target_arch = "x86_64")]
    AmxBf16,
    /// AVX-512, and AVX512-BF16 for products of bf16 with bf16: the same bits as [`Path::Avx512`], in half the time on
    /// some CPUs and twice of it on others.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// The compiler's own vectors: NEON on aarch64, fused operations in software elsewhere.
    Plain,
}

/// Code that is compiled once for each path.
pub(crate) trait Kernel {
    type Output;

    /// Must be `#[inline(always)]`, and so must what it calls with `s`: code that is not
    /// inlined into the path's function is compiled without its instructions.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Operations on 16 lanes.
pub(crate) trait Simd: Copy {
    type V: Copy;

    /// Rows of a product tile whose sums fit the registers, for one and for two vectors of
    /// columns; 0 if two never do.
    const TILE_ROWS: [usize; 2];

    fn splat(self, value: f32) -> Self::V;

    /// # Safety
    ///
    /// 16 values must be readable at `from`.
    unsafe fn load(self, from: *const f32) -> Self::V;

    /// The upper and the lower halves of 16 [pairs](crate::kernels::pair), whose bits the lanes are, widened.
    fn widen_pairs(self, pairs: Self::V) -> [Self::V; 2];

    /// `sum` plus the product of the upper halves of two pairs, plus that of the lower; each rounded once.
    #[inline(always)]
    fn dot_pairs(self, a: Self::V, b: Self::V, sum: Self::V) -> Self::V {
        let ([a_upper, a_lower], [b_upper, b_lower]) = (self.widen_pairs(a), self.widen_pairs(b));
        self.fma(a_lower, b_lower, self.fma(a_upper, b_upper, sum))
    }

    /// 32 numbers, [rounded](crate::kernels::pair::round_input), as pairs.
    #[inline(always)]
    fn round_to_pairs(self, numbers: [Self::V; 2]) -> Self::V {
        round_lanes(self, numbers)
    }

    /// Of 32 pairs, whose bits the lanes are, the upper halves, neighbours as a pair, and the lower halves.
    #[inline(always)]
    fn regroup_pairs(self, pairs: [Self::V; 2]) -> [Self::V; 2] {
        let bits = pairs.map(|pairs| self.lanes(pairs).map(f32::to_bits));
        let place = |lane: usize| bits[lane / LANES][lane % LANES];
        let both = [0, 1].map(|half| {
            std::array::from_fn::<f32, LANES, _>(|lane| {
                let [first, second] = [place(2 * lane), place(2 * lane + 1)].map(|pair| pair << (16 * half));
                f32::from_bits(first & 0xffff_0000 | second >> 16)
            })
        });
        both.map(|lanes| self.read(&lanes))
    }

    /// Lane `i` of row `j` becomes lane `j` of row `i`.
    #[inline(always)]
    fn transpose(self, rows: [Self::V; LANES]) -> [Self::V; LANES] {
        let rows = rows.map(|row| self.lanes(row));
        std::array::from_fn(|i| self.read(&rows.map(|row| row[i])))
    }

    /// The low (`half` 0) or high (1) halves of 16 bytes, as numbers.
    fn read_nibbles(self, bytes: &[u8; LANES], half: usize) -> Self::V;

    /// `v` plus `amount` in the lanes whose bit of `mask` is set, from the lowest on.
    fn add_where(self, mask: u16, v: Self::V, amount: f32) -> Self::V;

    /// 16 whole numbers of a slice.
    fn read_i8(self, values: &[i8]) -> Self::V;

    /// # Safety
    ///
    /// 16 values must be writable at `to`.
    unsafe fn store(self, to: *mut f32, v: Self::V);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;

    /// Brings what is read soon into the first-level cache, if the path can; any address will do.
    #[inline(always)]
    fn prefetch(self, _at: *const f32) {}

    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;

    /// `a < b ? a : b`: `b` if either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;

    /// `a > b ? a : b`: `b` if either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;

    /// `a < b ? x : y`.
    fn select_less(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;

    /// The bits of `a` plus those of `n` shifted by 23, the place of the exponent.
    fn add_exponent(self, a: Self::V, n: Self::V) -> Self::V;

    /// All lanes added: lane i and i + 8, then i and i + 4, then 2, then 1.
    fn sum(self, v: Self::V) -> f32;

    /// 16 values of a slice.
    #[inline(always)]
    fn read(self, values: &[f32]) -> Self::V {
        let values = &values[..LANES];
        // SAFETY: the slice has 16 values.
        unsafe { self.load(values.as_ptr()) }
    }

    /// Writes 16 values of a slice.
    #[inline(always)]
    fn write(self, values: &mut [f32], v: Self::V) {
        let values = &mut values[..LANES];
        // SAFETY: the slice has 16 values.
        unsafe { self.store(values.as_mut_ptr(), v) }
    }

    /// Up to 16 values of a slice; missing lanes are `fill`.
    #[inline(always)]
    fn read_some(self, values: &[f32], fill: f32) -> Self::V {
        if values.len() >= LANES {
            return self.read(values);
        }
        let mut lanes = [fill; LANES];
        lanes[..values.len()].copy_from_slice(values);
        self.read(&lanes)
    }

    /// Writes the first lanes to a slice of up to 16 values.
    #[inline(always)]
    fn write_some(self, values: &mut [f32], v: Self::V) {
        if values.len() >= LANES {
            return self.write(values, v);
        }
        let lanes = self.lanes(v);
        values.copy_from_slice(&lanes[..values.len()]);
    }

    #[inline(always)]
    fn lanes(self, v: Self::V) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        self.write(&mut lanes, v);
        lanes
    }

    /// The largest lane; NaN lanes do not count.
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        self.lanes(v).into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// [`Simd::round_to_pairs`] without an instruction for it.
#[inline(always)]
fn round_lanes<S: Simd>(s: S, numbers: [S::V; 2]) -> S::V {
    let numbers = numbers.map(|numbers| s.lanes(numbers));
    let number = |place: usize| numbers[place / LANES][place % LANES];
    s.read(&std::array::from_fn::<f32, LANES, _>(|i| {
        Pair::rounded([number(2 * i), number(2 * i + 1)]).as_f32()
    }))
}

/// Runs a kernel on this machine's best path.
#[inline]
pub(crate) fn run<K: Kernel>(kernel: K) -> K::Output {
    run_on(Path::best(), kernel)
}

/// Runs a kernel on a path of [`Path::available`].
#[inline]
pub(crate) fn run_on<K: Kernel>(path: Path, kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")]
    fn avx512<K: Kernel>(s: Avx512<false>, kernel: K) -> K::Output {
        kernel.run(s)
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn avx2<K: Kernel>(s: Avx2, kernel: K) -> K::Output {
        kernel.run(s)
    }
    debug_assert!(path.is_available());
    match path {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Path::best` and `Path::available` name only what the CPU has.
        Path::AmxBf16 | Path::Avx512Bf16 | Path::Avx512 => unsafe { avx512(Avx512::new(), kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Path::Avx2 => unsafe { avx2(Avx2::new(), kernel) },
        Path::Plain => kernel.run(Plain),
    }
}

/// Runs a kernel of [`Simd::dot_pairs`] on a path of [`Path::available`]: one instruction where the path
/// [has it](has_dot), the same bits in several elsewhere.
#[inline]
pub(crate) fn run_dot_on<K: Kernel>(path: Path, kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma")]
    fn avx512_bf16<K: Kernel>(s: Avx512<true>, kernel: K) -> K::Output {
        kernel.run(s)
    }
    debug_assert!(path.is_available());
    match path {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as in `run_on`.
        Path::AmxBf16 | Path::Avx512Bf16 => unsafe { avx512_bf16(Avx512::new(), kernel) },
        path => run_on(path, kernel),
    }
}

/// The same on this machine's best path.
#[inline]
pub(crate) fn run_dot<K: Kernel>(kernel: K) -> K::Output {
    run_dot_on(Path::best(), kernel)
}

/// Whether this process multiplies pairs with an instruction of their own. Else f32 are faster.
pub(crate) fn has_dot() -> bool {
    match Path::best() {
        #[cfg(target_arch = "x86_64")]
        Path::AmxBf16 | Path::Avx512Bf16 => true,
        _ => amx::is_emulated(),
    }
}

/// Whether this process multiplies pairs in [tiles](amx).
pub(crate) fn has_tiles() -> bool {
    match Path::best() {
        #[cfg(target_arch = "x86_64")]
        Path::AmxBf16 => true,
        _ => amx::is_emulated(),
    }
}

/// Name of the kernel path of this process: `amx_bf16`, `avx512_bf16`, `avx512`, `avx2`, `neon` or `scalar`. The
/// fastest of the machine, unless another was chosen.
pub fn path() -> &'static str {
    Path::best().name()
}

/// Name of the bits that this process computes with models of this type: machines on which it differs may differ
/// in their last bits. The instruction of `avx512_bf16` has the bits of `avx512` without it; those of `amx_bf16`
/// have their own, but only bf16 meets them.
pub fn numerics(dtype: WeightDtype) -> &'static str {
    match Path::best() {
        #[cfg(target_arch = "x86_64")]
        Path::AmxBf16 if dtype == WeightDtype::Bf16 => Path::AmxBf16.name(),
        #[cfg(target_arch = "x86_64")]
        Path::AmxBf16 | Path::Avx512Bf16 => Path::Avx512.name(),
        path => path.name(),
    }
}

/// Names of the kernel paths that this machine has, the fastest first.
pub fn paths() -> Vec<&'static str> {
    Path::available().map(Path::name).collect()
}

/// Computes on the path of this name from now on; for a slower one that all machines of a cluster have, and
/// for measuring. False if this machine lacks it, or has computed on another already.
pub fn choose_path(name: &str) -> bool {
    let Some(path) = Path::available().find(|path| path.name() == name) else { return false };
    *BEST.get_or_init(|| path) == path
}

/// The path of this process; set when it is first asked for.
static BEST: OnceLock<Path> = OnceLock::new();

impl Path {
    /// From the fastest to the slowest, on most CPUs that have them.
    const ALL: &[Self] = &[
        #[cfg(target_arch = "x86_64")]
        Self::AmxBf16,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512Bf16,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        Self::Plain,
    ];

    fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::AmxBf16 => "amx_bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "avx512_bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            Self::Plain if cfg!(target_arch = "aarch64") => "neon",
            Self::Plain => "scalar",
        }
    }

    /// The paths of this machine, the fastest first; there is always one.
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        let mut paths: Vec<_> = Self::ALL.iter().copied().filter(|path| path.is_available()).collect();
        #[cfg(target_arch = "x86_64")]
        if let Some(at) = paths.iter().position(|path| *path == Self::Avx512Bf16)
            // SAFETY: this CPU has that path.
            && !unsafe { avx512::dot_is_fast() }
        {
            // `Avx512` comes next: whoever has the former has it.
            paths.swap(at, at + 1);
        }
        paths.into_iter()
    }

    #[inline]
    fn best() -> Self {
        *BEST.get_or_init(|| Self::available().next().unwrap_or(Self::Plain))
    }

    fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::AmxBf16 => Self::Avx512Bf16.is_available() && amx::amx() == Some(Ok(())),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                is_x86_feature_detected!("avx512bf16")
                    && Self::Avx512.is_available()
                    // SAFETY: the CPU has both, as just asked.
                    && unsafe { avx512::dot_is_a_chain() }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Plain => true,
        }
    }
}
