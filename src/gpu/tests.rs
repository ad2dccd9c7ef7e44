//! The kernels, emulated, against the same mathematics in f64.

use half::bf16;

use super::{
    kernels::{EMULATION, KERNELS},
    ops::CHUNK,
    *,
};

fn gpu() -> Gpu {
    Gpu::emulated().expect("g++ compiles the kernels")
}

/// A number in ±1 that looks random.
fn noise(seed: u64, i: usize) -> f32 {
    let mut z = (seed << 32 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

fn values(seed: u64, len: usize) -> Vec<f32> {
    (0..len).map(|i| noise(seed, i)).collect()
}

/// `‖a − b‖ / ‖b‖`
fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    (difference / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

/// A few hundred roundings of 6e-8 in a sum, of random sign.
const TOLERANCE: f64 = 2e-6;

#[test]
fn numbers_are_rounded_to_bf16_as_the_cpu_rounds_them() {
    let mut numbers = values(1, 1000);
    let odd = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-40];
    numbers.extend(odd);
    numbers.extend([0x3f80_8000, 0x3f81_8000, 0x3f80_8001].map(f32::from_bits));
    let gpu = gpu();
    let on_gpu = gpu.upload(Element::F32, &numbers).unwrap();
    let rounded = gpu.download(&gpu.rounded(&on_gpu, Element::Bf16).unwrap()).unwrap();
    for (number, rounded) in numbers.iter().zip(rounded) {
        assert_eq!(bf16::from_f32(*number).to_f32().to_bits(), rounded.to_bits(), "{number:e}");
    }
    let nan = gpu.upload(Element::F32, &[f32::NAN]).unwrap();
    assert!(gpu.download(&gpu.rounded(&nan, Element::Bf16).unwrap()).unwrap()[0].is_nan());
}

#[test]
fn products_take_factors_either_way_and_add_to_what_is_there() {
    let gpu = gpu();
    for (m, n, k) in [(3, 5, 7), (1, 4, 6), (4, 1, 6), (5, 6, 1), (1, 1, 1), (2, 3, 0)] {
        for (at, bt) in [(false, false), (false, true), (true, false), (true, true)] {
            let (a, b, c) = (values(1, m * k), values(2, k * n), values(3, m * n));
            let expected: Vec<f64> = (0..m * n)
                .map(|i| {
                    let (row, column) = (i / n, i % n);
                    let sum: f64 = (0..k)
                        .map(|l| {
                            let a = a[if at { l * m + row } else { row * k + l }];
                            let b = b[if bt { column * k + l } else { l * n + column }];
                            f64::from(a) * f64::from(b)
                        })
                        .sum();
                    0.5 * sum + 2.0 * f64::from(c[i])
                })
                .collect();
            let [a, b, c] = [a, b, c].map(|values| gpu.upload(Element::F32, &values).unwrap());
            let factor = |array, is_transposed| match is_transposed {
                true => Factor::Transposed(array),
                false => Factor::Plain(array),
            };
            let (left, right) = (factor(&a, at), factor(&b, bt));
            gpu.product(Product { left, right, alpha: 0.5, beta: 2.0, result: &c, m, n, k }).unwrap();
            assert!(distance(&gpu.download(&c).unwrap(), &expected) < TOLERANCE, "{m} {n} {k} {at} {bt}");
        }
    }
}

#[test]
#[should_panic(expected = "lengths of a product")]
fn a_product_of_other_lengths_is_a_defect() {
    let gpu = gpu();
    let a = gpu.zeros(Element::F32, 6).unwrap();
    let (left, right) = (Factor::Plain(&a), Factor::Plain(&a));
    let _ = gpu.product(Product { left, right, alpha: 1.0, beta: 0.0, result: &a, m: 2, n: 3, k: 2 });
}

/// Causal attention of one sequence and its gradients, in f64, head by head.
struct Reference {
    out: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

fn reference(heads: HeadShape, rows: usize, [q, k, v, d_out]: [&[f32]; 4]) -> Reference {
    let HeadShape { group, keys, dim } = heads;
    let wide = |values: &[f32], row: usize, heads: usize, head: usize| -> Vec<f64> {
        values[(row * heads + head) * dim..][..dim].iter().map(|value| f64::from(*value)).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut whole = Reference {
        out: vec![0.0; q.len()],
        dq: vec![0.0; q.len()],
        dk: vec![0.0; k.len()],
        dv: vec![0.0; v.len()],
    };
    let scale = 1.0 / (dim as f64).sqrt();
    for head in 0..group * keys {
        for row in 0..rows {
            let (query, d) = (wide(q, row, group * keys, head), wide(d_out, row, group * keys, head));
            let key = |at: usize| wide(k, at, keys, head / group);
            let value = |at: usize| wide(v, at, keys, head / group);
            let exps: Vec<f64> = (0..=row).map(|at| (scale * dot(&query, &key(at))).exp()).collect();
            let total: f64 = exps.iter().sum();
            let weights: Vec<f64> = exps.iter().map(|exp| exp / total).collect();
            let d_weights: Vec<f64> = (0..=row).map(|at| dot(&d, &value(at))).collect();
            let mean = dot(&weights, &d_weights);
            for at in 0..=row {
                let d_score = scale * weights[at] * (d_weights[at] - mean);
                let (key, value) = (key(at), value(at));
                for i in 0..dim {
                    let of_query = (row * group * keys + head) * dim + i;
                    let of_key = (at * keys + head / group) * dim + i;
                    whole.out[of_query] += weights[at] * value[i];
                    whole.dq[of_query] += d_score * key[i];
                    whole.dk[of_key] += d_score * query[i];
                    whole.dv[of_key] += weights[at] * d[i];
                }
            }
        }
    }
    whole
}

/// One sequence of these rows, which has no past; its keys and values are the batch's own.
fn spans(gpu: &Gpu, heads: HeadShape, rows: usize) -> Spans {
    let tiles = |positions: usize| {
        let offsets: Vec<u32> = (0..rows as u32).step_by(positions).collect();
        [gpu.upload_u32(&vec![0; offsets.len()]).unwrap(), gpu.upload_u32(&offsets).unwrap()]
    };
    Spans {
        first_row: gpu.upload_u32(&[0]).unwrap(),
        rows: gpu.upload_u32(&[rows as u32]).unwrap(),
        start: gpu.upload_u32(&[0]).unwrap(),
        forward: tiles(FORWARD_ROWS / heads.group),
        backward: tiles(BACKWARD_ROWS / heads.group),
        keys: tiles(BACKWARD_KEYS),
    }
}

#[test]
fn attention_and_its_gradients_are_right_for_every_shape_of_heads() {
    let gpu = gpu();
    for (group, keys, dim, rows) in
        [(1, 2, 8, 70), (3, 1, 12, 37), (16, 1, 64, 19), (4, 2, 128, 67), (8, 1, 80, 33), (2, 3, 2, 1)]
    {
        let heads = HeadShape { group, keys, dim };
        let (len_q, len_k) = (rows * group * keys * dim, rows * keys * dim);
        // Scores of some size, so that the softmax is not flat.
        let q: Vec<f32> = values(1, len_q).iter().map(|q| 4.0 * q).collect();
        let (k, v, d_out) = (values(2, len_k), values(3, len_k), values(4, len_q));
        let expected = reference(heads, rows, [&q, &k, &v, &d_out]);
        let [q, k, v, d_out] = [q, k, v, d_out].map(|values| gpu.upload(Element::F32, &values).unwrap());
        let offsets: Vec<u64> =
            (0..rows.div_ceil(PAGE)).map(|page| (page * PAGE * keys * dim) as u64).collect();
        let (mut lists, per_sequence) = (Lists::default(), offsets.len());
        let table = lists.u64s(offsets);
        let table = gpu.upload_lists(&lists).unwrap().list(table);
        let pages = Pages { keys: k.address(), values: v.address(), table, per_sequence };
        let spans = spans(&gpu, heads, rows);
        let [out, lse] = gpu.attention(heads, &spans, &pages, &q).unwrap();
        let gradients = [len_q, len_k, len_k].map(|len| gpu.array(Element::F32, len).unwrap());
        let [dq, dk, dv] = &gradients;
        let operands = AttentionBackward { q: &q, out: &out, d_out: &d_out, lse: &lse, dq, dk, dv };
        gpu.attention_backward(heads, &spans, &pages, operands).unwrap();
        let Reference { out: ref_out, dq: ref_dq, dk: ref_dk, dv: ref_dv } = expected;
        let found = [("out", &out, ref_out), ("dq", dq, ref_dq), ("dk", dk, ref_dk), ("dv", dv, ref_dv)];
        for (what, found, expected) in found {
            // A lone position attends to itself: its scores have no gradient.
            if expected.iter().all(|value| value.abs() < 1e-12) {
                assert!(gpu.download(found).unwrap().iter().all(|value| value.abs() < 1e-6));
                continue;
            }
            let off = distance(&gpu.download(found).unwrap(), &expected);
            assert!(off < TOLERANCE, "{what} of {heads:?}, {rows} rows: {off:e} off");
        }
    }
}

#[test]
fn targets_of_one_row_share_its_gradient() {
    let (gpu, vocab) = (gpu(), 300);
    let logits = values(1, 3 * vocab);
    let on_gpu = gpu.upload(Element::F32, &logits).unwrap();
    let RowStatistics { lse, .. } = gpu.row_statistics(&on_gpu, vocab).unwrap();
    // Row 2 has three targets, two of them one token; row 0 has one.
    let (rows, tokens, factors) = ([2u32, 0], [7u32, 299, 7, 0], [0.5f32, -1.0, 0.25, 2.0]);
    let targets = TargetRows {
        rows: &gpu.upload_u32(&rows).unwrap(),
        first_target: &gpu.upload_u32(&[0, 3, 4]).unwrap(),
        tokens: &gpu.upload_u32(&tokens).unwrap(),
        factors: &gpu.upload(Element::F32, &factors).unwrap(),
    };
    let found = gpu.logits_gradient(&on_gpu, &lse, targets, vocab, Element::F32).unwrap();
    let expected = rows.iter().zip([0..3, 3..4]).flat_map(|(row, targets)| {
        let row = &logits[*row as usize * vocab..][..vocab];
        let exps: Vec<f64> = row.iter().map(|logit| f64::from(*logit).exp()).collect();
        let (sum, total) =
            (exps.iter().sum::<f64>(), targets.clone().map(|t| f64::from(factors[t])).sum::<f64>());
        let of_token = move |token: usize| {
            let own = targets.clone().filter(|t| tokens[*t] as usize == token);
            own.map(|t| f64::from(factors[t])).sum::<f64>()
        };
        let d: Vec<f64> =
            exps.iter().enumerate().map(|(token, exp)| of_token(token) - total * exp / sum).collect();
        d
    });
    let off = distance(&gpu.download(&found).unwrap(), &expected.collect::<Vec<_>>());
    assert!(off < TOLERANCE, "{off:e}");
}

#[test]
fn devices_are_read_as_they_are_written() {
    for name in ["cpu", "cuda:0", "cuda:7", "auto", "emulated"] {
        assert_eq!(name.parse::<DeviceChoice>().unwrap().to_string(), name);
    }
    assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
    for wrong in ["gpu", "cuda:", "cuda:x", "cuda:-1"] {
        let error = wrong.parse::<DeviceChoice>().unwrap_err();
        assert_eq!(error, "a device is cpu, cuda, cuda:N, auto or emulated");
    }
}

/// What NVRTC is given must hold each kernel that Rust and the emulation name.
#[test]
fn every_kernel_is_emulated() {
    let (kernels, emulated) = (KERNELS, EMULATION[1]);
    let names = |text: &'static str, before: &'static str, end: char| {
        let parts = text.split(before).skip(1).filter_map(move |rest| rest.split(end).next());
        let mut names: Vec<&str> = parts.filter(|name| !name.contains("NAME")).collect();
        names.sort();
        names
    };
    let both: Vec<&str> = {
        let parts =
            kernels.split("__global__ void ").skip(1).filter_map(|rest| rest.split("_##NAME(").next());
        let mut names: Vec<&str> = parts.filter(|name| !name.contains('(')).collect();
        names.sort();
        names
    };
    assert!(both.len() > 15);
    assert_eq!(names(emulated, "EMULATE_BOTH(", ')'), both);
    let of_one_type = names(kernels, "__global__ void ", '(');
    assert!(of_one_type.len() > 5);
    assert_eq!(names(emulated, "EMULATE(", ')'), of_one_type);
    assert!(kernels.contains(&format!("#define CHUNK {CHUNK}\n")), "both sides cut rows of logits alike");
}

/// Statistics of rows of one chunk, of a whole number of chunks and of a little more, against f64; also of a row whose
/// values are large, and of one that has a chunk of nothing but −∞.
#[test]
fn rows_have_the_statistics_of_their_chunks() {
    let gpu = gpu();
    for vocab in [1, 300, 4096, 4097, 12_300] {
        let mut rows = [values(1, vocab), values(2, vocab), values(3, vocab)];
        rows[1].iter_mut().for_each(|x| *x = 500.0 + 80.0 * *x);
        if vocab > 4096 {
            rows[2][..4096].fill(f32::NEG_INFINITY);
        }
        let logits = gpu.upload(Element::F32, &rows.concat()).unwrap();
        let RowStatistics { largest, lse } = gpu.row_statistics(&logits, vocab).unwrap();
        let entropies = gpu.download(&gpu.row_entropies(&logits, &lse, vocab).unwrap()).unwrap();
        let (largest, lse) = (gpu.download(&largest).unwrap(), gpu.download(&lse).unwrap());
        for (row, rows_v) in rows.iter().enumerate() {
            let most = rows_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(largest[row], most, "{vocab}, row {row}");
            let total: f64 = rows_v.iter().map(|x| (f64::from(*x) - f64::from(most)).exp()).sum();
            let expected = f64::from(most) + total.ln();
            let off = (f64::from(lse[row]) - expected).abs() / expected.abs().max(1.0);
            assert!(off < TOLERANCE, "{vocab}, row {row}: the log-sum-exp is {off:e} off");
            let shares = rows_v.iter().map(|x| f64::from(*x) - expected).filter(|share| share.is_finite());
            let entropy: f64 = shares.map(|share| -share.exp() * share).sum();
            let off = (f64::from(entropies[row]) - entropy).abs() / entropy.max(1.0);
            // The log-sum-exp of row 1 is rounded to 3e-5.
            assert!(off < 1e-4, "{vocab}, row {row}: the entropy is {off:e} off");
        }
    }
}
