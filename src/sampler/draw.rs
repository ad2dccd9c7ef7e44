//! Draws a token from one row of logits, and says how likely it was.
//!
//! A draw is a pure function of the row, the [`Decoding`] and the [`DrawKey`]: it knows no batch
//! and no clock, so the same request draws the same tokens in any company. The order of the
//! filters is the usual one: temperature, then `top_k`, then `top_p` among what is left. The
//! log-probability is always that of the unmodified distribution.
//!
//! The plain case (no `top_k`, no `top_p`) makes two passes over the row and sorts nothing.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use crate::types::SamplingParams;

use super::numerics::{BLOCK, RowSum, exp, logprob};

/// What decides one draw, beside the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawKey {
    /// The request's seed.
    pub seed: u64,
    /// Which of the request's `num_samples` sequences.
    pub sequence: u32,
    /// Which of the sequence's new tokens, from 0.
    pub position: u64,
}

/// How tokens are drawn: what [`SamplingParams`] say about it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decoding {
    /// The largest logit; the lowest id on a tie.
    Greedy,
    /// By probability.
    Random(Filter),
}

/// Which tokens may be drawn, and how their probabilities are sharpened.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Filter {
    /// Divides the logits; positive.
    pub temperature: f32,
    /// Only the k largest; absent: all.
    pub top_k: Option<usize>,
    /// Then the fewest whose sum reaches this share of what `top_k` left; absent: all.
    pub top_p: Option<f64>,
}

/// A drawn token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    pub token: u32,
    /// Under the log-softmax of the row as it is.
    pub logprob: f32,
}

/// The row has NaN, `+inf`, or nothing but `-inf`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotFinite;

impl Decoding {
    /// Of [valid](SamplingParams::validate) parameters.
    pub fn new(params: &SamplingParams) -> Self {
        let SamplingParams { temperature, top_p, top_k, .. } = *params;
        // A temperature that f32 can't tell from 0 has the same limit.
        let temperature = temperature as f32;
        if top_k == 1 || temperature == 0.0 {
            return Self::Greedy;
        }
        Self::Random(Filter {
            temperature,
            top_k: usize::try_from(top_k).ok(),
            top_p: (top_p < 1.0).then_some(top_p),
        })
    }
}

