//! The gated activation `silu(gate) ∘ up`, with `silu(g) = g / (1 + e^-g)`, and plain sums.

use super::{
    Team,
    buffer::Shared,
    exp::exp,
    rows::for_rows,
    simd::{Kernel, LANES, Simd, run},
};

/// `y = silu(gate) ∘ up`, element by element.
pub(crate) fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32], team: &Team) {
    let y = Shared::new(y);
    for_rows(team, gate.len().div_ceil(LANES), LANES, |lines| {
        let values = lines.start * LANES..(lines.end * LANES).min(gate.len());
        // SAFETY: tasks have distinct values.
        let y = unsafe { y.part(values.clone()) };
        run(Forward { gate: &gate[values.clone()], up: &up[values], y });
    });
}

/// The gradients of `gate` and `up`, given that of `silu(gate) ∘ up`.
pub(crate) fn swiglu_backward(
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    d_gate: &mut [f32],
    d_up: &mut [f32],
    team: &Team,
) {
    let (d_gate, d_up) = (Shared::new(d_gate), Shared::new(d_up));
    for_rows(team, gate.len().div_ceil(LANES), LANES, |lines| {
        let values = lines.start * LANES..(lines.end * LANES).min(gate.len());
        // SAFETY: tasks have distinct values.
        let (d_gate, d_up) = unsafe { (d_gate.part(values.clone()), d_up.part(values.clone())) };
        run(Backward { gate: &gate[values.clone()], up: &up[values.clone()], dy: &dy[values], d_gate, d_up });
    });
}

/// `sum = a + b`, element by element.
pub(crate) fn add(a: &[f32], b: &[f32], sum: &mut [f32], team: &Team) {
    let sum = Shared::new(sum);
    for_rows(team, a.len().div_ceil(LANES), LANES, |lines| {
        let values = lines.start * LANES..(lines.end * LANES).min(a.len());
        // SAFETY: tasks have distinct values.
        let sum = unsafe { sum.part(values.clone()) };
        for ((sum, a), b) in sum.iter_mut().zip(&a[values.clone()]).zip(&b[values]) {
            *sum = a + b;
        }
    });
}

/// Adds `bias` to every row of `y`, `[rows, bias.len()]`.
pub(crate) fn add_bias(bias: &[f32], y: &mut [f32], team: &Team) {
    let width = bias.len();
    let rows = y.len() / width;
    let y = Shared::new(y);
    for_rows(team, rows, width, |rows| {
        // SAFETY: tasks have distinct rows.
        let y = unsafe { y.part(rows.start * width..rows.end * width) };
        for y in y.chunks_exact_mut(width) {
            y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
    });
}

struct Forward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let parts = self.gate.chunks(LANES).zip(self.up.chunks(LANES)).zip(self.y.chunks_mut(LANES));
        for ((gate, up), y) in parts {
            let gate = s.read_some(gate, 0.0);
            let silu = s.mul(gate, sigmoid(s, gate));
            s.write_some(y, s.mul(silu, s.read_some(up, 0.0)));
        }
    }
}

struct Backward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    dy: &'a [f32],
    d_gate: &'a mut [f32],
    d_up: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inputs = self.gate.chunks(LANES).zip(self.up.chunks(LANES)).zip(self.dy.chunks(LANES));
        let outputs = self.d_gate.chunks_mut(LANES).zip(self.d_up.chunks_mut(LANES));
        for (((gate, up), dy), (d_gate, d_up)) in inputs.zip(outputs) {
            let (gate, dy) = (s.read_some(gate, 0.0), s.read_some(dy, 0.0));
            let sigmoid = sigmoid(s, gate);
            let silu = s.mul(gate, sigmoid);
            // silu' = σ + g σ (1 - σ) = σ + silu · (1 - σ)
            let slope = s.fma(silu, s.sub(s.splat(1.0), sigmoid), sigmoid);
            s.write_some(d_gate, s.mul(s.mul(dy, s.read_some(up, 0.0)), slope));
            s.write_some(d_up, s.mul(dy, silu));
        }
    }
}

/// `1 / (1 + e^-x)`
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}
