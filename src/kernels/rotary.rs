//! Rotary position embedding, with halves split as in Hugging Face's Llama.
//!
//! In a head of width d, the pair (x[i], x[i + d/2]) at position p turns by the angle
//! `p · frequency[i]`.

use super::{
    Team,
    buffer::Shared,
    rows::for_rows,
    simd::{Kernel, LANES, Simd, run},
};

/// Sines and cosines of the positions seen so far.
#[derive(Default)]
pub(crate) struct RotaryTable {
    /// Radians a position, `[head_dim / 2]`.
    frequencies: Vec<f32>,
    /// `[positions, head_dim / 2]`
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Which way to turn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// As the forward does.
    Forward,
    /// Back: the inverse of a rotation is its transpose, so a gradient takes this way.
    Back,
}

impl RotaryTable {
    /// Makes the table hold `positions` positions of a head that turns with these frequencies.
    ///
    /// Angles are rounded to f32 as the models' own training code does.
    pub(crate) fn prepare(&mut self, frequencies: &[f32], positions: usize) {
        if frequencies != self.frequencies {
            *self = Self { frequencies: frequencies.to_vec(), ..Self::default() };
        }
        for position in self.cos.len() / frequencies.len().max(1)..positions {
            for frequency in frequencies {
                let angle = f64::from(position as f32 * frequency);
                self.cos.push(angle.cos() as f32);
                self.sin.push(angle.sin() as f32);
            }
        }
    }

    /// Turns every head of every row of `x`, `[positions.len(), heads * head_dim]`, in place.
    pub(crate) fn turn(&self, x: &mut [f32], positions: &[usize], turn: Turn, team: &Team) {
        let row_len = x.len() / positions.len().max(1);
        let x = Shared::new(x);
        for_rows(team, positions.len(), row_len, |rows| {
            // SAFETY: tasks have distinct rows.
            let x = unsafe { x.part(rows.start * row_len..rows.end * row_len) };
            run(TurnRows { table: self, x, row_len, positions: &positions[rows], turn });
        });
    }
}

#[cfg(test)]
impl RotaryTable {
    /// Bytes of the sines and cosines that it holds.
    pub(crate) fn allocated(&self) -> usize {
        (self.cos.len() + self.sin.len()) * size_of::<f32>()
    }
}

struct TurnRows<'a> {
    table: &'a RotaryTable,
    x: &'a mut [f32],
    row_len: usize,
    positions: &'a [usize],
    turn: Turn,
}

impl Kernel for TurnRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { table, x, row_len, positions, turn } = self;
        let half = table.frequencies.len();
        let sign = s.splat(if turn == Turn::Forward { 1.0 } else { -1.0 });
        for (row, position) in x.chunks_exact_mut(row_len).zip(positions) {
            let cos = &table.cos[position * half..][..half];
            let sin = &table.sin[position * half..][..half];
            for head in row.chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                let pairs = low.chunks_mut(LANES).zip(high.chunks_mut(LANES));
                for ((low, high), (cos, sin)) in pairs.zip(cos.chunks(LANES).zip(sin.chunks(LANES))) {
                    let (x, y) = (s.read_some(low, 0.0), s.read_some(high, 0.0));
                    let (cos, sin) = (s.read_some(cos, 0.0), s.mul(s.read_some(sin, 0.0), sign));
                    s.write_some(low, s.sub(s.mul(x, cos), s.mul(y, sin)));
                    s.write_some(high, s.add(s.mul(y, cos), s.mul(x, sin)));
                }
            }
        }
    }
}
