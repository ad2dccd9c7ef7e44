/// How far the trainer's policy is from the sampler's at one token that the sampler drew.
///
/// `k1`, `k2`, `k3` estimate KL(sampler ‖ trainer); k3 is unbiased and never negative
/// (Schulman, "Approximating KL divergence", 2020).
pub(in crate::model) struct PolicyGap {
    /// `r = exp(lp − q)`.
    pub ratio: f64,
    /// `q − lp`.
    pub k1: f64,
    /// `½(lp − q)²`.
    pub k2: f64,
    /// `r − 1 − (lp − q)`.
    pub k3: f64,
    /// `|lp − q|`.
    pub gap: f64,
}

impl PolicyGap {
    pub(in crate::model) fn at(lp: f32, sampler_logprob: f32) -> Self {
        let difference = f64::from(lp) - f64::from(sampler_logprob);
        Self {
            ratio: difference.exp(),
            k1: -difference,
            k2: 0.5 * difference * difference,
            k3: difference.exp_m1() - difference,
            gap: difference.abs(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_policies_have_no_gap() {
        let gap = PolicyGap::at(-1.5, -1.5);
        assert_eq!([gap.ratio, gap.k1.abs(), gap.k2, gap.k3, gap.gap], [1.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn the_estimates_follow_their_formulas() {
        let gap = PolicyGap::at(-1.0, -1.5);
        assert_eq!(gap.k1, -0.5);
        assert_eq!(gap.k2, 0.125);
        assert!((gap.k3 - (0.5f64.exp() - 1.5)).abs() < 1e-15);
        assert_eq!(gap.gap, 0.5);
    }
}
