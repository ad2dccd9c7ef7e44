//! Gradients against central differences.
//!
//! With a step of 2⁻⁶ a central difference of these functions is off by h²/6 of the third
//! derivative, some 1e-4, and by the rounding of f32 divided by h, some 1e-5. A wrong term in a
//! formula is worth 1e-2 and more.

use crate::kernels::{
    Adapted, AttentionGradients, Buffer, Gradients, Heads, KvBlocks, Layer, LowRank, Matrix, RotaryTable,
    Router, Shared, Span, Team, Turn, append, attention, attention_backward, linear, linear_backward,
    log_sum_exp, rms_norm, rms_norm_backward, softmax_gradient, swiglu, swiglu_backward,
};

use super::noise;

const STEP: f32 = 1.0 / 64.0;
const TOLERANCE: f64 = 1e-3;

/// Compares `gradient` to central differences of `f` at `x`, in the Frobenius norm.
fn assert_gradient(what: &str, x: &[f32], gradient: &[f32], f: impl Fn(&[f32]) -> f64) {
    assert_eq!(x.len(), gradient.len());
    let (mut off, mut norm) = (0.0, 0.0);
    for (i, gradient) in gradient.iter().enumerate() {
        let at = |step: f32| {
            let mut x = x.to_vec();
            x[i] += step;
            (f64::from(x[i]), f(&x))
        };
        let ((above, f_above), (below, f_below)) = (at(STEP), at(-STEP));
        let difference = (f_above - f_below) / (above - below);
        off += (difference - f64::from(*gradient)).powi(2);
        norm += difference * difference;
    }
    let distance = (off / norm).sqrt();
    assert!(distance < TOLERANCE, "{what}: {distance:e} off");
}

/// A function's result made a number: its product with fixed noise.
fn weighted(y: &[f32]) -> f64 {
    y.iter().zip(noise(77, y.len())).map(|(y, c)| f64::from(*y) * f64::from(c)).sum()
}

#[test]
fn rms_norm_has_its_gradient() {
    let (width, eps) = (21, 1e-3);
    let (x, weight) = (noise(1, 3 * width), noise(2, width));
    let value = |x: &[f32]| {
        let mut y = vec![0.0; x.len()];
        rms_norm(x, &weight, eps, &mut y, &Team::solo());
        weighted(&y)
    };
    let mut dx = noise(3, x.len());
    rms_norm_backward(&x, &weight, eps, &noise(77, x.len()), &mut dx, &Team::solo());
    dx.iter_mut().zip(noise(3, x.len())).for_each(|(dx, before)| *dx -= before);
    assert_gradient("x", &x, &dx, value);
}

#[test]
fn swiglu_has_its_gradients() {
    let (gate, up) = (noise(1, 37), noise(2, 37));
    let value = |gate: &[f32], up: &[f32]| {
        let mut y = vec![0.0; gate.len()];
        swiglu(gate, up, &mut y, &Team::solo());
        weighted(&y)
    };
    let (mut d_gate, mut d_up) = (vec![0.0; 37], vec![0.0; 37]);
    swiglu_backward(&gate, &up, &noise(77, 37), &mut d_gate, &mut d_up, &Team::solo());
    assert_gradient("gate", &gate, &d_gate, |gate| value(gate, &up));
    assert_gradient("up", &up, &d_up, |up| value(&gate, up));
}

#[test]
fn turning_back_is_the_gradient_of_turning() {
    let (dim, heads, positions) = (10, 2, [0, 3, 11]);
    let mut table = RotaryTable::default();
    table.prepare(&[1.0, 0.4, 0.16, 0.06, 0.03], 12);
    let x = noise(1, positions.len() * heads * dim);
    let turned = |x: &[f32], turn| {
        let mut x = x.to_vec();
        table.turn(&mut x, &positions, turn, &Team::solo());
        x
    };
    let dx = turned(&noise(77, x.len()), Turn::Back);
    assert_gradient("x", &x, &dx, |x| weighted(&turned(x, Turn::Forward)));
}

#[test]
fn log_sum_exp_has_its_gradient() {
    let logits = noise(1, 53);
    let mut gradient = logits.clone();
    softmax_gradient(&mut gradient, log_sum_exp(&logits), -3.0);
    assert_gradient("logits", &logits, &gradient, |logits| -3.0 * f64::from(log_sum_exp(logits)));
}

