use std::{ops::Range, sync::Arc};

use crate::gpu::{
    Array, BACKWARD_KEYS, BACKWARD_ROWS, FORWARD_ROWS, GpuError, ListPlace, Lists, PAGE, Pages, Spans,
};

use super::{DeviceAdapter, DeviceCache, DeviceModel, forward::DeviceSequence};

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

/// The same on the host, before its lists have gone to the GPU.
pub(super) struct Draft<'a> {
    pub sequences: Vec<Rows<'a>>,
    pub segments: Vec<Segment>,
    /// Pages of a sequence in the table, at most.
    pub per_sequence: usize,
    /// Positions of the longest sequence.
    pub longest: usize,
    has_caches: bool,
}

pub(super) struct Segment {
    pub rows: Range<usize>,
    pub adapter: Option<Arc<DeviceAdapter>>,
}

/// One sequence's rows: the first of them in the batch, their tokens, and the position of the first.
pub(super) struct Rows<'a> {
    pub first: usize,
    pub tokens: &'a [u32],
    pub start: usize,
    pub pages: RowPages<'a>,
}

/// Where keys and values of a sequence are.
pub(super) enum RowPages<'a> {
    Cache(&'a DeviceCache),
    /// In those of the batch.
    Own,
    /// In one page, counted in elements from address 0.
    One(u64),
}

/// Where a plan's lists are among those that went to the GPU together.
pub(super) struct Layout {
    tokens: ListPlace,
    positions: ListPlace,
    first_row: ListPlace,
    rows: ListPlace,
    start: ListPlace,
    forward: [ListPlace; 2],
    backward: [ListPlace; 2],
    keys: [ListPlace; 2],
    table: ListPlace,
    sequence_of: Option<ListPlace>,
}

