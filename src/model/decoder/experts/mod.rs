//! A mixture of experts in the place of a layer's MLP.
//!
//! A row that goes to k experts takes k slots. Slots are ordered by expert, and by row within an
//! expert, so that each expert's are one piece of every buffer:
//!
//! ```text
//!   rows ─router─► choices ─gather─► slots ─gate, up, SwiGLU, weigh, down─► slots ─add up─► rows
//! ```
//!
//! The weight of a choice is taken in before the last product, which is linear: what a row gets
//! is the same, and the gradient of the weight needs no result of an expert. A row's sum goes
//! through its experts in their order, so its bits depend on nothing but the row.

mod backward;
mod forward;

use std::ops::Range;

use crate::{
    kernels::{Buffer, Router, Shared, Team, for_rows},
    model::ExpertsWeights,
};

/// Which rows went to which expert.
#[derive(Default)]
pub(super) struct Routing {
    /// The router's softmax, `[r, e]`.
    probabilities_re: Buffer,
    /// Experts of each row, ascending, and their weights; both `[r, experts of a row]`.
    chosen: Vec<u32>,
    weights: Vec<f32>,
    /// Where each expert's slots begin, and the end of the last's.
    starts: Vec<usize>,
    /// The choice that each slot serves: an index of `chosen`.
    choice_of: Vec<usize>,
    /// The slot of each choice.
    slot_of: Vec<usize>,
    per_row: usize,
}

impl ExpertsWeights {
    fn router(&self) -> Router {
        Router { experts: self.experts.len(), per_row: self.per_row, normalises: self.normalises }
    }
}

impl Routing {
    /// Gives each choice its slot.
    fn arrange(&mut self, experts: usize, per_row: usize) {
        self.per_row = per_row;
        self.starts.clear();
        self.starts.resize(experts + 1, 0);
        for expert in &self.chosen {
            self.starts[*expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            self.starts[expert + 1] += self.starts[expert];
        }
        let mut next = self.starts.clone();
        self.choice_of.resize(self.chosen.len(), 0);
        self.slot_of.resize(self.chosen.len(), 0);
        for (choice, expert) in self.chosen.iter().enumerate() {
            let slot = &mut next[*expert as usize];
            self.choice_of[*slot] = choice;
            self.slot_of[choice] = *slot;
            *slot += 1;
        }
    }

    fn slots(&self) -> usize {
        self.choice_of.len()
    }

    /// Experts that have slots, and which.
    fn shares(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let bounds = self.starts.windows(2).map(|bounds| bounds[0]..bounds[1]).enumerate();
        bounds.filter(|(_, slots)| !slots.is_empty())
    }

    fn row_of(&self, slot: usize) -> usize {
        self.choice_of[slot] / self.per_row
    }

    /// Segments of rows as segments of an expert's slots, counted from its first.
    fn segments(&self, slots: &Range<usize>, segments: &[Range<usize>]) -> Vec<Range<usize>> {
        let choices = &self.choice_of[slots.clone()];
        let first_from = |row: usize| choices.partition_point(|choice| choice / self.per_row < row);
        segments.iter().map(|segment| first_from(segment.start)..first_from(segment.end)).collect()
    }

    /// `x[slot] = x[row of the slot]`
    fn gather(&self, x_rd: &[f32], x_sd: &mut [f32], team: &Team) {
        let width = x_sd.len() / self.slots().max(1);
        let x_sd = Shared::new(x_sd);
        for_rows(team, self.slots(), width, |slots| {
            for slot in slots {
                // SAFETY: tasks have distinct slots.
                let to = unsafe { x_sd.part(slot * width..(slot + 1) * width) };
                to.copy_from_slice(&x_rd[self.row_of(slot) * width..][..width]);
            }
        });
    }

    /// `y[row] += Σ y[slot]` over the row's slots, in the order of their experts.
    fn add_up(&self, y_sd: &[f32], y_rd: &mut [f32], team: &Team) {
        let rows = self.slots() / self.per_row.max(1);
        let width = y_rd.len() / rows.max(1);
        let y_rd = Shared::new(y_rd);
        for_rows(team, rows, width * self.per_row, |rows| {
            for row in rows {
                // SAFETY: tasks have distinct rows.
                let to = unsafe { y_rd.part(row * width..(row + 1) * width) };
                for slot in &self.slot_of[row * self.per_row..][..self.per_row] {
                    to.iter_mut().zip(&y_sd[slot * width..][..width]).for_each(|(to, y)| *to += y);
                }
            }
        });
    }

    /// Multiplies what belongs to each slot by the weight of its choice.
    fn weigh(&self, values_si: &mut [f32], team: &Team) {
        let width = values_si.len() / self.slots().max(1);
        let values_si = Shared::new(values_si);
        for_rows(team, self.slots(), width, |slots| {
            for slot in slots {
                let weight = self.weights[self.choice_of[slot]];
                // SAFETY: tasks have distinct slots.
                let values = unsafe { values_si.part(slot * width..(slot + 1) * width) };
                values.iter_mut().for_each(|value| *value *= weight);
            }
        });
    }

    /// The gradient of each choice's weight: the product of what it multiplied and the gradient
    /// of the result.
    fn weight_gradients(&self, values_si: &[f32], d_weighed_si: &[f32], team: &Team) -> Vec<f32> {
        let width = values_si.len() / self.slots().max(1);
        let mut gradients = vec![0.0; self.slots()];
        let shared = Shared::new(&mut gradients);
        for_rows(team, self.slots(), width, |choices| {
            for choice in choices {
                let part = self.slot_of[choice] * width..(self.slot_of[choice] + 1) * width;
                let products = values_si[part.clone()].iter().zip(&d_weighed_si[part]).map(|(x, d)| x * d);
                // SAFETY: tasks have distinct choices.
                unsafe { shared.part(choice..choice + 1)[0] = products.sum() };
            }
        });
        gradients
    }
}

#[cfg(test)]
impl Routing {
    /// Bytes of memory that it holds.
    pub(super) fn allocated(&self) -> usize {
        let places = self.starts.capacity() + self.choice_of.capacity() + self.slot_of.capacity();
        let choices = self.chosen.capacity() + self.weights.capacity();
        self.probabilities_re.allocated() + places * size_of::<usize>() + choices * size_of::<u32>()
    }
}