#[test]
fn a_routers_weights_have_their_gradient() {
    let logits = noise(1, 3 * 7);
    for normalises in [true, false] {
        let router = Router { experts: 7, per_row: 3, normalises };
        let choose = |logits: &[f32]| {
            let (mut scores, mut chosen, mut weights) = (logits.to_vec(), vec![0; 9], vec![0.0; 9]);
            router.choose(&mut scores, &mut chosen, &mut weights, &Team::solo());
            (scores, chosen, weights)
        };
        let (probabilities, chosen, weights) = choose(&logits);
        let mut d_logits = vec![f32::NAN; logits.len()];
        router.backward(&probabilities, &chosen, &weights, &noise(77, 9), &mut d_logits);
        // The weights of the experts chosen at `logits`: a step that made a row choose others
        // would meet a jump, which no gradient knows.
        assert_gradient("logits", &logits, &d_logits, |logits| {
            let (_, now, weights) = choose(logits);
            assert_eq!(now, chosen);
            weighted(&weights)
        });
    }
}

#[test]
fn a_router_takes_the_likeliest_and_of_equals_the_first() {
    let logits = [0.0, 3.0, 1.0, 3.0, 2.0, /* */ 1.0, 1.0, 1.0, 1.0, 1.0];
    let router = Router { experts: 5, per_row: 3, normalises: true };
    let (mut scores, mut chosen, mut weights) = (logits.to_vec(), [0; 6], [0.0; 6]);
    router.choose(&mut scores, &mut chosen, &mut weights, &Team::solo());
    assert_eq!(chosen, [1, 3, 4, 0, 1, 2]);
    let sum = 2.0 * 1f32.exp() + 1.0;
    let expected = [1f32.exp() / sum, 1f32.exp() / sum, 1.0 / sum];
    for (weight, expected) in weights.iter().zip(expected.into_iter().chain([1.0 / 3.0; 3])) {
        // A few roundings to 6e-8.
        assert!((weight - expected).abs() < 5e-7, "{weight} and {expected}");
    }
}

/// Two layers that read one input, both adapted.
struct Pair {
    weights: [Matrix; 2],
    rank: usize,
    rows: usize,
    inputs: usize,
}

impl Pair {
    const OUTPUTS: [usize; 2] = [35, 6];

    fn forward(&self, x: &[f32], adapters: [(&[f32], &[f32]); 2]) -> (f64, [Vec<f32>; 2]) {
        let mut ys = Self::OUTPUTS.map(|outputs| vec![0.0; self.rows * outputs]);
        let mut lows = [(); 2].map(|()| vec![0.0; self.rows * self.rank]);
        let parts = self.weights.iter().zip(adapters).zip(ys.iter_mut().zip(&mut lows));
        let layers: Vec<_> = parts
            .map(|((weight, (a, b)), (y, low))| Layer {
                weight,
                low_rank: move |_| Some(LowRank { a, b, rank: self.rank, scale: 1.5 }),
                low: Shared::new(low),
                low_row: self.rank,
                y: Shared::new(y),
            })
            .collect();
        linear(x, std::slice::from_ref(&(0..self.rows)), &layers, &Team::solo());
        drop(layers);
        (ys.iter().map(|y| weighted(y)).sum(), lows)
    }
}

