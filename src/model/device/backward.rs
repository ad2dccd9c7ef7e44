use crate::{
    gpu::{Array, AttentionBackward, Element, GpuError},
    types::LoraTarget::{self, *},
};

use super::{
    DeviceAdapter, DeviceModel, DeviceTape,
    forward::{Activations, ForwardLayer, Kept},
    linear::{Linear, LinearGradient},
    plan::Plan,
    weights::DeviceLayer,
};

/// Adds the gradient with respect to the adapter's values to `gradient` (f32, `layout.len()` values),
/// given `d_hidden`, the gradient with respect to what [`forward`](super::forward()) returned, `[r, d]`
/// in T.
///
/// Goes from the last layer to the lowest adapted one, and no further; frees each layer's activations as
/// it goes. Uses the tape up.
///
/// # Panics
///
/// If the tape is used up, or was not recorded with this model and adapter.
pub fn backward(
    model: &DeviceModel,
    adapter: &DeviceAdapter,
    tape: &mut DeviceTape,
    d_hidden: &Array,
    gradient: &Array,
) -> Result<(), GpuError> {
    assert_eq!(tape.layers.len(), model.layers.len(), "a tape serves one backward");
    assert_eq!(gradient.len(), adapter.layout.len(), "one gradient for each value of the adapter");
    let (plan, last) = tape.plan.take().zip(tape.last.take()).expect("a tape with layers has the rest");
    // f32, like the residual stream.
    let residual = model.gpu.zeros(Element::F32, d_hidden.len())?;
    let eps = model.config.rms_norm_eps;
    model.gpu.rms_norm_backward(&last, &model.final_norm, eps, d_hidden, &residual)?;
    let lowest = adapter.layout.entries.first().map_or(usize::MAX, |entry| entry.layer);
    for (index, weights) in model.layers.iter().enumerate().rev() {
        let kept = tape.layers.pop().expect("as many as the model has, as was checked");
        if index < lowest {
            continue;
        }
        let activations = match kept {
            Kept::Activations(activations) => *activations,
            Kept::Input(input) => ForwardLayer { model, weights, index, plan: &plan }.activations(input)?,
        };
        let gradient = LinearGradient { adapter, values: gradient };
        let is_lowest = index == lowest;
        let layer =
            BackwardLayer { model, weights, index, is_lowest, plan: &plan, gradient, residual: &residual };
        layer.run(&activations)?;
    }
    Ok(())
}

/// One decoder block on its way back.
struct BackwardLayer<'a> {
    model: &'a DeviceModel,
    weights: &'a DeviceLayer,
    index: usize,
    /// Nothing below this layer needs a gradient.
    is_lowest: bool,
    plan: &'a Plan,
    gradient: LinearGradient<'a>,
    /// The gradient of the residual stream, f32 `[r, d]`.
    residual: &'a Array,
}

impl<'a> BackwardLayer<'a> {
    /// Turns the gradient of the layer's result into that of its input; stops where nothing further
    /// down is adapted.
    fn run(&self, activations: &Activations) -> Result<(), GpuError> {
        self.feed_forward(activations)?;
        if self.is_needed(&[QProj, KProj, VProj, OProj]) {
            self.attention(activations)?;
        }
        Ok(())
    }

    /// Whether a gradient is needed that only `targets` and lower layers use.
    fn is_needed(&self, targets: &[LoraTarget]) -> bool {
        let layout = &self.gradient.adapter.layout;
        !self.is_lowest || targets.iter().any(|target| !layout.entries_of(self.index, *target).is_empty())
    }

    fn feed_forward(&self, activations: &Activations) -> Result<(), GpuError> {
        let DeviceModel { gpu, config, element, .. } = self.model;
        let Activations { gate, up, middle, low, .. } = activations;
        let eps = config.rms_norm_eps;

        let dy = gpu.rounded(self.residual, *element)?;
        let gated = gpu.swiglu(gate, up)?;
        let needed = self.is_needed(&[GateProj, UpProj, QProj, KProj, VProj, OProj]);
        let d_gated = needed.then(|| gpu.array(*element, gate.len())).transpose()?;
        // The forward needs no `A x` of the last product; its backward alone does.
        let down = self.linear(DownProj, &self.weights.down, &gated);
        let down_low = self.down_low(&gated)?;
        down.backward(self.plan.rows, &gated, down_low.as_ref(), &dy, &self.gradient, fresh(&d_gated))?;
        drop((gated, dy));
        let Some(d_gated) = d_gated else { return Ok(()) };
        let [d_gate, d_up] = gpu.swiglu_backward(gate, up, &d_gated)?;
        drop(d_gated);

        let normed = gpu.rms_norm(middle, &self.weights.mlp_norm, eps, *element)?;
        let needed = self.is_needed(&[QProj, KProj, VProj, OProj]);
        let dx = needed.then(|| gpu.array(*element, normed.len())).transpose()?;
        let layers = [(GateProj, &self.weights.gate, &d_gate), (UpProj, &self.weights.up, &d_up)];
        self.all_backward(&layers, &normed, low, dx.as_ref())?;
        match dx {
            Some(dx) => gpu.rms_norm_backward(middle, &self.weights.mlp_norm, eps, &dx, self.residual),
            None => Ok(()),
        }
    }

