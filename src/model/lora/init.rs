use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use crate::types::Hasher;

use super::LoraLayout;

/// Weights of a fresh adapter: A uniform in `±1/sqrt(in)`, B zero.
///
/// The bound is that of PEFT's default, `kaiming_uniform_(a=sqrt(5))`. Every tensor draws from
/// a ChaCha8 of its own, keyed by `SHA-256(domain ‖ seed as u64 LE ‖ tensor name)`, so its
/// values depend neither on which other layers are adapted nor on the machine. An element is
/// `(2u − 1)·bound` in f32 with `u` the upper 24 bits of the next 32-bit word over 2²⁴.
pub(super) fn initial_values(layout: &LoraLayout) -> Vec<f32> {
    let mut values = vec![0.0; layout.len()];
    for entry in &layout.entries {
        let [name_a, _] = entry.tensor_names();
        let mut random = ChaCha8Rng::from_seed(key(layout.config.seed, &name_a));
        let bound = 1.0 / (entry.in_features as f32).sqrt();
        for value in &mut values[entry.a.clone()] {
            let unit = (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
            *value = (2.0 * unit - 1.0) * bound;
        }
    }
    values
}

fn key(seed: u64, tensor: &str) -> [u8; 32] {
    let mut hasher = Hasher::default();
    hasher.update(b"lockstep lora init 1\0");
    hasher.update(&seed.to_le_bytes());
    hasher.update(tensor.as_bytes());
    hasher.finish().0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::lora::layout::tests::tiny_model,
        types::{LoraConfig, LoraTarget},
    };

    fn layout(config: LoraConfig) -> LoraLayout {
        LoraLayout::new(&tiny_model(), &config).unwrap()
    }

    #[test]
    fn a_is_within_its_bound_and_b_is_zero() {
        let layout = layout(LoraConfig::new(4, 7));
        let values = initial_values(&layout);
        for entry in &layout.entries {
            let bound = 1.0 / (entry.in_features as f32).sqrt();
            let a = &values[entry.a.clone()];
            assert!(a.iter().all(|value| value.abs() <= bound));
            // Uniform in ±bound: the root mean square is bound/√3; 48 or more draws.
            let rms = (a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32).sqrt();
            assert!((0.4..0.75).contains(&(rms / bound)), "{}: {}", entry.module_name(), rms / bound);
            assert!(values[entry.b.clone()].iter().all(|value| value.to_bits() == 0));
        }
    }

    /// Fresh weights are part of what a seed promises: these bits may never change. They were
    /// computed by a ChaCha8 and a SHA-256 that share no code with this crate (Python).
    #[test]
    fn golden_values() {
        let layout = layout(LoraConfig::new(4, 7));
        let values = initial_values(&layout);
        let first = |layer, target| {
            let start = layout.entries_of(layer, target)[0].a.start;
            [values[start].to_bits(), values[start + 1].to_bits(), values[start + 2].to_bits()]
        };
        assert_eq!(first(0, LoraTarget::QProj), GOLDEN_Q0);
        assert_eq!(first(1, LoraTarget::DownProj), GOLDEN_DOWN1);
    }

    const GOLDEN_Q0: [u32; 3] = [0x3d89ce36, 0xbd32c79a, 0xbe051bb8];
    const GOLDEN_DOWN1: [u32; 3] = [0x3e548df0, 0xbd9358ce, 0xbe5cca86];

    #[test]
    fn a_tensor_does_not_depend_on_the_other_targets() {
        let all = layout(LoraConfig::new(4, 7));
        let mut config = LoraConfig::new(4, 7);
        config.targets = vec![LoraTarget::DownProj];
        let one = layout(config);
        let (all_values, one_values) = (initial_values(&all), initial_values(&one));
        let of = |layout: &LoraLayout| layout.entries_of(1, LoraTarget::DownProj)[0].a.clone();
        assert_eq!(all_values[of(&all)], one_values[of(&one)]);
    }

    #[test]
    fn seeds_and_tensors_differ() {
        assert_ne!(key(1, "x"), key(2, "x"));
        assert_ne!(key(1, "x"), key(1, "y"));
    }
}