#[test]
fn linear_layers_have_their_gradients() {
    let sizes = [(3, 5, 37), (16, 14, 48), (34, 3, 16)];
    // Where inputs are rounded a step of a finite difference goes through jumps; `products` has their definition.
    for ((rank, rows, inputs), as_bf16) in sizes.into_iter().flat_map(|size| [(size, false), (size, true)]) {
        let matrix = |seed, outputs| {
            let weights = noise(seed, outputs * inputs);
            match as_bf16 {
                false => Matrix::from_rows(outputs, inputs, &weights),
                true => Matrix::from_bf16(outputs, inputs, &weights),
            }
        };
        let pair = Pair { weights: [matrix(1, 35), matrix(2, 6)], rank, rows, inputs };
        let x = noise(3, rows * pair.inputs);
        let a = [4, 5].map(|seed| noise(seed, rank * inputs));
        let b = [0, 1].map(|i| noise(6 + i as u64, Pair::OUTPUTS[i] * rank));
        let (_, lows) = pair.forward(&x, [(&a[0], &b[0]), (&a[1], &b[1])]);

        let dys = Pair::OUTPUTS.map(|outputs| noise(77, rows * outputs));
        let mut dx = vec![f32::NAN; x.len()];
        let mut d_lows = lows.clone();
        let (mut d_a, mut d_b) =
            (a.clone().map(|a| vec![0.0; a.len()]), b.clone().map(|b| vec![0.0; b.len()]));
        let mut layers = Vec::new();
        let targets = d_lows.iter_mut().zip(d_a.iter_mut().zip(&mut d_b));
        for (i, (d_low, (d_a, d_b))) in targets.enumerate() {
            let adapted = Adapted {
                low_rank: LowRank { a: &a[i], b: &b[i], rank, scale: 1.5 },
                low: &lows[i],
                d_low: Shared::new(d_low),
                d_a: Shared::new(d_a),
                d_b: Shared::new(d_b),
            };
            layers.push(Gradients { weight: &pair.weights[i], dy: &dys[i], adapted: Some(adapted) });
        }
        linear_backward(&x, rows, &layers, Some(Shared::new(&mut dx)), &Team::solo());
        drop(layers);

        let value = |x: &[f32], a0: &[f32], b1: &[f32]| pair.forward(x, [(a0, &b[0]), (&a[1], b1)]).0;
        assert_gradient("x", &x, &dx, |x| value(x, &a[0], &b[1]));
        assert_gradient("A", &a[0], &d_a[0], |a0| value(&x, a0, &b[1]));
        assert_gradient("B", &b[1], &d_b[1], |b1| value(&x, &a[0], b1));
    }
}

const HEADS: Heads = Heads { queries: 4, keys: 2, dim: 6 };

/// One sequence shorter than a block, one longer.
const SPANS: [Span; 2] = [Span { first: 0, rows: 3, start: 0 }, Span { first: 3, rows: 37, start: 0 }];
const ROWS: usize = 40;

/// Attention's result and log-sum-exps.
fn attend(q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let mut memory = [1, 2].map(|blocks| vec![Buffer::zeroed(HEADS.block_len(1)); blocks]);
    let blocks: Vec<KvBlocks<'_>> = memory
        .iter_mut()
        .map(|blocks| KvBlocks { blocks: blocks.iter_mut().map(|b| Shared::new(b)).collect(), layers: 1 })
        .collect();
    append(HEADS, 0, &SPANS, k, v, &blocks, &Team::solo());
    let (mut out, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; ROWS * HEADS.queries]);
    attention(HEADS, 0, &SPANS, q, &blocks, &mut out, Some(&mut lse), &Team::solo());
    (out, lse)
}

/// Gradients of q, k and v.
fn attend_back(q: &[f32], k: &[f32], v: &[f32], d_out: &[f32]) -> [Vec<f32>; 3] {
    let (out, lse) = attend(q, k, v);
    let [mut dq, mut dk_shares, mut dv_shares] = [(); 3].map(|()| vec![f32::NAN; q.len()]);
    let [mut dk, mut dv] = [(); 2].map(|()| vec![f32::NAN; k.len()]);
    let grads = AttentionGradients {
        q,
        k,
        v,
        out: &out,
        d_out,
        lse: &lse,
        dq: &mut dq,
        dk_shares: &mut dk_shares,
        dv_shares: &mut dv_shares,
        dk: &mut dk,
        dv: &mut dv,
    };
    attention_backward(HEADS, &SPANS, grads, &Team::solo());
    [dq, dk, dv]
}

#[test]
fn attention_has_its_gradients() {
    let (wide, narrow) = (ROWS * HEADS.queries * HEADS.dim, ROWS * HEADS.keys * HEADS.dim);
    let (q, k, v) = (noise(1, wide), noise(2, narrow), noise(3, narrow));
    let [dq, dk, dv] = attend_back(&q, &k, &v, &noise(77, wide));
    let value = |q: &[f32], k: &[f32], v: &[f32]| weighted(&attend(q, k, v).0);
    assert_gradient("q", &q, &dq, |q| value(q, &k, &v));
    assert_gradient("k", &k, &dk, |k| value(&q, k, &v));
    assert_gradient("v", &v, &dv, |v| value(&q, &k, v));
}

