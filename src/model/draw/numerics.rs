//! Sums over one row of logits, in one fixed order.

/// Values that are summed together; a draw walks blocks first, then one block's values.
pub(super) const BLOCK: usize = 256;

/// Partial sums within a block: independent, so that the compiler can use vectors.
const LANES: usize = 8;

/// A row's maximum, and the sums of `exp((logit - max) / temperature)`.
pub(super) struct RowSum {
    pub max: f32,
    pub temperature: f32,
    /// One per [`BLOCK`] values.
    pub blocks: Vec<f64>,
    pub total: f64,
}

impl RowSum {
    /// Nothing if the row has NaN or `+inf`, or only `-inf`.
    pub fn of(logits_v: &[f32], temperature: f32) -> Option<Self> {
        let max = row_max(logits_v);
        let blocks: Vec<f64> =
            logits_v.chunks(BLOCK).map(|block| block_sum(block, max, temperature)).collect();
        let total: f64 = blocks.iter().sum();
        // The largest value weighs 1: a smaller total is no sum (NaN fails this, too).
        (max.is_finite() && total.is_finite() && total >= 1.0).then_some(Self {
            max,
            temperature,
            blocks,
            total,
        })
    }
}

fn row_max(row_v: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row_v.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            // Not `f32::max`: this form is one instruction. NaN is caught by the sum.
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &value| if value > max { value } else { max })
}

fn block_sum(block_v: &[f32], max: f32, temperature: f32) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (chunks, rest) = block_v.as_chunks::<LANES>();
    for chunk in chunks {
        let mut weights = [0.0f32; LANES];
        for (weight, &value) in weights.iter_mut().zip(chunk) {
            *weight = exp((value - max) / temperature);
        }
        for (lane, &weight) in lanes.iter_mut().zip(&weights) {
            *lane += f64::from(weight);
        }
    }
    let rest: f64 = rest.iter().map(|&value| f64::from(exp((value - max) / temperature))).sum();
    lanes.iter().sum::<f64>() + rest
}

/// `e^x` for x at most 0, to about 2 ulp; 0 below -87.3, where f32 has no normal numbers.
///
/// Range reduction by powers of two and the polynomial of Cephes' `expf`. Written without a
/// branch or call so that it becomes vector instructions; libm's would dominate a draw.
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    p = p * r * r + r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    let value = p * f32::from_bits(exponent.wrapping_shl(23));
    if x < -87.3 { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_f64_to_a_few_ulp() {
        let mut worst = 0.0f64;
        for step in 0..87_000 {
            let x = -(step as f32) / 1000.0;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
        }
        // f32's spacing is 1.2e-7 relative at worst.
        assert!(worst < 2.5e-7, "worst relative error {worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn a_row_without_a_finite_sum_is_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            for at in [0, 7, 8, 300] {
                let mut row_v = vec![0.5; 301];
                row_v[at] = bad;
                assert!(RowSum::of(&row_v, 1.0).is_none(), "{bad} at {at}");
            }
        }
        assert!(RowSum::of(&[f32::NEG_INFINITY; 9], 1.0).is_none());
        assert!(RowSum::of(&[], 1.0).is_none());
    }
}
