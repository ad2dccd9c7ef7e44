//! Kernels against their definitions: bits of products, finite differences of gradients.

mod coded;
mod gradients;
mod products;

/// `len` numbers in ±1 that look random (the finaliser of splitmix64).
pub(crate) fn noise(seed: u64, len: usize) -> Vec<f32> {
    let number = |i| {
        let mut z = (seed << 32 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(number).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
