//! The type in which frozen weights are held.

use std::{fmt, str::FromStr};

use super::pair::round_weight;

/// What a base model's matrices are multiplied as: the weights, and what they are multiplied with. Everything else is
/// f32 whatever this is: sums, activations between products, adapters, norms, biases, attention, losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum WeightDtype {
    #[default]
    F32,
    /// The upper half of an f32, rounded to nearest, ties to even: 8 bits of precision, half the memory, and up
    /// to twice the speed on a CPU with a fast AVX512-BF16. Weights are rounded once, when they are loaded, activations and gradients on their
    /// way into a product. Weights below 2⁻⁴⁰ and inputs below 2⁻⁷² are zero.
    Bf16,
}

impl WeightDtype {
    /// Every type, as it is written.
    pub const NAMES: [&str; 2] = ["f32", "bf16"];

    /// As it is written: `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of a weight.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// The value that a weight has once it is stored.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => round_weight(value).to_f32(),
        }
    }
}

impl fmt::Display for WeightDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for WeightDtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err(format!("base weights are held as {}", Self::NAMES.join(" or "))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_read_as_it_is_written() {
        for name in WeightDtype::NAMES {
            assert_eq!(name.parse::<WeightDtype>().unwrap().to_string(), name);
        }
        assert_eq!("f16".parse::<WeightDtype>().unwrap_err(), "base weights are held as f32 or bf16");
    }

    #[test]
    fn rounds_to_nearest_ties_to_even() {
        let round = |bits: u32| WeightDtype::Bf16.round(f32::from_bits(bits)).to_bits();
        assert_eq!(round(0x3f80_8000), 0x3f80_0000, "a tie goes to the even one below");
        assert_eq!(round(0x3f81_8000), 0x3f82_0000, "and to the even one above");
        assert_eq!(round(0x3f80_8001), 0x3f81_0000);
        assert_eq!(WeightDtype::F32.round(0.1).to_bits(), 0.1f32.to_bits());
    }
}
