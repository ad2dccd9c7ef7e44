use std::ops::Range;

use half::bf16;

use crate::kernels::{
    CoreBudget, Layer, LowRank, Matrix, Priority, Shared, Team, WeightDtype, linear,
    pack::Widen,
    simd::{Path, run_on},
    tile::{Block, Factors, Start},
};

use super::{bits, noise};

/// The definition: one chain of fused products in the order of the reduction.
fn chain(x: &[f32], w: &[f32]) -> f32 {
    x.iter().zip(w).fold(0.0, |sum, (x, w)| x.mul_add(*w, sum))
}

#[derive(Clone, Copy)]
struct Shape {
    inputs: usize,
    outputs: usize,
    rank: usize,
    dtype: WeightDtype,
}

impl Shape {
    /// As they are once they are stored.
    fn weights(&self) -> Vec<f32> {
        noise(1, self.inputs * self.outputs).into_iter().map(|weight| self.dtype.round(weight)).collect()
    }

    fn adapter(&self, seed: u64) -> (Vec<f32>, Vec<f32>) {
        (noise(seed, self.rank * self.inputs), noise(seed + 1, self.outputs * self.rank))
    }

    /// `linear` on rows whose segments have these adapters.
    fn compute(
        &self,
        x: &[f32],
        segments: &[Range<usize>],
        adapters: &[Option<(Vec<f32>, Vec<f32>)>],
        team: &Team,
    ) -> Vec<f32> {
        let rows = x.len() / self.inputs;
        let weight = Matrix::with_dtype(self.dtype, self.outputs, self.inputs, &self.weights());
        let mut y = vec![f32::NAN; rows * self.outputs];
        let mut low = vec![f32::NAN; rows * self.rank];
        let layer = Layer {
            weight: &weight,
            low_rank: |segment: usize| {
                let (a, b) = adapters[segment].as_ref()?;
                Some(LowRank { a, b, rank: self.rank, scale: 2.0 })
            },
            low: Shared::new(&mut low),
            low_row: self.rank,
            y: Shared::new(&mut y),
        };
        linear(x, segments, &[layer], team);
        y
    }

    /// A row's outputs by the definition.
    fn row(&self, x: &[f32], adapter: Option<&(Vec<f32>, Vec<f32>)>) -> Vec<f32> {
        let low: Option<Vec<f32>> =
            adapter.map(|(a, _)| a.chunks(self.inputs).map(|a| 2.0 * chain(x, a)).collect());
        let weights = self.weights();
        let outputs = weights.chunks(self.inputs).enumerate().map(|(output, w)| {
            let base = chain(x, w);
            match (&low, adapter) {
                (Some(low), Some((_, b))) => {
                    let b = &b[output * self.rank..][..self.rank];
                    low.iter().zip(b).fold(base, |sum, (low, b)| low.mul_add(*b, sum))
                }
                _ => base,
            }
        });
        outputs.collect()
    }
}

/// Widths below, at and above a vector and a panel.
const SIZES: [[usize; 3]; 3] = [[5, 3, 2], [33, 70, 16], [64, 49, 37]];

fn shapes() -> impl Iterator<Item = Shape> {
    let of = |dtype| SIZES.map(|[inputs, outputs, rank]| Shape { inputs, outputs, rank, dtype });
    [WeightDtype::F32, WeightDtype::Bf16].into_iter().flat_map(of)
}

#[test]
fn a_row_has_the_bits_of_its_definition_among_any_number_of_rows() {
    let budget = CoreBudget::new(3);
    let lease = budget.lease(3, Priority::Training);
    for shape in shapes() {
        let x = noise(2, 300 * shape.inputs);
        let adapter = Some(shape.adapter(3));
        let expected: Vec<f32> =
            x.chunks(shape.inputs).flat_map(|x| shape.row(x, adapter.as_ref())).collect();
        for rows in (1..=40).chain([63, 119, 120, 121, 255, 300]) {
            let x = &x[..rows * shape.inputs];
            for team in [&Team::solo(), lease.team()] {
                let y =
                    shape.compute(x, std::slice::from_ref(&(0..rows)), std::slice::from_ref(&adapter), team);
                assert_eq!(bits(&y), bits(&expected[..rows * shape.outputs]), "{rows} rows");
            }
        }
    }
}

#[test]
fn a_row_has_the_bits_of_its_definition_among_rows_of_other_adapters() {
    for shape in shapes() {
        let segments = [0..1, 1..14, 14..15, 15..140];
        let adapters = [Some(shape.adapter(3)), None, Some(shape.adapter(5)), Some(shape.adapter(7))];
        let x = noise(2, 140 * shape.inputs);
        let y = shape.compute(&x, &segments, &adapters, &Team::solo());
        for (segment, adapter) in segments.iter().zip(&adapters) {
            for row in segment.clone() {
                let expected = shape.row(&x[row * shape.inputs..][..shape.inputs], adapter.as_ref());
                assert_eq!(bits(&y[row * shape.outputs..][..shape.outputs]), bits(&expected), "row {row}");
            }
        }
    }
}

#[test]
fn every_path_gives_the_same_bits() {
    let (depth, rows) = (41, 29);
    let (a, b) = (noise(1, rows * depth), noise(2, depth * 32));
    for columns in [1, 15, 16, 17, 31, 32] {
        for start in [Start::Zero, Start::Stored] {
            let results: Vec<Vec<u32>> = Path::available()
                .map(|path| {
                    let mut c = noise(3, rows * 40);
                    // A is read across its rows, as gradients of adapters do.
                    let product =
                        Factors { a: a.as_ptr(), a_row: 1, a_step: rows, b: b.as_ptr(), b_step: 32, depth };
                    let c_start = c.as_mut_ptr();
                    let block = Block { rows, columns, product, second: None, c: c_start, c_row: 40, start };
                    run_on(path, block);
                    bits(&c)
                })
                .collect();
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{columns} columns");
            let untouched = bits(&noise(3, rows * 40));
            for (now, before) in results[0].chunks(40).zip(untouched.chunks(40)) {
                assert_ne!(now[..columns], before[..columns]);
                assert_eq!(now[columns..], before[columns..], "nothing beyond the columns is written");
            }
        }
    }
}

/// Every bf16 there is, on every path: its f32 has the same value.
#[test]
fn every_path_widens_without_loss() {
    let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).filter(|value| value.is_finite()).collect();
    let one = [1.0f32];
    for path in Path::available() {
        for line in all.chunks_exact(32) {
            let mut c = [f32::NAN; 32];
            let product =
                Factors { a: one.as_ptr(), a_row: 1, a_step: 1, b: line.as_ptr(), b_step: 32, depth: 1 };
            let (columns, start) = (32, Start::Zero);
            run_on(
                path,
                Block { rows: 1, columns, product, second: None, c: c.as_mut_ptr(), c_row: 32, start },
            );
            let expected: Vec<f32> = line.iter().map(|value| value.to_f32()).collect();
            // A sum that starts at +0 has no -0.
            assert!(c.iter().zip(&expected).all(|(found, expected)| found == expected), "{path:?}");
            assert!(line.iter().all(|value| value.widen().to_bits() == value.to_f32().to_bits()));
        }
    }
}
