//! Rows that nobody reads, so that steps of about as many rows and pages are one.
//!
//! ```text
//!   rows that were asked for   A A A A A │ B B B
//!   with padding               A A A A A a a a │ B B B b │ · · · ·     each adapter's to a bucket, then all of them
//! ```

use std::{mem, sync::Arc};

use crate::gpu::{Array, GpuError, PAGE};

use super::super::{
    DeviceAdapter, DeviceModel,
    forward::final_norm,
    plan::{Draft, RowPages, Rows, push_segment},
};

/// Numbers of rows that are recorded. A GPU reads its weights once for all rows of a step, which takes longer than some two
/// hundred rows are computed in: a few more cost next to nothing.
const BUCKETS: [usize; 13] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256];

/// Pages of a sequence in the table, at least: as many positions as the smallest rotary table.
const PAGES_LEAST: usize = 16;

/// Runs of rows with one adapter, at most. A product with an adapter's matrices is a launch for each of them: a step in
/// which many adapters take turns has too many to be worth recording, and seldom comes again.
const SEGMENTS_MOST: usize = 8;

/// The token of a row that nobody reads.
const PADDING: &[u32] = &[0];

/// A step with such rows.
pub(super) struct Padded<'a> {
    pub draft: Draft<'a>,
    pub rows: Asked,
}

/// Which of its rows were asked for, in their order.
pub(super) enum Asked {
    /// The first ones.
    First(usize),
    These(Vec<u32>),
}

impl<'a> Draft<'a> {
    /// Pads a step in which each sequence has one row; the added ones have `page` for a cache. `None`: that is more rows than
    /// are recorded, or more adapters in turns.
    pub(super) fn padded(mut self, page: u64) -> Option<Padded<'a>> {
        let given = mem::take(&mut self.segments);
        if given.len() > SEGMENTS_MOST {
            return None;
        }
        let mut left = mem::take(&mut self.sequences).into_iter();
        let mut asked = Vec::new();
        for segment in &given {
            let (first, rows) = (self.sequences.len(), segment.rows.len());
            asked.extend(first as u32..(first + rows) as u32);
            self.sequences.extend(left.by_ref().take(rows));
            self.pad_to(first + bucket(rows)?, &segment.adapter, page);
        }
        self.pad_to(bucket(self.sequences.len())?, &None, page);
        for (first, rows) in self.sequences.iter_mut().enumerate() {
            rows.first = first;
        }
        self.per_sequence = self.per_sequence.next_power_of_two().max(PAGES_LEAST);
        self.longest = self.per_sequence * PAGE;
        let rows = match given.len() {
            1 => Asked::First(asked.len()),
            _ => Asked::These(asked),
        };
        Some(Padded { draft: self, rows })
    }

    /// Makes the rows so many, those that are in no segment yet and those that are added one's of this adapter.
    fn pad_to(&mut self, rows: usize, adapter: &Option<Arc<DeviceAdapter>>, page: u64) {
        let padding = || Rows { first: 0, tokens: PADDING, start: 0, pages: RowPages::One(page) };
        self.sequences.resize_with(rows, padding);
        let added = rows - self.rows();
        if added > 0 {
            push_segment(&mut self.segments, added, adapter);
        }
    }
}

impl Asked {
    /// The final hidden states of these rows, given the residual stream of all.
    pub(super) fn final_norm(&self, model: &DeviceModel, x: &Array) -> Result<Array, GpuError> {
        let width = model.config.hidden_size;
        match self {
            Self::First(rows) => final_norm(model, &x.range(0..rows * width)),
            Self::These(rows) => {
                let rows = model.gpu.upload_u32(rows)?;
                final_norm(model, &model.gpu.gather(x, &rows, width)?)
            }
        }
    }
}

/// The smallest number of rows that is recorded and holds these.
fn bucket(rows: usize) -> Option<usize> {
    BUCKETS.into_iter().find(|bucket| *bucket >= rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_to_the_next_bucket_and_no_further_than_the_last() {
        assert_eq!([1, 3, 9, 17, 65, 256].map(bucket), [1, 4, 16, 24, 96, 256].map(Some));
        assert_eq!(bucket(257), None);
        assert!(BUCKETS.is_sorted());
    }
}
