//! Kernels against their definitions: bits of products, finite differences of gradients.

mod coded;
mod gradients;
mod products;

use super::simd::has_tiles;

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

/// The definition of a product: one chain of fused products in the order of the reduction.
fn chain(x: &[f32], w: &[f32], start: f32) -> f32 {
    x.iter().zip(w).fold(start, |sum, (x, w)| x.mul_add(*w, sum))
}

/// That of a product of bf16 in tiles: of each 32 terms two chains, of the even and of the odd ones, and then a sum.
pub(crate) fn chain_of_tiles(x: &[f32], w: &[f32], start: f32) -> f32 {
    x.chunks(32).zip(w.chunks(32)).fold(start, |sum, (x, w)| {
        let every_second = |first: usize| {
            let terms = x.iter().zip(w).skip(first).step_by(2);
            terms.fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum))
        };
        sum + (every_second(0) + every_second(1))
    })
}

/// That of a product of bf16 on this thread.
fn chain_of_bf16(x: &[f32], w: &[f32], start: f32) -> f32 {
    if has_tiles() { chain_of_tiles(x, w, start) } else { chain(x, w, start) }
}