impl Plan {
    /// Reserves room in the caches, and brings to the GPU what its kernels read.
    ///
    /// # Panics
    ///
    /// If a token is outside the vocabulary, a sequence is empty, or some sequences have a cache and
    /// others have none.
    pub(super) fn new(model: &DeviceModel, sequences: &mut [DeviceSequence<'_>]) -> Result<Self, GpuError> {
        let draft = Draft::new(model, sequences)?;
        let (lists, layout) = draft.lists(model);
        let on_gpu = model.gpu.upload_lists(&lists)?;
        Self::over(model, draft, &on_gpu, &layout)
    }

    /// The plan whose lists are in an array already.
    pub(super) fn over(
        model: &DeviceModel,
        draft: Draft<'_>,
        lists: &Array,
        layout: &Layout,
    ) -> Result<Self, GpuError> {
        let list = |place: ListPlace| lists.list(place);
        Ok(Self {
            rows: draft.rows(),
            tokens: list(layout.tokens),
            positions: list(layout.positions),
            cos_sin: model.rotary(draft.longest)?,
            spans: Spans {
                first_row: list(layout.first_row),
                rows: list(layout.rows),
                start: list(layout.start),
                forward: layout.forward.map(list),
                backward: layout.backward.map(list),
                keys: layout.keys.map(list),
            },
            segments: draft.segments,
            table: list(layout.table),
            per_sequence: draft.per_sequence,
            sequence_of: layout.sequence_of.map(list),
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

impl<'a> Draft<'a> {
    /// Reserves room in the caches.
    ///
    /// # Panics
    ///
    /// As [`Plan::new`].
    pub(super) fn new(
        model: &DeviceModel,
        sequences: &'a mut [DeviceSequence<'_>],
    ) -> Result<Self, GpuError> {
        let cached = sequences.iter().filter(|sequence| sequence.cache.is_some()).count();
        assert!(cached == 0 || cached == sequences.len(), "all sequences of a batch have a cache, or none");
        for sequence in &mut *sequences {
            let count = sequence.tokens.len();
            assert!(count > 0, "a sequence has at least one token");
            let vocab = model.config.vocab_size;
            assert!(sequence.tokens.iter().all(|token| (*token as usize) < vocab), "tokens are known");
            if let Some(cache) = &mut sequence.cache {
                cache.reserve(model, count)?;
            }
        }
        let (mut drafted, mut segments, mut first) = (Vec::new(), Vec::new(), 0);
        for sequence in &*sequences {
            let tokens = sequence.tokens;
            let (start, pages) = match sequence.cache.as_deref() {
                Some(cache) => (cache.len(), RowPages::Cache(cache)),
                None => (0, RowPages::Own),
            };
            drafted.push(Rows { first, tokens, start, pages });
            push_segment(&mut segments, tokens.len(), &sequence.adapter);
            first += tokens.len();
        }
        let longest = drafted.iter().map(|rows| rows.start + rows.tokens.len()).max().unwrap_or(0);
        let per_sequence = longest.div_ceil(PAGE).max(1);
        Ok(Self { sequences: drafted, segments, per_sequence, longest, has_caches: cached > 0 })
    }

    pub(super) fn rows(&self) -> usize {
        self.segments.last().map_or(0, |segment| segment.rows.end)
    }

    /// What kernels read of it. Lengths are given by the rows of each sequence and `per_sequence`.
    pub(super) fn lists(&self, model: &DeviceModel) -> (Lists, Layout) {
        let mut lists = Lists::default();
        let table = lists.u64s(self.table(model));
        let sequences = || (0u32..).zip(&self.sequences);
        let tiles = |lists: &mut Lists, positions: usize| {
            let tiles = || {
                sequences().flat_map(move |(sequence, rows)| {
                    let offsets = (0..rows.tokens.len()).step_by(positions);
                    offsets.map(move |offset| (sequence, offset as u32))
                })
            };
            [lists.u32s(tiles().map(|(sequence, _)| sequence)), lists.u32s(tiles().map(|(_, offset)| offset))]
        };
        let group = model.shape().group;
        let layout = Layout {
            tokens: lists.u32s(sequences().flat_map(|(_, rows)| rows.tokens.iter().copied())),
            positions: lists.u32s(sequences().flat_map(|(_, rows)| {
                (rows.start..rows.start + rows.tokens.len()).map(|position| position as u32)
            })),
            first_row: lists.u32s(sequences().map(|(_, rows)| rows.first as u32)),
            rows: lists.u32s(sequences().map(|(_, rows)| rows.tokens.len() as u32)),
            start: lists.u32s(sequences().map(|(_, rows)| rows.start as u32)),
            forward: tiles(&mut lists, FORWARD_ROWS / group),
            backward: tiles(&mut lists, BACKWARD_ROWS / group),
            keys: tiles(&mut lists, BACKWARD_KEYS),
            table,
            sequence_of: self.has_caches.then(|| {
                lists.u32s(
                    sequences().flat_map(|(sequence, rows)| std::iter::repeat_n(sequence, rows.tokens.len())),
                )
            }),
        };
        (lists, layout)
    }

    /// `[sequences, per_sequence]`: where each page begins. What a sequence has not is never looked up.
    fn table(&self, model: &DeviceModel) -> Vec<u64> {
        let mut table = vec![0; self.sequences.len() * self.per_sequence];
        for (rows, places) in self.sequences.iter().zip(table.chunks_exact_mut(self.per_sequence)) {
            match rows.pages {
                RowPages::Cache(cache) => {
                    places.iter_mut().zip(cache.places()).for_each(|(to, place)| *to = place);
                }
                RowPages::Own => {
                    let width = model.key_width();
                    for (page, to) in places.iter_mut().enumerate() {
                        *to = ((rows.first + page * PAGE) * width) as u64;
                    }
                }
                RowPages::One(place) => places[0] = place,
            }
        }
        table
    }
}

/// Adds rows of an adapter: to the last segment if that has the same one.
pub(super) fn push_segment(segments: &mut Vec<Segment>, rows: usize, adapter: &Option<Arc<DeviceAdapter>>) {
    let first = segments.last().map_or(0, |segment| segment.rows.end);
    match segments.last_mut() {
        Some(last) if is_same(&last.adapter, adapter) => last.rows.end += rows,
        _ => segments.push(Segment { rows: first..first + rows, adapter: adapter.clone() }),
    }
}

/// Whether two adapters are one, in one place.
pub(super) fn is_same(a: &Option<Arc<DeviceAdapter>>, b: &Option<Arc<DeviceAdapter>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}
