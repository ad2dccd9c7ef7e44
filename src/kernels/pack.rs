//! Operands brought into the order in which a tile reads them.

use super::{matrix::PANEL, simd::LANES};

/// Width of a panel that holds so many columns.
pub(super) fn panel_width(columns: usize) -> usize {
    if columns <= LANES { LANES } else { PANEL }
}

/// `panel[k, j] = rows[j, k]` for the `columns` rows of `rows`, `row_len` apart, `depth` values
/// each; the panel is `panel_width(columns)` wide and zero beyond `columns`.
///
/// Goes block by block of 16 x 32, so that what it writes stays in the first-level cache.
pub(super) fn pack_transposed(rows: &[f32], row_len: usize, columns: usize, depth: usize, panel: &mut [f32]) {
    let width = panel_width(columns);
    for (block, lines) in panel[..depth * width].chunks_mut(LANES * width).enumerate() {
        let first = block * LANES;
        for j in 0..columns {
            let row = &rows[j * row_len + first..][..lines.len() / width];
            for (line, value) in lines.chunks_exact_mut(width).zip(row) {
                line[j] = *value;
            }
        }
        for line in lines.chunks_exact_mut(width) {
            line[columns..].fill(0.0);
        }
    }
}

/// `panel[k, j] = rows[k, j]` for `columns` columns; zero beyond them.
pub(super) fn pack_columns(rows: &[f32], row_len: usize, columns: usize, depth: usize, panel: &mut [f32]) {
    let width = panel_width(columns);
    for (k, to) in panel[..depth * width].chunks_exact_mut(width).enumerate() {
        to[..columns].copy_from_slice(&rows[k * row_len..][..columns]);
        to[columns..].fill(0.0);
    }
}
