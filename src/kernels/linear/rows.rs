//! Rows as the products with a frozen weight take them.

use crate::kernels::{
    buffer::with_scratch,
    pair::{Pair, as_pairs, round_rows, round_to_pairs},
    simd::has_dot,
};

/// Some rows of `depth` values.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a> {
    /// `row_len` apart.
    F32 { values: &'a [f32], row_len: usize },
    /// `depth / 2` pairs each, end to end.
    Pairs(&'a [Pair]),
}

/// Calls `work` with the rows as they are, and as bf16 if any weight `rounds`: in pairs where a path multiplies
/// those faster, else in f32, which gives the same bits.
pub(super) fn with_rows<R>(
    values: &[f32],
    row_len: usize,
    depth: usize,
    rounds: bool,
    work: impl FnOnce(Rows<'_>, Rows<'_>) -> R,
) -> R {
    let plain = Rows::F32 { values, row_len };
    if !rounds || values.is_empty() {
        return work(plain, plain);
    }
    let rows = values.len().div_ceil(row_len);
    if has_dot() {
        with_scratch(rows * depth.div_ceil(2), |scratch| {
            let pairs = as_pairs(scratch);
            round_to_pairs(values, row_len, depth, pairs);
            work(plain, Rows::Pairs(pairs))
        })
    } else {
        with_scratch(rows * depth, |rounded| {
            round_rows(values, row_len, depth, rounded);
            work(plain, Rows::F32 { values: rounded, row_len: depth })
        })
    }
}
