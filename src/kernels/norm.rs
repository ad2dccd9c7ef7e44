//! Root-mean-square norm: `y = x · w / sqrt(mean(x²) + eps)`, row by row.

use super::{
    Team,
    buffer::Shared,
    rows::for_rows,
    simd::{Kernel, LANES, Simd, run},
};

/// `y` of every row of `x`; both `[rows, weight.len()]`.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], team: &Team) {
    let width = weight.len();
    let y = Shared::new(y);
    for_rows(team, x.len() / width, width, |rows| {
        let values = rows.start * width..rows.end * width;
        // SAFETY: tasks have distinct rows.
        let y = unsafe { y.part(values.clone()) };
        run(Forward { x: &x[values], weight, eps, y });
    });
}

/// Adds to `dx` the gradient of a norm whose output has the gradient `dy`.
///
/// With `i = 1 / sqrt(mean(x²) + eps)`: `dx += i·(w∘dy) − x · i³ · mean(x∘w∘dy)`.
pub(crate) fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    team: &Team,
) {
    let width = weight.len();
    let dx = Shared::new(dx);
    for_rows(team, x.len() / width, width, |rows| {
        let values = rows.start * width..rows.end * width;
        // SAFETY: tasks have distinct rows.
        let dx = unsafe { dx.part(values.clone()) };
        run(Backward { x: &x[values.clone()], weight, eps, dy: &dy[values], dx });
    });
}

struct Forward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.weight.len();
        for (x, y) in self.x.chunks_exact(width).zip(self.y.chunks_exact_mut(width)) {
            let inverse = s.splat(inverse_rms(s, x, self.eps));
            let parts = x.chunks(LANES).zip(self.weight.chunks(LANES)).zip(y.chunks_mut(LANES));
            for ((x, weight), y) in parts {
                let normed = s.mul(s.read_some(x, 0.0), inverse);
                s.write_some(y, s.mul(normed, s.read_some(weight, 0.0)));
            }
        }
    }
}

struct Backward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    dy: &'a [f32],
    dx: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.weight.len();
        let rows = self.x.chunks_exact(width).zip(self.dy.chunks_exact(width));
        for ((x, dy), dx) in rows.zip(self.dx.chunks_exact_mut(width)) {
            let inverse = inverse_rms(s, x, self.eps);
            let mut dot = s.splat(0.0);
            for ((x, weight), dy) in x.chunks(LANES).zip(self.weight.chunks(LANES)).zip(dy.chunks(LANES)) {
                let weighted = s.mul(s.read_some(weight, 0.0), s.read_some(dy, 0.0));
                dot = s.fma(s.read_some(x, 0.0), weighted, dot);
            }
            let along = s.splat(-s.sum(dot) * inverse * inverse * inverse / width as f32);
            let inverse = s.splat(inverse);
            let parts = x.chunks(LANES).zip(self.weight.chunks(LANES)).zip(dy.chunks(LANES));
            for (((x, weight), dy), dx) in parts.zip(dx.chunks_mut(LANES)) {
                let weighted = s.mul(s.read_some(weight, 0.0), s.read_some(dy, 0.0));
                let sum = s.fma(weighted, inverse, s.read_some(dx, 0.0));
                s.write_some(dx, s.fma(s.read_some(x, 0.0), along, sum));
            }
        }
    }
}

#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut squares = s.splat(0.0);
    for x in x.chunks(LANES) {
        let x = s.read_some(x, 0.0);
        squares = s.fma(x, x, squares);
    }
    1.0 / (s.sum(squares) / x.len() as f32 + eps).sqrt()
}
