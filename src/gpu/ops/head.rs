//! What is done with rows of logits: statistics, log-probabilities, their gradient, and drawing.

use crate::gpu::{Array, Element, Gpu, GpuError, device::Argument};

use super::{THREADS, arguments, named, threads_for};

/// Logits of a row that one block reads.
pub(in crate::gpu) const CHUNK: usize = 4096;

/// What [`Gpu::draw`] writes in the place of a token where there is none.
const NO_TOKEN: u32 = u32::MAX;

/// What is known of each row of some logits, f32.
pub(crate) struct RowStatistics {
    /// The largest logit.
    pub largest: Array,
    /// `ln Σ e^x`
    pub lse: Array,
}

/// How a token is drawn from a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum RowDraw {
    /// The one with the largest logit; the lowest id on a tie.
    Largest,
    /// By its share of the weights `exp((x - largest) / temperature)`: the first at which their running sum exceeds
    /// `uniform` of the whole.
    Random {
        /// Positive.
        temperature: f32,
        /// In [0, 1).
        uniform: f64,
    },
    /// Not at all.
    Left,
}

/// Rows of logits that have a gradient, their targets, and the targets' factors.
pub(crate) struct TargetRows<'a> {
    /// Rows of the logits.
    pub rows: &'a Array,
    /// Where each row's targets begin, and the end of the last's.
    pub first_target: &'a Array,
    pub tokens: &'a Array,
    pub factors: &'a Array,
}

impl RowDraw {
    /// `Draw` of kernels/head.cu, 16 bytes, as two words; of both, the lower bytes come first.
    fn words(self) -> [u64; 2] {
        let (uniform, temperature) = match self {
            Self::Largest => (0.0, 0.0),
            Self::Random { temperature, uniform } => (uniform, temperature),
            Self::Left => (0.0, -1.0),
        };
        [f64::to_bits(uniform), f32::to_bits(temperature).into()]
    }
}

impl Gpu {
    /// Of each row of f32 logits. A row that has NaN, `+inf` or nothing but `-inf` has a log-sum-exp that is not finite.
    pub(crate) fn row_statistics(&self, logits_cv: &Array, vocab: usize) -> Result<RowStatistics, GpuError> {
        let (rows, chunks) = (logits_cv.len() / vocab, vocab.div_ceil(CHUNK));
        let array = |len| self.array(Element::F32, len);
        let (chunk_largest, chunk_sum) = (array(rows * chunks)?, array(rows * chunks)?);
        let (largest, lse) = (array(rows)?, array(rows)?);
        let of_chunks = arguments![logits_cv, &chunk_largest, &chunk_sum, vocab as u32];
        let of_rows = arguments![&chunk_largest, &chunk_sum, &largest, &lse, vocab as u32];
        // SAFETY: a block for each chunk of each row, then one for each row.
        unsafe {
            self.launch("chunk_statistics_f32", [rows, chunks], THREADS, of_chunks)?;
            self.launch("row_statistics_f32", [rows, 1], threads_for(chunks), of_rows)?;
        }
        Ok(RowStatistics { largest, lse })
    }

    /// Each row's entropy, f32.
    pub(crate) fn row_entropies(
        &self,
        logits_cv: &Array,
        lse: &Array,
        vocab: usize,
    ) -> Result<Array, GpuError> {
        assert_eq!(logits_cv.len(), lse.len() * vocab);
        let entropies = self.array(Element::F32, lse.len())?;
        let arguments = arguments![logits_cv, lse, &entropies, vocab as u32];
        // SAFETY: a block for each row.
        unsafe { self.launch("row_entropies_f32", [lse.len(), 1], THREADS, arguments) }?;
        Ok(entropies)
    }

    /// A token of each row and its log-probability, brought to the host; none of a row whose weights have no finite
    /// sum, and none of one that is left.
    pub(crate) fn draw(
        &self,
        logits_cv: &Array,
        RowStatistics { largest, lse }: &RowStatistics,
        draws: &[RowDraw],
        vocab: usize,
    ) -> Result<Vec<Option<(u32, f32)>>, GpuError> {
        let (rows, chunks) = (draws.len(), vocab.div_ceil(CHUNK));
        assert_eq!([logits_cv.len(), largest.len() * vocab, lse.len() * vocab], [rows * vocab; 3]);
        let draws = self.upload_u64(&draws.iter().flat_map(|draw| draw.words()).collect::<Vec<_>>())?;
        // Sums in f64; a token and a log-probability.
        let (sums, drawn) = (self.array(Element::U64, rows * chunks)?, self.array(Element::U64, rows)?);
        let of_chunks = arguments![logits_cv, largest, &draws, &sums, vocab as u32];
        let of_rows = arguments![logits_cv, largest, lse, &draws, &sums, &drawn, vocab as u32];
        // SAFETY: a block for each chunk of each row, then one for each row; `Draw` has two words, `Drawn` one.
        unsafe {
            self.launch("draw_sums_f32", [rows, chunks], THREADS, of_chunks)?;
            self.launch("draw_tokens_f32", [rows, 1], THREADS, of_rows)?;
        }
        let drawn = self.download_u64(&drawn)?.into_iter().map(|word| (word as u32, (word >> 32) as u32));
        let drawn =
            drawn.map(|(token, logprob)| (token != NO_TOKEN).then(|| (token, f32::from_bits(logprob))));
        Ok(drawn.collect())
    }

    /// Log-probability of each target: `row_of` counts rows of the logits.
    pub(crate) fn target_logprobs(
        &self,
        logits_cv: &Array,
        lse: &Array,
        row_of: &Array,
        tokens: &Array,
        vocab: usize,
    ) -> Result<Array, GpuError> {
        assert_eq!((row_of.len(), lse.len() * vocab), (tokens.len(), logits_cv.len()));
        let logprobs = self.array(Element::F32, tokens.len())?;
        let arguments = arguments![logits_cv, lse, row_of, tokens, &logprobs, vocab as u32];
        // SAFETY: rows and tokens exist, as whoever calls has checked.
        unsafe { self.each("target_logprobs_f32", tokens.len(), arguments) }?;
        Ok(logprobs)
    }

    /// The gradient of the logits of some rows, `[rows, v]` in T.
    pub(crate) fn logits_gradient(
        &self,
        logits_cv: &Array,
        lse: &Array,
        targets: TargetRows<'_>,
        vocab: usize,
        element: Element,
    ) -> Result<Array, GpuError> {
        let TargetRows { rows, first_target, tokens, factors } = targets;
        assert_eq!((first_target.len(), factors.len()), (rows.len() + 1, tokens.len()));
        let d_logits = self.array(element, rows.len() * vocab)?;
        let arguments =
            arguments![logits_cv, lse, rows, first_target, tokens, factors, &d_logits, vocab as u32];
        // SAFETY: as above.
        unsafe { self.launch(&named("logits_gradient", &d_logits), [rows.len(), 1], THREADS, arguments) }?;
        Ok(d_logits)
    }
}
