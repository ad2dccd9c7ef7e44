//! What chips can do at most, as their maker says.

use serde::Serialize;

use crate::kernels::WeightDtype;

/// What a share of the peak is a share of.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Peak {
    /// 10^12 floating-point operations a second of dense products in the dtype that was measured.
    pub tflops: f64,
    /// 10^9 bytes a second of its memory.
    pub gb_per_s: f64,
    /// Where from.
    pub source: String,
}

/// A part of the driver's name for it, dense bf16 and f32 operations (10^12 a second), memory (GB/s).
type Chip = (&'static str, f64, f64, f64);

/// The first whose name is in the driver's counts, so narrower names come first.
///
/// NVIDIA's data sheets of the products; tensor cores without sparsity (half of what the sheets say with it), f32 accumulation,
/// and for f32 the plain cores, as cuBLAS has them without TF32.
const CHIPS: [Chip; 15] = [
    ("B200", 2250.0, 75.0, 8000.0),
    ("H200 NVL", 835.5, 60.0, 4800.0),
    ("H200", 989.4, 67.0, 4800.0),
    ("H100 NVL", 835.5, 60.0, 3900.0),
    ("H100 PCIe", 756.5, 51.0, 2000.0),
    ("H100", 989.4, 67.0, 3350.0),
    ("A100-SXM4-80GB", 312.0, 19.5, 2039.0),
    ("A100 80GB", 312.0, 19.5, 1935.0),
    ("A100", 312.0, 19.5, 1555.0),
    ("L40S", 362.1, 91.6, 864.0),
    ("L4", 121.0, 30.3, 300.0),
    ("A10G", 70.0, 31.5, 600.0),
    ("A10", 125.0, 31.2, 600.0),
    ("RTX 4090", 165.2, 82.6, 1008.0),
    ("RTX 3090", 71.0, 35.6, 936.0),
];

impl Peak {
    /// Of the chip that the driver calls so; `None` of one that isn't known.
    pub(super) fn of(name: &str, dtype: WeightDtype) -> Option<Self> {
        // "L4" is no "L40".
        let is_word = |at: usize, chip: &str| {
            let [before, behind] = [name[..at].chars().next_back(), name[at + chip.len()..].chars().next()];
            [before, behind].iter().flatten().all(|c| !c.is_ascii_alphanumeric())
        };
        let found = CHIPS.iter().find(|(chip, ..)| name.find(chip).is_some_and(|at| is_word(at, chip)))?;
        let (chip, bf16, f32, gb_per_s) = *found;
        let (tflops, cores) = match dtype {
            WeightDtype::Bf16 => (bf16, "dense bf16"),
            WeightDtype::F32 => (f32, "f32 without TF32"),
        };
        Some(Self { tflops, gb_per_s, source: format!("NVIDIA's data sheet of the {chip}, {cores}") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chips_are_found_by_what_the_driver_calls_them() {
        let of = |name| Peak::of(name, WeightDtype::Bf16).map(|peak| (peak.tflops, peak.gb_per_s));
        assert_eq!(of("NVIDIA H200"), Some((989.4, 4800.0)));
        assert_eq!(of("NVIDIA H100 80GB HBM3"), Some((989.4, 3350.0)));
        assert_eq!(of("NVIDIA H100 PCIe"), Some((756.5, 2000.0)));
        assert_eq!(of("NVIDIA A100-SXM4-40GB"), Some((312.0, 1555.0)));
        assert_eq!(of("NVIDIA A100 80GB PCIe"), Some((312.0, 1935.0)));
        assert_eq!(of("NVIDIA L40S"), Some((362.1, 864.0)));
        assert_eq!(of("NVIDIA L4"), Some((121.0, 300.0)));
        assert_eq!(of("NVIDIA L40"), None);
        assert_eq!(of("emulated"), None);
        assert_eq!(Peak::of("NVIDIA H200", WeightDtype::F32).map(|peak| peak.tflops), Some(67.0));
    }
}
