use crate::{
    gpu::{Array, Factor, GpuError, Product},
    types::LoraTarget,
};

use super::{DeviceAdapter, DeviceModel, adapter::DeviceLowRank, plan::Plan};

/// A linear layer with the adapters of its rows.
pub(super) struct Linear<'a> {
    pub model: &'a DeviceModel,
    pub layer: usize,
    pub target: LoraTarget,
    /// `[out, in]`
    pub weight: &'a Array,
    pub in_features: usize,
}

/// Where a linear layer's gradients go.
pub(super) struct LinearGradient<'a> {
    pub adapter: &'a DeviceAdapter,
    /// Of all values of the adapter, f32.
    pub values: &'a Array,
}

impl Linear<'_> {
    fn out_features(&self) -> usize {
        self.weight.len() / self.in_features
    }

    /// `y = x Wᵀ + scale · x Aᵀ Bᵀ`, `[r, out]`, and `x Aᵀ` of the last segment that is adapted: of all
    /// rows, where they share an adapter.
    pub(super) fn forward(&self, plan: &Plan, x: &Array) -> Result<(Array, Option<Array>), GpuError> {
        let (gpu, inputs, outputs) = (&self.model.gpu, self.in_features, self.out_features());
        let y = gpu.array(self.model.element, plan.rows * outputs)?;
        gpu.product(Product {
            left: Factor::Plain(x),
            right: Factor::Transposed(self.weight),
            alpha: 1.0,
            beta: 0.0,
            result: &y,
            m: plan.rows,
            n: outputs,
            k: inputs,
        })?;
        let mut low = None;
        for segment in &plan.segments {
            let low_rank = segment.adapter.as_ref().and_then(|a| a.low_rank(self.layer, self.target));
            let Some(low_rank) = low_rank else { continue };
            let [x, y] = [(x, inputs), (&y, outputs)]
                .map(|(array, width)| array.range(segment.rows.start * width..segment.rows.end * width));
            low = Some(self.model.add_low_rank(&low_rank, segment.rows.len(), &x, inputs, &y)?);
        }
        Ok((y, low))
    }

    /// Given `dy`, adds the gradient of the adapter's matrices to `gradient`; if wanted, also `dx`,
    /// which is added to it where `accumulates`.
    pub(super) fn backward(
        &self,
        rows: usize,
        x: &Array,
        low: Option<&Array>,
        dy: &Array,
        gradient: &LinearGradient<'_>,
        dx: Option<(&Array, bool)>,
    ) -> Result<(), GpuError> {
        if let Some((dx, accumulates)) = dx {
            self.model.gpu.product(Product {
                left: Factor::Plain(dy),
                right: Factor::Plain(self.weight),
                alpha: 1.0,
                beta: if accumulates { 1.0 } else { 0.0 },
                result: dx,
                m: rows,
                n: self.in_features,
                k: self.out_features(),
            })?;
        }
        match gradient.adapter.low_rank(self.layer, self.target).zip(low) {
            Some((low_rank, low)) => {
                let operands = LowRankBackward { rows, x, low, dy, dx: dx.map(|(dx, _)| dx) };
                self.model.low_rank_backward(&low_rank, operands, gradient.values)
            }
            None => Ok(()),
        }
    }
}

/// What the way back through an adapter's two matrices reads.
pub(super) struct LowRankBackward<'a> {
    pub rows: usize,
    pub x: &'a Array,
    pub low: &'a Array,
    pub dy: &'a Array,
    /// The adapter's part is added to it.
    pub dx: Option<&'a Array>,
}

impl DeviceModel {
    /// `y += scale · x Aᵀ Bᵀ`; returns `x Aᵀ`, `[rows, rank]` in T.
    pub(super) fn add_low_rank(
        &self,
        low_rank: &DeviceLowRank<'_>,
        rows: usize,
        x: &Array,
        inputs: usize,
        y: &Array,
    ) -> Result<Array, GpuError> {
        let low = self.low(low_rank, rows, x, inputs)?;
        self.gpu.product(Product {
            left: Factor::Plain(&low),
            right: Factor::Transposed(&low_rank.b),
            alpha: low_rank.scale,
            beta: 1.0,
            result: y,
            m: rows,
            n: low_rank.entry.out_features,
            k: low_rank.rank,
        })?;
        Ok(low)
    }

    /// `x Aᵀ`, `[rows, rank]` in T.
    pub(super) fn low(
        &self,
        low_rank: &DeviceLowRank<'_>,
        rows: usize,
        x: &Array,
        inputs: usize,
    ) -> Result<Array, GpuError> {
        let low = self.gpu.array(self.element, rows * low_rank.rank)?;
        self.gpu.product(Product {
            left: Factor::Plain(x),
            right: Factor::Transposed(&low_rank.a),
            alpha: 1.0,
            beta: 0.0,
            result: &low,
            m: rows,
            n: low_rank.rank,
            k: inputs,
        })?;
        Ok(low)
    }

    /// `dB += scale · dyᵀ low`, with `d_low = scale · dy B`: `dA += d_lowᵀ x` and `dx += d_low A`. The
    /// gradients of the matrices are f32 sums of products in T.
    pub(super) fn low_rank_backward(
        &self,
        low_rank: &DeviceLowRank<'_>,
        LowRankBackward { rows, x, low, dy, dx }: LowRankBackward<'_>,
        gradient: &Array,
    ) -> Result<(), GpuError> {
        let DeviceLowRank { a, b, rank, scale, entry } = low_rank;
        let (rank, inputs, outputs) = (*rank, entry.in_features, entry.out_features);
        self.gpu.product(Product {
            left: Factor::Transposed(dy),
            right: Factor::Plain(low),
            alpha: *scale,
            beta: 1.0,
            result: &gradient.range(entry.b.clone()),
            m: outputs,
            n: rank,
            k: rows,
        })?;
        let d_low = self.gpu.array(self.element, rows * rank)?;
        self.gpu.product(Product {
            left: Factor::Plain(dy),
            right: Factor::Plain(b),
            alpha: *scale,
            beta: 0.0,
            result: &d_low,
            m: rows,
            n: rank,
            k: outputs,
        })?;
        self.gpu.product(Product {
            left: Factor::Transposed(&d_low),
            right: Factor::Plain(x),
            alpha: 1.0,
            beta: 1.0,
            result: &gradient.range(entry.a.clone()),
            m: rank,
            n: inputs,
            k: rows,
        })?;
        let Some(dx) = dx else { return Ok(()) };
        self.gpu.product(Product {
            left: Factor::Plain(&d_low),
            right: Factor::Plain(a),
            alpha: 1.0,
            beta: 1.0,
            result: dx,
            m: rows,
            n: inputs,
            k: rank,
        })
    }
}
