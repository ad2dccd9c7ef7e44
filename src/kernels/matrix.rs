//! Frozen weights in the order in which the products read them.

use std::{fmt, sync::Arc};

use super::buffer::Buffer;

/// Outputs in a panel: two AVX-512 registers, the width of the widest product tile.
pub(crate) const PANEL: usize = 32;

/// A frozen linear layer's weight, f32, packed once when it is loaded; clones share it.
///
/// ```text
/// panel p holds outputs 32p .. 32p + 32, input by input (missing outputs are zero):
///
///            output 32p   32p+1  …  32p+31
/// input 0        w          w          w
/// input 1        w          w          w
///   …
/// ```
///
/// So a product with one row, as in decoding, reads memory once from front to back and needs no
/// horizontal sum, and one with a thousand rows needs no packing. The transposed product of the
/// backward transposes blocks of 32 x 32, each of which is contiguous.
#[derive(Clone)]
pub struct Matrix {
    out_features: usize,
    in_features: usize,
    panels: Arc<Buffer>,
}

impl Matrix {
    /// Packs `rows`, `[out_features, in_features]` row-major.
    ///
    /// # Panics
    ///
    /// If `rows` has another length than `out_features * in_features`.
    pub fn from_rows(out_features: usize, in_features: usize, rows: &[f32]) -> Self {
        assert_eq!(rows.len(), out_features * in_features, "a matrix needs out x in values");
        let mut panels = Buffer::zeroed(out_features.div_ceil(PANEL) * in_features * PANEL);
        for (output, row) in rows.chunks_exact(in_features.max(1)).enumerate() {
            let start = output / PANEL * in_features * PANEL + output % PANEL;
            for (value, slot) in row.iter().zip(panels[start..].iter_mut().step_by(PANEL)) {
                *slot = *value;
            }
        }
        Self { out_features, in_features, panels: Arc::new(panels) }
    }

    /// Number of outputs.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Whether both are the same weights in memory, as a tied head and its embedding.
    pub fn shares_storage(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.panels, &other.panels)
    }

    /// Number of inputs.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Writes the weights of one output, `[in_features]`; of an embedding, one token's vector.
    ///
    /// # Panics
    ///
    /// If there is no such output, or `row` has another length.
    pub fn copy_row(&self, output: usize, row: &mut [f32]) {
        assert!(output < self.out_features, "output {output} of {}", self.out_features);
        assert_eq!(row.len(), self.in_features, "a row has one value per input");
        let panel = self.panel(output / PANEL);
        for (slot, value) in row.iter_mut().zip(panel[output % PANEL..].iter().step_by(PANEL)) {
            *slot = *value;
        }
    }

    /// Bytes of memory that the weights take, missing outputs included.
    pub fn bytes(&self) -> usize {
        self.panels.len() * size_of::<f32>()
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.out_features.div_ceil(PANEL)
    }

    /// One panel, `[in_features, 32]`.
    pub(crate) fn panel(&self, panel: usize) -> &[f32] {
        let len = self.in_features * PANEL;
        &self.panels[panel * len..][..len]
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix [{}, {}]", self.out_features, self.in_features)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_went_in() {
        for (outputs, inputs) in [(1, 1), (31, 5), (32, 7), (33, 3), (70, 16)] {
            let rows: Vec<f32> = (0..outputs * inputs).map(|i| i as f32 + 1.0).collect();
            let matrix = Matrix::from_rows(outputs, inputs, &rows);
            let mut row = vec![0.0; inputs];
            for (output, expected) in rows.chunks(inputs).enumerate() {
                matrix.copy_row(output, &mut row);
                assert_eq!(row, expected);
            }
            let padding = matrix.panels() * PANEL * inputs - rows.len();
            let zeros = (0..matrix.panels()).flat_map(|p| matrix.panel(p)).filter(|v| **v == 0.0).count();
            assert_eq!(zeros, padding, "what no output fills is zero");
        }
    }
}
