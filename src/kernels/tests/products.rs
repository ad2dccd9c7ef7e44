use std::ops::Range;

use half::bf16;

use crate::kernels::{
    Adapted, CoreBudget, Gradients, Layer, LowRank, Matrix, Priority, Shared, Team, WeightDtype, amx, linear,
    linear_backward,
    pair::{Pair, round_input, round_to_pairs, round_weight},
    simd::{Kernel, Path, Simd, run_dot_on, run_on},
    tile::{Block, Factors, Start, WidePair},
};

use super::{bits, chain, chain_of_bf16, noise};

#[derive(Clone, Copy)]
struct Shape {
    inputs: usize,
    outputs: usize,
    rank: usize,
    kind: Kind,
}

/// How weights are held, and what they are multiplied with.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    F32,
    /// As bf16, multiplied with f32.
    HeldAsBf16,
    /// As bf16, multiplied with bf16.
    Bf16,
}

impl Kind {
    const ALL: [Self; 3] = [Self::F32, Self::HeldAsBf16, Self::Bf16];

    fn matrix(self, outputs: usize, inputs: usize, rows: &[f32]) -> Matrix {
        match self {
            Self::F32 => Matrix::from_rows(outputs, inputs, rows),
            Self::HeldAsBf16 => Matrix::from_bf16(outputs, inputs, rows),
            Self::Bf16 => Matrix::with_dtype(WeightDtype::Bf16, outputs, inputs, rows),
        }
    }

    /// What a product takes of a value.
    fn input(self, value: f32) -> f32 {
        if self == Self::Bf16 { round_input(value) } else { value }
    }
}

