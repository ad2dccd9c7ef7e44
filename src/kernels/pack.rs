//! Operands brought into the order in which a tile reads them.

use super::{
    matrix::PANEL,
    simd::{Kernel, LANES, Simd, run},
};

/// Width of a panel that holds so many columns.
pub(super) fn panel_width(columns: usize) -> usize {
    if columns <= LANES { LANES } else { PANEL }
}

/// `panel[k, j] = rows[j, k]` for the `columns` rows of `rows`, `row_len` apart, `depth` values
/// each; the panel is `panel_width(columns)` wide and zero beyond `columns`.
pub(super) fn pack_transposed(rows: &[f32], row_len: usize, columns: usize, depth: usize, panel: &mut [f32]) {
    run(Transpose { rows, row_len, columns, panel: &mut panel[..depth * panel_width(columns)] });
}

/// Square by square of 16 x 16, each of which fills a register a row.
struct Transpose<'a> {
    rows: &'a [f32],
    row_len: usize,
    columns: usize,
    panel: &'a mut [f32],
}

impl Kernel for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, row_len, columns, panel } = self;
        let width = panel_width(columns);
        for (block, lines) in panel.chunks_mut(LANES * width).enumerate() {
            let depth = lines.len() / width;
            for column in (0..width).step_by(LANES) {
                let mut square = [s.splat(0.0); LANES];
                for (j, row) in square.iter_mut().enumerate() {
                    if column + j < columns {
                        *row = s.read_some(&rows[(column + j) * row_len + block * LANES..][..depth], 0.0);
                    }
                }
                for (line, values) in lines.chunks_exact_mut(width).zip(s.transpose(square)) {
                    s.write(&mut line[column..], values);
                }
            }
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
