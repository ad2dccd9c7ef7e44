//! Operands brought into the order in which a tile reads them.

use crate::kernels::{
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
    run(Transpose { rows, row_len, columns, depth, panel, width: panel_width(columns) });
}

/// `panel[k, j] = rows[k, j]` for `columns` columns; zero beyond them.
pub(super) fn pack_columns(rows: &[f32], row_len: usize, columns: usize, depth: usize, panel: &mut [f32]) {
    let width = panel_width(columns);
    for (k, to) in panel[..depth * width].chunks_exact_mut(width).enumerate() {
        to[..columns].copy_from_slice(&rows[k * row_len..][..columns]);
        to[columns..].fill(0.0);
    }
}

struct Transpose<'a> {
    rows: &'a [f32],
    row_len: usize,
    columns: usize,
    depth: usize,
    panel: &'a mut [f32],
    width: usize,
}

impl Kernel for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { rows, row_len, columns, depth, panel, width } = self;
        let panel = &mut panel[..depth * width];
        for j in 0..width {
            let column = panel[j..].iter_mut().step_by(width);
            if j < columns {
                let row = &rows[j * row_len..][..depth];
                column.zip(row).for_each(|(to, from)| *to = *from);
            } else {
                column.for_each(|to| *to = 0.0);
            }
        }
    }
}