impl Shape {
    /// As they are once they are stored.
    fn weights(&self) -> Vec<f32> {
        let dtype = if self.kind == Kind::F32 { WeightDtype::F32 } else { WeightDtype::Bf16 };
        noise(1, self.inputs * self.outputs).into_iter().map(|weight| dtype.round(weight)).collect()
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
        let weight = self.kind.matrix(self.outputs, self.inputs, &self.weights());
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
            adapter.map(|(a, _)| a.chunks(self.inputs).map(|a| 2.0 * chain(x, a, 0.0)).collect());
        let weights = self.weights();
        let inputs: Vec<f32> = x.iter().map(|value| self.kind.input(*value)).collect();
        let outputs = weights.chunks(self.inputs).enumerate().map(|(output, w)| {
            let base = if self.kind == Kind::Bf16 { chain_of_bf16 } else { chain }(&inputs, w, 0.0);
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
    let of = |kind| SIZES.map(|[inputs, outputs, rank]| Shape { inputs, outputs, rank, kind });
    Kind::ALL.into_iter().flat_map(of)
}

#[test]
fn a_row_has_the_bits_of_its_definition_among_any_number_of_rows() {
    let budget = CoreBudget::new(3);
    let lease = budget.lease(3, Priority::Training);
    rows_have_the_bits_of_their_definition(shapes(), &[&Team::solo(), lease.team()]);
}

#[test]
fn a_row_in_tiles_has_the_bits_of_its_definition_among_any_number_of_rows() {
    let rounded = shapes().filter(|shape| shape.kind == Kind::Bf16);
    amx::with_emulation(|| rows_have_the_bits_of_their_definition(rounded, &[&Team::solo()]));
}

fn rows_have_the_bits_of_their_definition(shapes: impl Iterator<Item = Shape>, teams: &[&Team]) {
    for shape in shapes {
        let x = noise(2, 300 * shape.inputs);
        let adapter = Some(shape.adapter(3));
        let expected: Vec<f32> =
            x.chunks(shape.inputs).flat_map(|x| shape.row(x, adapter.as_ref())).collect();
        for rows in (1..=40).chain([63, 119, 120, 121, 255, 300]) {
            let x = &x[..rows * shape.inputs];
            for team in teams {
                let y =
                    shape.compute(x, std::slice::from_ref(&(0..rows)), std::slice::from_ref(&adapter), team);
                assert_eq!(bits(&y), bits(&expected[..rows * shape.outputs]), "{rows} rows");
            }
        }
    }
}

#[test]
fn a_row_has_the_bits_of_its_definition_among_rows_of_other_adapters() {
    segments_have_the_bits_of_their_definition(shapes());
}

#[test]
fn a_row_in_tiles_has_the_bits_of_its_definition_among_rows_of_other_adapters() {
    let rounded = shapes().filter(|shape| shape.kind == Kind::Bf16);
    amx::with_emulation(|| segments_have_the_bits_of_their_definition(rounded));
}

fn segments_have_the_bits_of_their_definition(shapes: impl Iterator<Item = Shape>) {
    for shape in shapes {
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
    for path in Path::available() {
        for lines in all.chunks_exact(64) {
            let (upper, lower) = lines.split_at(32);
            let pairs: Vec<Pair> = upper.iter().zip(lower).map(|(u, l)| Pair::new(*u, *l)).collect();
            for (x, expected) in [([1.0f32, 0.0], upper), ([0.0, 1.0], lower)] {
                let mut c = [f32::NAN; 32];
                let b = WidePair::of(&pairs).as_ptr();
                let product = Factors { a: x.as_ptr(), a_row: 2, a_step: 1, b, b_step: 32, depth: 2 };
                let (columns, start, to) = (32, Start::Zero, c.as_mut_ptr());
                run_on(path, Block { rows: 1, columns, product, second: None, c: to, c_row: 32, start });
                let expected: Vec<f32> = expected.iter().map(|value| value.to_f32()).collect();
                // A sum that starts at +0 has no -0.
                assert!(c.iter().zip(&expected).all(|(found, expected)| found == expected), "{path:?}");
            }
        }
    }
}

/// Pairs of inputs become pairs of outputs, by the definition of both.
#[test]
fn every_path_regroups_and_transposes_alike() {
    struct Turn<'a>(&'a [f32], &'a mut [f32]);
    impl Kernel for Turn<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let [upper, lower] = s.regroup_pairs([s.read(self.0), s.read(&self.0[16..])]);
            s.write(self.1, upper);
            s.write(&mut self.1[16..], lower);
            let rows = s.transpose(std::array::from_fn(|row| s.read(&self.0[16 * row..])));
            for (row, to) in rows.into_iter().zip(self.1[32..].chunks_mut(16)) {
                s.write(to, row);
            }
        }
    }
    let values = noise(1, 256);
    let word = |pair: usize, half: usize| (values[pair].to_bits() >> (16 - 16 * half)) as u16;
    for path in Path::available() {
        let mut turned = vec![0.0; 32 + 256];
        run_on(path, Turn(&values, &mut turned));
        for half in 0..2 {
            for pair in 0..16 {
                let expected = u32::from(word(2 * pair, half)) << 16 | u32::from(word(2 * pair + 1, half));
                assert_eq!(
                    turned[16 * half + pair].to_bits(),
                    expected,
                    "{path:?}, half {half}, pair {pair}"
                );
            }
        }
        assert!((0..256).all(|at| turned[32 + at] == values[at % 16 * 16 + at / 16]), "{path:?}");
    }
}

/// Tiles of every height on every path, with numbers of all sizes that may pass: the least, whose products are
/// the least that are normal, and sums that cancel; with and without the instruction for pairs.
#[test]
fn every_path_multiplies_pairs_as_a_chain() {
    let (depth, rows) = (43, 14);
    let wild = |seed, len: usize, least: i32| -> Vec<f32> {
        let exponents =
            noise(seed + 100, len).into_iter().map(|value| least / 2 + (value * (least as f32) / 2.0) as i32);
        noise(seed, len)
            .into_iter()
            .zip(exponents)
            .map(|(value, exponent)| value * (exponent as f32).exp2())
            .collect()
    };
    for scale in [0, -72] {
        let x = wild(1, rows * depth, scale);
        let w: Vec<bf16> = wild(2, 32 * depth, scale.max(-40)).into_iter().map(round_weight).collect();
        let mut x_pairs = vec![Pair::default(); rows * depth.div_ceil(2)];
        round_to_pairs(&x, depth, depth, &mut x_pairs);
        let zero = bf16::ZERO;
        let w_pairs: Vec<Pair> = (0..depth.div_ceil(2))
            .flat_map(|p| (0..32).map(move |j| (p, j)))
            .map(|(p, j)| Pair::new(w[2 * p * 32 + j], *w.get((2 * p + 1) * 32 + j).unwrap_or(&zero)))
            .collect();
        let expected: Vec<f32> = (0..rows * 32)
            .map(|place| {
                let terms = (0..depth).map(|k| (x[place / 32 * depth + k], w[k * 32 + place % 32].to_f32()));
                terms.fold(0.0, |sum, (x, w)| round_input(x).mul_add(w, sum))
            })
            .collect();
        assert!(expected.iter().all(|sum| *sum == 0.0 || sum.is_normal()), "no sum is subnormal");
        for path in Path::available() {
            for height in 1..=rows {
                let mut c = vec![f32::NAN; height * 32];
                let (a, b) = (x_pairs.as_ptr(), w_pairs.as_ptr());
                let lines = depth.div_ceil(2);
                let product = Factors { a, a_row: lines, a_step: 1, b, b_step: 32, depth: lines };
                let (to, start) = (c.as_mut_ptr(), Start::Zero);
                run_dot_on(
                    path,
                    Block { rows: height, columns: 32, product, second: None, c: to, c_row: 32, start },
                );
                assert_eq!(bits(&c), bits(&expected[..height * 32]), "{path:?}, {height} rows, 2^{scale}");
            }
        }
    }
}

/// `dx = Σ bf16(dy) W + d_low A`: first the products with the weights of all layers, then those of the adapters.
#[test]
fn a_rounded_gradient_has_the_bits_of_its_definition() {
    let budget = CoreBudget::new(3);
    let lease = budget.lease(3, Priority::Training);
    rounded_gradients_have_the_bits_of_their_definition(&[1, 2, 37, 300], &[&Team::solo(), lease.team()]);
}

#[test]
fn a_rounded_gradient_in_tiles_has_the_bits_of_its_definition() {
    let compare = || rounded_gradients_have_the_bits_of_their_definition(&[1, 17, 45], &[&Team::solo()]);
    amx::with_emulation(compare);
}

fn rounded_gradients_have_the_bits_of_their_definition(row_counts: &[usize], teams: &[&Team]) {
    let rank = 3;
    // More outputs than are transposed at a time, an odd number of them, and panels that are not full.
    for (inputs, outputs) in [(5, [3, 70]), (70, [33, 1061])] {
        let weights = outputs.map(|outputs| {
            let rows = noise(outputs as u64, outputs * inputs);
            rows.into_iter().map(|weight| WeightDtype::Bf16.round(weight)).collect::<Vec<_>>()
        });
        let matrices = [0, 1].map(|i| Kind::Bf16.matrix(outputs[i], inputs, &weights[i]));
        for &rows in row_counts {
            let x = noise(2, rows * inputs);
            let dy = outputs.map(|outputs| noise(3 + outputs as u64, rows * outputs));
            let [a, low] = [noise(5, rank * inputs), noise(6, rows * rank)];
            let b = outputs.map(|outputs| noise(7, outputs * rank));
            let mut expected = vec![0.0f32; rows * inputs];
            let sums = expected.chunks_mut(inputs).enumerate();
            let d_low = |i: usize, row: usize, r: usize| {
                let dy = &dy[i][row * outputs[i]..][..outputs[i]];
                2.0 * dy.iter().enumerate().fold(0.0, |sum: f32, (n, dy)| dy.mul_add(b[i][n * rank + r], sum))
            };
            for (row, sums) in sums {
                for i in 0..2 {
                    let dy = &dy[i][row * outputs[i]..][..outputs[i]];
                    let dy: Vec<f32> = dy.iter().map(|dy| round_input(*dy)).collect();
                    for (input, sum) in sums.iter_mut().enumerate() {
                        let w: Vec<f32> = weights[i][input..].iter().step_by(inputs).copied().collect();
                        *sum = chain_of_bf16(&dy, &w, *sum);
                    }
                }
                for i in 0..2 {
                    for r in 0..rank {
                        let (d, a) = (d_low(i, row, r), &a[r * inputs..][..inputs]);
                        sums.iter_mut().zip(a).for_each(|(sum, a)| *sum = d.mul_add(*a, *sum));
                    }
                }
            }
            for team in teams {
                let mut dx = vec![f32::NAN; rows * inputs];
                let mut own = [0, 1].map(|i| {
                    (vec![0.0; rows * rank], vec![0.0; rank * inputs], vec![0.0; outputs[i] * rank])
                });
                let layers: Vec<Gradients<'_>> = own
                    .iter_mut()
                    .enumerate()
                    .map(|(i, (d_low, d_a, d_b))| {
                        let low_rank = LowRank { a: &a, b: &b[i], rank, scale: 2.0 };
                        let [d_low, d_a, d_b] = [d_low, d_a, d_b].map(|values| Shared::new(values));
                        let adapted = Some(Adapted { low_rank, low: &low, d_low, d_a, d_b });
                        Gradients { weight: &matrices[i], dy: &dy[i], adapted }
                    })
                    .collect();
                linear_backward(&x, rows, &layers, Some(Shared::new(&mut dx)), team);
                assert_eq!(bits(&dx), bits(&expected), "{inputs} inputs, {rows} rows");
            }
        }
    }
}
