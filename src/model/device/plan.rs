use std::{ops::Range, sync::Arc};

use crate::gpu::{Array, BACKWARD_KEYS, BACKWARD_ROWS, FORWARD_ROWS, Gpu, GpuError, PAGE, Pages, Spans};

use super::{DeviceAdapter, DeviceModel, forward::DeviceSequence};

/// How the rows of a batch are to be read, on the GPU.
pub(super) struct Plan {
    pub rows: usize,
    pub tokens: Array,
    /// Position of each row in its sequence.
    pub positions: Array,
    pub cos_sin: [Array; 2],
    pub spans: Spans,
    /// Rows of one adapter, end to end.
    pub segments: Vec<Segment>,
    /// Where pages begin, by sequence: in the batch's own keys and values, or in caches.
    table: Array,
    per_sequence: usize,
    /// The sequence of each row, if there are caches.
    pub sequence_of: Option<Array>,
}

pub(super) struct Segment {
    pub rows: Range<usize>,
    pub adapter: Option<Arc<DeviceAdapter>>,
}

/// One sequence's rows: the first of them in the batch, how many, and the position of the first.
struct Rows {
    first: usize,
    count: usize,
    start: usize,
}

impl Plan {
    /// Reserves room in the caches, and brings to the GPU what its kernels read.
    ///
    /// # Panics
    ///
    /// If a token is outside the vocabulary, a sequence is empty, or some sequences have a cache and
    /// others have none.
    pub(super) fn new(model: &DeviceModel, sequences: &mut [DeviceSequence<'_>]) -> Result<Self, GpuError> {
        let cached = sequences.iter().filter(|sequence| sequence.cache.is_some()).count();
        assert!(cached == 0 || cached == sequences.len(), "all sequences of a batch have a cache, or none");
        let mut rows = Vec::with_capacity(sequences.len());
        let (mut tokens, mut positions, mut sequence_of) = (Vec::new(), Vec::new(), Vec::new());
        for (index, sequence) in sequences.iter_mut().enumerate() {
            let count = sequence.tokens.len();
            assert!(count > 0, "a sequence has at least one token");
            let start = sequence.cache.as_ref().map_or(0, |cache| cache.len());
            if let Some(cache) = &mut sequence.cache {
                cache.reserve(model, count)?;
            }
            rows.push(Rows { first: tokens.len(), count, start });
            tokens.extend_from_slice(sequence.tokens);
            positions.extend((start..start + count).map(|position| position as u32));
            sequence_of.extend(std::iter::repeat_n(index as u32, count));
        }
        assert!(tokens.iter().all(|token| (*token as usize) < model.config.vocab_size), "tokens are known");
        let longest = rows.iter().map(|rows| rows.start + rows.count).max().unwrap_or(0);
        let per_sequence = longest.div_ceil(PAGE).max(1);
        let gpu = &model.gpu;
        Ok(Self {
            rows: tokens.len(),
            tokens: gpu.upload_u32(&tokens)?,
            positions: gpu.upload_u32(&positions)?,
            cos_sin: model.rotary(longest)?,
            spans: spans(gpu, &rows, model.shape().group)?,
            segments: segments(sequences, &rows),
            table: gpu.upload_u64(&table(model, sequences, &rows, per_sequence))?,
            per_sequence,
            sequence_of: (cached > 0).then(|| gpu.upload_u32(&sequence_of)).transpose()?,
        })
    }

    /// Where attention finds the keys and values of a layer: in caches, or in `k` and `v`, the batch's own.
    pub(super) fn pages(&self, model: &DeviceModel, layer: usize, k: &Array, v: &Array) -> Pages {
        match self.sequence_of {
            Some(_) => model.cached_pages(layer, &self.table, self.per_sequence),
            None => Pages {
                keys: k.address(),
                values: v.address(),
                table: self.table.clone(),
                per_sequence: self.per_sequence,
            },
        }
    }
}

fn spans(gpu: &Gpu, rows: &[Rows], group: usize) -> Result<Spans, GpuError> {
    let column =
        |of: fn(&Rows) -> usize| gpu.upload_u32(&rows.iter().map(|rows| of(rows) as u32).collect::<Vec<_>>());
    let tiles = |positions: usize| -> Result<[Array; 2], GpuError> {
        let tiles = rows.iter().enumerate().flat_map(|(sequence, rows)| {
            (0..rows.count).step_by(positions).map(move |offset| (sequence as u32, offset as u32))
        });
        let (sequences, offsets): (Vec<u32>, Vec<u32>) = tiles.unzip();
        Ok([gpu.upload_u32(&sequences)?, gpu.upload_u32(&offsets)?])
    };
    Ok(Spans {
        first_row: column(|rows| rows.first)?,
        rows: column(|rows| rows.count)?,
        start: column(|rows| rows.start)?,
        forward: tiles(FORWARD_ROWS / group)?,
        backward: tiles(BACKWARD_ROWS / group)?,
        keys: tiles(BACKWARD_KEYS)?,
    })
}

fn segments(sequences: &[DeviceSequence<'_>], rows: &[Rows]) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    for (sequence, rows) in sequences.iter().zip(rows) {
        match segments.last_mut() {
            Some(last) if is_same(&last.adapter, &sequence.adapter) => last.rows.end += rows.count,
            _ => segments.push(Segment {
                rows: rows.first..rows.first + rows.count,
                adapter: sequence.adapter.clone(),
            }),
        }
    }
    segments
}

/// Whether two adapters are one, in one place.
pub(super) fn is_same(a: &Option<Arc<DeviceAdapter>>, b: &Option<Arc<DeviceAdapter>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

/// `[sequences, per_sequence]`: where each page begins. What a sequence has not is never looked up.
fn table(
    model: &DeviceModel,
    sequences: &[DeviceSequence<'_>],
    rows: &[Rows],
    per_sequence: usize,
) -> Vec<u64> {
    let mut table = vec![0; sequences.len() * per_sequence];
    for ((sequence, rows), places) in sequences.iter().zip(rows).zip(table.chunks_exact_mut(per_sequence)) {
        match &sequence.cache {
            Some(cache) => places.iter_mut().zip(cache.places()).for_each(|(to, place)| *to = place),
            None => {
                let width = model.key_width();
                for (page, to) in places.iter_mut().enumerate() {
                    *to = ((rows.first + page * PAGE) * width) as u64;
                }
            }
        }
    }
    table
}