#[test]
fn attention_is_softmax_over_the_past() {
    let (wide, narrow) = (ROWS * HEADS.queries * HEADS.dim, ROWS * HEADS.keys * HEADS.dim);
    // Scores of some tens, so that maxima move and most weights vanish.
    let q: Vec<f32> = noise(1, wide).iter().map(|q| 40.0 * q).collect();
    let (k, v) = (noise(2, narrow), noise(3, narrow));
    let (out, lse) = attend(&q, &k, &v);
    let key = |row: usize, head: usize| (row * HEADS.keys + head / 2) * HEADS.dim;
    for span in SPANS {
        for row in 0..span.rows {
            for head in 0..HEADS.queries {
                let at = (span.first + row) * HEADS.queries + head;
                let q = &q[at * HEADS.dim..][..HEADS.dim];
                let dot = |key: &[f32]| -> f64 {
                    q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
                };
                let scores: Vec<f64> = (0..=row)
                    .map(|past| dot(&k[key(span.first + past, head)..]) / (HEADS.dim as f64).sqrt())
                    .collect();
                let total: f64 = scores.iter().map(|score| score.exp()).sum();
                // Scores of 40 are known to 40 · 6e-8, which their exponentials inherit.
                assert!((f64::from(lse[at]) - total.ln()).abs() < 1e-5);
                for i in 0..HEADS.dim {
                    let value = |past: usize| f64::from(v[key(span.first + past, head) + i]);
                    let expected: f64 =
                        scores.iter().enumerate().map(|(past, s)| s.exp() / total * value(past)).sum();
                    let off = (f64::from(out[at * HEADS.dim + i]) - expected).abs();
                    assert!(off < 1e-5, "row {row} head {head}: {off:e} off");
                }
            }
        }
    }
}

#[test]
fn attention_never_looks_ahead() {
    let (wide, narrow) = (ROWS * HEADS.queries * HEADS.dim, ROWS * HEADS.keys * HEADS.dim);
    let (q, mut k, mut v) = (noise(1, wide), noise(2, narrow), noise(3, narrow));
    let before = attend(&q, &k, &v).0;
    // From row 20 on: within a block that earlier rows attend to.
    let later = 20 * HEADS.keys * HEADS.dim;
    k[later..].fill(f32::NAN);
    v[later..].fill(f32::INFINITY);
    let seen = 20 * HEADS.queries * HEADS.dim;
    assert_eq!(super::bits(&attend(&q, &k, &v).0[..seen]), super::bits(&before[..seen]));
}

#[test]
fn attentions_gradients_never_look_ahead() {
    let (wide, narrow) = (ROWS * HEADS.queries * HEADS.dim, ROWS * HEADS.keys * HEADS.dim);
    let (mut q, mut k, mut v) = (noise(1, wide), noise(2, narrow), noise(3, narrow));
    let mut d_out = noise(77, wide);
    let before = attend_back(&q, &k, &v, &d_out);
    // Row 20 stands within a block that earlier rows attend to.
    let (row_q, row_k) = (20 * HEADS.queries * HEADS.dim, 20 * HEADS.keys * HEADS.dim);
    for infinite in [f32::INFINITY, f32::NAN] {
        let (mut k, mut v) = (k.clone(), v.clone());
        k[row_k..].fill(infinite);
        v[row_k..].fill(infinite);
        let [dq, ..] = attend_back(&q, &k, &v, &d_out);
        assert_eq!(super::bits(&dq[..row_q]), super::bits(&before[0][..row_q]));
    }
    // Nor does a key see the queries before it.
    let first = SPANS[1].first;
    let (start_q, start_k) = (first * HEADS.queries * HEADS.dim, first * HEADS.keys * HEADS.dim);
    q[start_q..row_q].fill(f32::INFINITY);
    d_out[start_q..row_q].fill(f32::NAN);
    let [_, dk, dv] = attend_back(&q, &k, &v, &d_out);
    assert_eq!(super::bits(&dk[row_k..]), super::bits(&before[1][row_k..]));
    assert_eq!(super::bits(&dv[row_k..]), super::bits(&before[2][row_k..]));
    // All of that matters where it is seen.
    k[start_k..].fill(f32::INFINITY);
    v[start_k..].fill(f32::INFINITY);
    assert!(attend_back(&q, &k, &v, &d_out)[0][row_q..].iter().any(|value| value.is_nan()));
}