impl DrawKey {
    /// A uniform number in [0, 1) with 53 random bits: ChaCha8 keyed by seed and sequence, its
    /// stream chosen by the position.
    fn uniform(self) -> f64 {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..12].copy_from_slice(&self.sequence.to_le_bytes());
        // Apart from the streams of a fresh adapter, which a run's seed keys as well.
        key[16..].copy_from_slice(b"lockstep sampler");
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(self.position);
        (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

/// Draws from a row of `[vocab]` logits. `scratch` is overwritten; keep it from call to call.
pub fn draw(
    logits_v: &[f32],
    decoding: Decoding,
    key: DrawKey,
    scratch: &mut Vec<u32>,
) -> Result<Drawn, NotFinite> {
    let plain = RowSum::of(logits_v, 1.0).ok_or(NotFinite)?;
    let token = match decoding {
        Decoding::Greedy => arg_max(logits_v, plain.max),
        Decoding::Random(filter) if filter.top_k.is_none() && filter.top_p.is_none() => {
            if filter.temperature == 1.0 {
                pick_from_all(logits_v, &plain, key.uniform())
            } else {
                let scaled = RowSum::of(logits_v, filter.temperature).ok_or(NotFinite)?;
                pick_from_all(logits_v, &scaled, key.uniform())
            }
        }
        Decoding::Random(filter) => {
            let weight = |token: u32| weight(logits_v, plain.max, filter.temperature, token);
            filter.keep(logits_v, plain.max, &weight, scratch).ok_or(NotFinite)?;
            // Picking walks in the order of ids, so that a filter that keeps everything draws
            // what no filter draws.
            scratch.sort_unstable();
            pick_from(scratch, &weight, key.uniform())
        }
    };
    Ok(Drawn { token, logprob: logprob(logits_v, token) })
}

fn weight(logits_v: &[f32], max: f32, temperature: f32, token: u32) -> f64 {
    exp((logits_v[token as usize] - max) / temperature).into()
}

fn arg_max(logits_v: &[f32], max: f32) -> u32 {
    // The sum was finite, so the row's maximum is one of its values.
    logits_v.iter().position(|&logit| logit == max).map_or(0, |token| token as u32)
}

/// The first token at which the running sum of weights exceeds `uniform` of the whole.
fn pick_from_all(logits_v: &[f32], sum: &RowSum, uniform: f64) -> u32 {
    let aim = uniform * sum.total;
    let mut below = 0.0;
    let mut chosen = 0;
    for (block, &block_sum) in sum.blocks.iter().enumerate() {
        if block_sum > 0.0 {
            chosen = block;
            if below + block_sum > aim {
                break;
            }
            below += block_sum;
        }
    }
    let first = chosen * BLOCK;
    let last = (first + BLOCK).min(logits_v.len());
    let ids: Vec<u32> = (first as u32..last as u32).collect();
    pick_above(&ids, &|token| weight(logits_v, sum.max, sum.temperature, token), aim - below)
}

fn pick_from(ids: &[u32], weight: &dyn Fn(u32) -> f64, uniform: f64) -> u32 {
    let total: f64 = ids.iter().map(|&token| weight(token)).sum();
    pick_above(ids, weight, uniform * total)
}

/// The first of `ids` at which the running sum exceeds `aim`; where rounding keeps the sum from
/// it, the last one that has a weight.
fn pick_above(ids: &[u32], weight: &dyn Fn(u32) -> f64, aim: f64) -> u32 {
    let mut sum = 0.0;
    let mut chosen = ids.first().copied().unwrap_or(0);
    for &token in ids {
        let weight = weight(token);
        if weight > 0.0 {
            chosen = token;
            sum += weight;
            if sum > aim {
                break;
            }
        }
    }
    chosen
}

impl Filter {
    /// Writes the tokens that may be drawn to `kept`, in no particular order; at least one.
    /// Nothing if the row has no finite sum.
    fn keep(
        &self,
        logits_v: &[f32],
        max: f32,
        weight: &dyn Fn(u32) -> f64,
        kept: &mut Vec<u32>,
    ) -> Option<()> {
        kept.clear();
        let total = match self.top_k {
            Some(k) if k < logits_v.len() => {
                keep_largest(logits_v, k, kept);
                kept.sort_unstable();
                kept.iter().map(|&token| weight(token)).sum()
            }
            _ => {
                let total = RowSum::of(logits_v, self.temperature)?.total;
                let floor = self.nucleus_floor(max, total, logits_v.len());
                let likely = logits_v.iter().zip(0..).filter(|&(&logit, _)| logit >= floor);
                kept.extend(likely.map(|(_, token): (_, u32)| token));
                total
            }
        };
        if let Some(p) = self.top_p {
            keep_nucleus(logits_v, weight, p * total, kept);
        }
        Some(())
    }

    /// Tokens of a smaller logit are in no nucleus: each holds less than `(1 - p) / vocab` of the
    /// whole, so less than `1 - p` together. Without them, ranking starts with hundreds of tokens,
    /// not tens of thousands. Half the bound leaves room for rounding.
    fn nucleus_floor(&self, max: f32, total: f64, vocab: usize) -> f32 {
        let Some(p) = self.top_p else { return f32::NEG_INFINITY };
        let too_light = 0.5 * (1.0 - p) * total / vocab as f64;
        (f64::from(max) + f64::from(self.temperature) * too_light.ln()) as f32
    }
}

/// More likely first; the lower id first on a tie.
fn by_rank(logits_v: &[f32]) -> impl Fn(&u32, &u32) -> std::cmp::Ordering {
    |a, b| logits_v[*b as usize].total_cmp(&logits_v[*a as usize]).then(a.cmp(b))
}

/// The `k` first by rank, in one pass that compares almost every token with one threshold.
fn keep_largest(logits_v: &[f32], k: usize, kept: &mut Vec<u32>) {
    // An equal logit further on has a higher id and loses the tie, so `>` is enough.
    let mut threshold = f32::NEG_INFINITY;
    for (token, &logit) in logits_v.iter().enumerate() {
        if logit > threshold || kept.len() < k {
            kept.push(token as u32);
            if kept.len() == 2 * k {
                kept.select_nth_unstable_by(k - 1, by_rank(logits_v));
                kept.truncate(k);
                threshold = logits_v[kept[k - 1] as usize];
            }
        }
    }
    if kept.len() > k {
        kept.select_nth_unstable_by(k - 1, by_rank(logits_v));
        kept.truncate(k);
    }
}

/// The fewest of `kept`, by rank, whose weights sum to `aim`.
fn keep_nucleus(logits_v: &[f32], weight: &dyn Fn(u32) -> f64, aim: f64, kept: &mut Vec<u32>) {
    let mut head = FIRST_NUCLEUS;
    while head < kept.len() {
        kept.select_nth_unstable_by(head - 1, by_rank(logits_v));
        // A margin, as the sum in another order may round to the other side of the aim.
        let mass: f64 = kept[..head].iter().map(|&token| weight(token)).sum();
        if mass > aim * (1.0 + 1e-9) {
            kept.truncate(head);
            break;
        }
        head *= 4;
    }
    kept.sort_unstable_by(by_rank(logits_v));
    let mut sum = 0.0;
    let reached = kept.iter().position(|&token| {
        sum += weight(token);
        sum >= aim
    });
    if let Some(last) = reached {
        kept.truncate(last + 1);
    }
}

/// How many of the most likely tokens are tried first as the nucleus: it seldom is larger.
const FIRST_NUCLEUS: usize = 256;

#[cfg(test)]
mod tests {
    use proptest::prelude::{
        Just, ProptestConfig, Strategy as _, prop, prop_assert, prop_assert_eq, prop_oneof, proptest,
    };

    use super::*;

    fn filter(temperature: f32, top_k: Option<usize>, top_p: Option<f64>) -> Decoding {
        Decoding::Random(Filter { temperature, top_k, top_p })
    }

    fn key(seed: u64, position: u64) -> DrawKey {
        DrawKey { seed, sequence: 0, position }
    }

    /// The definition, in f64, by sorting everything.
    fn slow_kept(logits_v: &[f32], f: Filter) -> Vec<(u32, f64)> {
        let max = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut ranked: Vec<(u32, f64)> = logits_v
            .iter()
            .enumerate()
            .map(|(i, &l)| (i as u32, ((f64::from(l) - f64::from(max)) / f64::from(f.temperature)).exp()))
            .collect();
        ranked.sort_by(|a, b| logits_v[b.0 as usize].total_cmp(&logits_v[a.0 as usize]).then(a.0.cmp(&b.0)));
        ranked.truncate(f.top_k.unwrap_or(usize::MAX));
        let total: f64 = ranked.iter().map(|r| r.1).sum();
        if let Some(p) = f.top_p {
            let mut sum = 0.0;
            let count = ranked.iter().take_while(|r| {
                let more = sum < p * total;
                sum += r.1;
                more
            });
            let count = count.count().max(1);
            ranked.truncate(count);
        }
        ranked.sort_by_key(|r| r.0);
        ranked
    }

    fn slow_draw(logits_v: &[f32], f: Filter, uniform: f64) -> u32 {
        let kept = slow_kept(logits_v, f);
        let total: f64 = kept.iter().map(|r| r.1).sum();
        let mut sum = 0.0;
        for &(token, weight) in &kept {
            sum += weight;
            if sum > uniform * total {
                return token;
            }
        }
        kept.last().expect("one is kept").0
    }

    fn logits() -> impl proptest::strategy::Strategy<Value = Vec<f32>> {
        let value = prop_oneof![
            8 => -12.0f32..12.0,
            // Ties, and tokens that a mask has forbidden.
            1 => Just(3.0f32),
            1 => Just(f32::NEG_INFINITY),
        ];
        (prop::collection::vec(value, 1..700), -12.0f32..12.0).prop_map(|(mut row, first)| {
            row[0] = first;
            row
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn a_draw_is_what_the_slow_definition_draws(
            logits_v in logits(),
            temperature in 0.3f32..2.5,
            top_k in prop::option::of(1usize..800),
            top_p in prop::option::of(0.05f64..0.999),
            seed: u64,
            position in 0u64..5000,
        ) {
            let f = Filter { temperature, top_k, top_p };
            let key = key(seed, position);
            let drawn = draw(&logits_v, Decoding::Random(f), key, &mut Vec::new()).expect("finite");
            // The fast weights are rounded to f32: the two may part within 1e-5 of a border.
            let uniform = key.uniform();
            let around = |x: f64| [x - 1e-5, x, x + 1e-5];
            let near: Vec<u32> = around(top_p.unwrap_or(1.0))
                .into_iter()
                .map(|p| Filter { top_p: top_p.map(|_| p), ..f })
                .flat_map(|f| around(uniform).map(|u| slow_draw(&logits_v, f, u)))
                .collect();
            prop_assert!(near.contains(&drawn.token), "{} is not among {near:?}", drawn.token);
        }

        #[test]
        fn the_logprob_is_that_of_the_unmodified_row(
            logits_v in logits(),
            temperature in 0.3f32..2.5,
            top_k in prop::option::of(1usize..50),
            seed: u64,
        ) {
            let decoding = filter(temperature, top_k, None);
            let drawn = draw(&logits_v, decoding, key(seed, 0), &mut Vec::new()).expect("finite");
            let sum: f64 = logits_v.iter().map(|&l| f64::from(l).exp()).sum();
            let exact = f64::from(logits_v[drawn.token as usize]) - sum.ln();
            prop_assert!((f64::from(drawn.logprob) - exact).abs() < 5e-6, "{} {exact}", drawn.logprob);
        }

        #[test]
        fn greedy_takes_the_lowest_id_among_the_largest(logits_v in logits()) {
            let drawn = draw(&logits_v, Decoding::Greedy, key(0, 0), &mut Vec::new()).expect("finite");
            let max = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let first = logits_v.iter().position(|&l| l == max).expect("it is in the row");
            prop_assert_eq!(drawn.token as usize, first);
        }
    }

    #[test]
    fn a_filter_that_keeps_everything_draws_what_no_filter_draws() {
        let logits_v: Vec<f32> = (0..2000).map(|i| ((i * 7919) % 613) as f32 / 50.0).collect();
        for position in 0..500 {
            let key = key(11, position);
            let plain = draw(&logits_v, filter(1.0, None, None), key, &mut Vec::new());
            let all = draw(&logits_v, filter(1.0, Some(2000), None), key, &mut Vec::new());
            assert_eq!(plain, all);
        }
    }

    /// Chi-square against the exact probabilities; 20,000 draws with fixed seeds.
    fn chi_square(logits_v: &[f32], f: Filter) -> (f64, usize) {
        let draws = 20_000;
        let mut counts = vec![0u32; logits_v.len()];
        let mut scratch = Vec::new();
        for position in 0..draws {
            let drawn = draw(logits_v, Decoding::Random(f), key(5, position), &mut scratch).expect("finite");
            counts[drawn.token as usize] += 1;
        }
        let kept = slow_kept(logits_v, f);
        let total: f64 = kept.iter().map(|r| r.1).sum();
        let statistic = kept.iter().map(|&(token, weight)| {
            let expected = draws as f64 * weight / total;
            (f64::from(counts[token as usize]) - expected).powi(2) / expected
        });
        let statistic = statistic.sum();
        assert_eq!(draws as u32, kept.iter().map(|k| counts[k.0 as usize]).sum::<u32>());
        (statistic, kept.len() - 1)
    }

    #[test]
    fn tokens_are_drawn_with_their_probabilities() {
        // 300 tokens, so that the walk crosses a block; the rarest is expected 20 times or more.
        let logits_v: Vec<f32> = (0..300).map(|i| ((i * 37) % 300) as f32 / 300.0).collect();
        for f in [
            Filter { temperature: 1.0, top_k: None, top_p: None },
            Filter { temperature: 0.6, top_k: None, top_p: None },
            Filter { temperature: 1.0, top_k: Some(40), top_p: None },
            Filter { temperature: 1.3, top_k: Some(200), top_p: Some(0.7) },
        ] {
            let (statistic, freedom) = chi_square(&logits_v, f);
            // Mean k, variance 2k: five deviations above the mean is far beyond 1 in 10^5.
            let bound = freedom as f64 + 5.0 * (2.0 * freedom as f64).sqrt();
            assert!(statistic < bound, "{f:?}: chi-square {statistic} above {bound}");
        }
    }

    #[test]
    fn seed_sequence_and_position_each_change_the_draw() {
        let base = DrawKey { seed: 1, sequence: 2, position: 3 };
        let others =
            [DrawKey { seed: 2, ..base }, DrawKey { sequence: 3, ..base }, DrawKey { position: 4, ..base }];
        for other in others {
            assert_ne!(base.uniform(), other.uniform());
        }
        assert_eq!(base.uniform(), base.uniform());
    }

    #[test]
    fn a_row_that_is_not_finite_is_refused() {
        let row_v = [0.0, f32::NAN, 1.0];
        for decoding in [Decoding::Greedy, filter(1.0, None, None), filter(1.0, Some(2), Some(0.5))] {
            assert_eq!(draw(&row_v, decoding, key(0, 0), &mut Vec::new()), Err(NotFinite));
        }
    }

    #[test]
    fn temperature_zero_and_top_k_one_are_greedy() {
        let zero = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let one = SamplingParams { top_k: 1, temperature: 0.7, ..SamplingParams::default() };
        assert_eq!(Decoding::new(&zero), Decoding::Greedy);
        assert_eq!(Decoding::new(&one), Decoding::Greedy);
        let all = Filter { temperature: 1.0, top_k: None, top_p: None };
        assert_eq!(Decoding::new(&SamplingParams::default()), Decoding::Random(all));
    }
}
