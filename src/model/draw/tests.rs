use proptest::prelude::{
    Just, ProptestConfig, Strategy as _, prop, prop_assert, prop_assert_eq, prop_oneof, proptest,
};

use super::*;
use crate::kernels::log_sum_exp;

/// One row's draw, as [`draw_rows`] makes it.
fn draw(logits_v: &[f32], decoding: Decoding, key: DrawKey) -> Result<Drawn, NotFinite> {
    let wanted = Wanted { decoding, uniform: key.uniform() };
    let lse_of = |_, logits_v: &[f32]| log_sum_exp(logits_v);
    draw_rows(logits_v, &[wanted], lse_of, &mut Vec::new(), &Team::solo()).remove(0)
}

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
        let drawn = draw(&logits_v, Decoding::Random(f), key).expect("finite");
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
        let drawn = draw(&logits_v, decoding, key(seed, 0)).expect("finite");
        let sum: f64 = logits_v.iter().map(|&l| f64::from(l).exp()).sum();
        let exact = f64::from(logits_v[drawn.token as usize]) - sum.ln();
        prop_assert!((f64::from(drawn.logprob) - exact).abs() < 5e-6, "{} {exact}", drawn.logprob);
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_the_largest(logits_v in logits()) {
        let drawn = draw(&logits_v, Decoding::Greedy, key(0, 0)).expect("finite");
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
        let plain = draw(&logits_v, filter(1.0, None, None), key);
        let all = draw(&logits_v, filter(1.0, Some(2000), None), key);
        assert_eq!(plain, all);
    }
}

/// Chi-square against the exact probabilities; 20,000 draws with fixed seeds.
fn chi_square(logits_v: &[f32], f: Filter) -> (f64, usize) {
    let draws = 20_000;
    let mut counts = vec![0u32; logits_v.len()];
    for position in 0..draws {
        let drawn = draw(logits_v, Decoding::Random(f), key(5, position)).expect("finite");
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
        assert_eq!(draw(&row_v, decoding, key(0, 0)), Err(NotFinite));
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

#[test]
fn logprobs_sum_to_one_and_an_impossible_token_is_written_as_a_number() {
    let mut row_v: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 / 7.0).collect();
    row_v[3] = f32::NEG_INFINITY;
    let lse = log_sum_exp(&row_v);
    let logprob = |token: u32| Drawn::new(token, row_v[token as usize] - lse).logprob;
    let mass: f64 = (0..1000).map(|token| f64::from(logprob(token)).exp()).sum();
    assert!((mass - 1.0).abs() < 1e-5, "{mass}");
    assert_eq!(logprob(3), MIN_LOGPROB);
}

/// And none behind it; also where rounding keeps the running sum from the aim.
#[test]
fn the_largest_uniform_number_draws_the_last_token_that_may_come() {
    let uniform = 1.0 - f64::EPSILON / 2.0;
    let mut row_v = vec![0.5f32; 3 * BLOCK];
    row_v[2 * BLOCK - 1..].fill(f32::NEG_INFINITY);
    for temperature in [1.0, 0.7] {
        let decoding = filter(temperature, None, None);
        assert_eq!(pick(&row_v, Wanted { decoding, uniform }, &mut Vec::new()), Ok(2 * BLOCK as u32 - 2));
    }
    assert_eq!(first_above([1.0, 2.0, 0.0].into_iter(), 3.0), (1, 1.0));
}
