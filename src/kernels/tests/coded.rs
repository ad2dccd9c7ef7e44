//! Weights in blocks: the bits are those of the f32 weights that the blocks stand for.

use crate::kernels::{
    Adapted, BlockRows, CodeBits, CoreBudget, Gradients, Layer, LowRank, Matrix, Priority, Shared, Team,
    linear, linear_backward,
    matrix::Panel,
    simd::{Path, run_on},
    tile::{Block, Element, Factors, Start},
};

use super::{bits, noise};

fn rows(bits: CodeBits, outputs: usize, inputs: usize) -> BlockRows {
    let codes = noise(8, outputs * inputs).into_iter().map(|value| match bits {
        CodeBits::Four => ((value.abs() * 1e4) as i64 % 16) as i8,
        CodeBits::Five => ((value.abs() * 1e4) as i64 % 32) as i8,
        CodeBits::Six => ((value.abs() * 1e4) as i64 % 64 - 32) as i8,
        CodeBits::Eight => (value * 1e4) as i64 as i8,
    });
    let runs = outputs * inputs / bits.run();
    // As f16 are, of which they come.
    let short = |seed| noise(seed, runs).into_iter().map(|value| half::f16::from_f32(value / 16.0).to_f32());
    let offsets = match bits {
        CodeBits::Six => vec![0.0; runs],
        _ => short(10).collect(),
    };
    BlockRows { bits, codes: codes.collect(), scales: short(9).collect(), offsets }
}

const ALL_BITS: [CodeBits; 4] = [CodeBits::Four, CodeBits::Five, CodeBits::Six, CodeBits::Eight];

/// (outputs, inputs): panels whole and not.
const SIZES: [(usize, usize); 3] = [(1, 32), (70, 96), (64, 64)];

/// The matrix of codes and that of the numbers they stand for.
fn pairs() -> impl Iterator<Item = [Matrix; 2]> {
    SIZES.into_iter().flat_map(|(outputs, inputs)| {
        ALL_BITS.map(|bits| {
            let rows = rows(bits, outputs, inputs);
            let values: Vec<f32> = (0..outputs * inputs).map(|index| rows.value(index)).collect();
            [Matrix::from_blocks(outputs, inputs, &rows), Matrix::from_rows(outputs, inputs, &values)]
        })
    })
}

#[test]
fn rows_come_back_as_the_numbers_they_stand_for() {
    for [coded, plain] in pairs() {
        let [mut found, mut expected] = [vec![0.0; coded.in_features()], vec![0.0; coded.in_features()]];
        for output in 0..coded.out_features() {
            coded.copy_row(output, &mut found);
            plain.copy_row(output, &mut expected);
            assert_eq!(bits(&found), bits(&expected));
        }
        assert!(coded.bytes() * 3 < plain.bytes(), "{} and {} bytes", coded.bytes(), plain.bytes());
    }
}

#[test]
fn a_product_has_the_bits_of_the_numbers() {
    let budget = CoreBudget::new(2);
    let lease = budget.lease(2, Priority::Training);
    for [coded, plain] in pairs() {
        let (inputs, outputs, rank) = (coded.in_features(), coded.out_features(), 5);
        let (a, b) = (noise(3, rank * inputs), noise(4, outputs * rank));
        for rows in (1..=14).chain([120, 131]) {
            let x = noise(2, rows * inputs);
            let [found, expected] = [&coded, &plain].map(|weight| {
                let (mut y, mut low) = (vec![f32::NAN; rows * outputs], vec![f32::NAN; rows * rank]);
                let low_rank = |_| Some(LowRank { a: &a, b: &b, rank, scale: 2.0 });
                let (low, y_out) = (Shared::new(&mut low), Shared::new(&mut y));
                let layer = Layer { weight, low_rank, low, low_row: rank, y: y_out };
                linear(&x, std::slice::from_ref(&(0..rows)), &[layer], lease.team());
                bits(&y)
            });
            assert_eq!(found, expected, "{rows} rows");
        }
    }
}

#[test]
fn a_gradient_has_the_bits_of_the_numbers() {
    for [coded, plain] in pairs() {
        let (inputs, outputs, rows, rank) = (coded.in_features(), coded.out_features(), 37, 3);
        let (a, b) = (noise(3, rank * inputs), noise(4, outputs * rank));
        let (x, dy, low) = (noise(2, rows * inputs), noise(5, rows * outputs), noise(6, rows * rank));
        let [found, expected] = [&coded, &plain].map(|weight| {
            let mut dx = vec![f32::NAN; rows * inputs];
            let (mut d_low, mut d_a, mut d_b) =
                (vec![0.0; rows * rank], vec![0.0; rank * inputs], vec![0.0; outputs * rank]);
            let adapted = Adapted {
                low_rank: LowRank { a: &a, b: &b, rank, scale: 2.0 },
                low: &low,
                d_low: Shared::new(&mut d_low),
                d_a: Shared::new(&mut d_a),
                d_b: Shared::new(&mut d_b),
            };
            let layers = [Gradients { weight, dy: &dy, adapted: Some(adapted) }];
            linear_backward(&x, rows, &layers, Some(Shared::new(&mut dx)), &Team::solo());
            [bits(&dx), bits(&d_a), bits(&d_b)]
        });
        assert_eq!(found, expected);
    }
}

/// Tiles of every height, on every path, against the definition.
#[test]
fn every_path_reads_codes_alike() {
    let (outputs, inputs) = (32, 96);
    for code_bits in ALL_BITS {
        let rows = rows(code_bits, outputs, inputs);
        let matrix = Matrix::from_blocks(outputs, inputs, &rows);
        for height in 1..=13 {
            let a = noise(1, height * inputs);
            let expected: Vec<f32> = (0..height * outputs)
                .map(|place| {
                    let (row, output) = (place / outputs, place % outputs);
                    let terms = (0..inputs).map(|i| (a[row * inputs + i], rows.value(output * inputs + i)));
                    terms.fold(0.0, |sum, (a, w)| a.mul_add(w, sum))
                })
                .collect();
            for path in Path::available() {
                let mut c = vec![f32::NAN; height * outputs];
                match matrix.panel(0) {
                    Panel::FourBits(blocks) => product(path, &a, blocks, &mut c),
                    Panel::FiveBits(blocks) => product(path, &a, blocks, &mut c),
                    Panel::SixBits(blocks) => product(path, &a, blocks, &mut c),
                    Panel::EightBits(blocks) => product(path, &a, blocks, &mut c),
                    Panel::F32(_) | Panel::Bf16(_) => unreachable!("made of blocks"),
                }
                assert_eq!(bits(&c), bits(&expected), "{path:?}, {height} rows");
            }
        }
    }
}

fn product<E: Element<Input = f32>>(path: Path, a: &[f32], b: &[E], c: &mut [f32]) {
    let depth = a.len() / (c.len() / 32);
    let product = Factors { a: a.as_ptr(), a_row: depth, a_step: 1, b: b.as_ptr(), b_step: 32, depth };
    let (rows, start) = (c.len() / 32, Start::Zero);
    run_on(path, Block { rows, columns: 32, product, second: None, c: c.as_mut_ptr(), c_row: 32, start });
}