    /// `A x` of the layer's last product, if it is adapted.
    fn down_low(&self, gated: &Array) -> Result<Option<Array>, GpuError> {
        let Some(low_rank) = self.gradient.adapter.low_rank(self.index, DownProj) else { return Ok(None) };
        self.model.low(&low_rank, self.plan.rows, gated, gated.len() / self.plan.rows).map(Some)
    }

    fn attention(&self, activations: &Activations) -> Result<(), GpuError> {
        let DeviceModel { gpu, config, element, .. } = self.model;
        let Activations { input, raw, q, k, v, attended, lse, low, .. } = activations;
        let eps = config.rms_norm_eps;

        let dy = gpu.rounded(self.residual, *element)?;
        let needed = self.is_needed(&[QProj, KProj, VProj]);
        let d_attended = needed.then(|| gpu.array(*element, attended.len())).transpose()?;
        let o = self.linear(OProj, &self.weights.o, attended);
        let o_low = low[OProj as usize].as_ref();
        o.backward(self.plan.rows, attended, o_low, &dy, &self.gradient, fresh(&d_attended))?;
        drop(dy);
        let Some(d_attended) = d_attended else { return Ok(()) };

        let [dq, dk, dv] =
            [gpu.array(*element, q.len())?, gpu.array(*element, k.len())?, gpu.array(*element, v.len())?];
        let operands =
            AttentionBackward { q, out: attended, d_out: &d_attended, lse, dq: &dq, dk: &dk, dv: &dv };
        let pages = self.plan.pages(self.model, self.index, k, v);
        gpu.attention_backward(self.model.shape(), &self.plan.spans, &pages, operands)?;
        drop(d_attended);
        let cos_sin = self.plan.cos_sin.each_ref();
        for dx in [&dq, &dk] {
            gpu.rotary(dx, &self.plan.positions, cos_sin, config.head_dim / 2, -1.0)?;
        }
        let [dq, dk] = match (&self.weights.qk_norm, raw) {
            (Some([q_norm, k_norm]), Some([q_raw, k_raw])) => [
                gpu.head_norm_backward(q_raw, q_norm, eps, &dq)?,
                gpu.head_norm_backward(k_raw, k_norm, eps, &dk)?,
            ],
            _ => [dq, dk],
        };

        let normed = gpu.rms_norm(input, &self.weights.attn_norm, eps, *element)?;
        let dx = (!self.is_lowest).then(|| gpu.array(*element, normed.len())).transpose()?;
        let DeviceLayer { q, k, v, .. } = self.weights;
        self.all_backward(&[(QProj, q, &dq), (KProj, k, &dk), (VProj, v, &dv)], &normed, low, dx.as_ref())?;
        match dx {
            Some(dx) => gpu.rms_norm_backward(input, &self.weights.attn_norm, eps, &dx, self.residual),
            None => Ok(()),
        }
    }

    /// Linear layers that read the same `x`, given the gradients of their results.
    fn all_backward(
        &self,
        layers: &[(LoraTarget, &'a Array, &Array)],
        x: &Array,
        low: &[Option<Array>; 7],
        dx: Option<&Array>,
    ) -> Result<(), GpuError> {
        for (place, (target, weight, dy)) in layers.iter().enumerate() {
            let low = low[*target as usize].as_ref();
            let dx = dx.map(|dx| (dx, place > 0));
            self.linear(*target, weight, x).backward(self.plan.rows, x, low, dy, &self.gradient, dx)?;
        }
        Ok(())
    }

    fn linear(&self, target: LoraTarget, weight: &'a Array, x: &Array) -> Linear<'a> {
        let in_features = x.len() / self.plan.rows;
        Linear { model: self.model, layer: self.index, target, weight, in_features }
    }
}

/// A gradient that is written, not added to.
fn fresh(dx: &Option<Array>) -> Option<(&Array, bool)> {
    dx.as_ref().map(|dx| (dx, false))
}
