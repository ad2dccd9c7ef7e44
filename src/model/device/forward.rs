use std::sync::Arc;

use crate::{
    gpu::{Array, GpuError},
    types::LoraTarget::{self, *},
};

use super::{
    DeviceAdapter, DeviceCache, DeviceModel, linear::Linear, plan::Plan, steps, weights::DeviceLayer,
};

/// One sequence's new rows in a batch.
pub struct DeviceSequence<'a> {
    /// Token ids of the new rows; at least one.
    pub tokens: &'a [u32],
    /// Keys and values of the positions before, to which this call appends. Absent when
    /// training: the rows are the whole sequence.
    pub cache: Option<&'a mut DeviceCache>,
    /// The adapter of these rows; absent: the base model.
    pub adapter: Option<Arc<DeviceAdapter>>,
}

/// What the forward keeps for the backward. It is good for one.
#[derive(Default)]
pub struct DeviceTape {
    /// Whether `layers` are their inputs alone, and computed again on the way back.
    recomputes: bool,
    pub(super) plan: Option<Plan>,
    pub(super) layers: Vec<Kept>,
    /// The residual stream after the last layer, f32 `[r, d]`.
    pub(super) last: Option<Array>,
}

impl DeviceTape {
    /// An empty one; with `recomputes` it keeps each layer's input alone, and the backward computes the
    /// layer again.
    pub fn new(recomputes: bool) -> Self {
        Self { recomputes, ..Self::default() }
    }
}

/// Of one layer.
pub(super) enum Kept {
    Input(Array),
    Activations(Box<Activations>),
}

/// What one layer computes and its backward reads; T but for `input`, `middle` and `lse`.
pub(super) struct Activations {
    /// The residual stream that enters the layer, `[r, d]`.
    pub input: Array,
    /// Queries and keys as their norms read them.
    pub raw: Option<[Array; 2]>,
    pub q: Array,
    pub k: Array,
    pub v: Array,
    pub attended: Array,
    pub lse: Array,
    /// The residual stream between attention and MLP, `[r, d]`.
    pub middle: Array,
    pub gate: Array,
    pub up: Array,
    /// `A x` of each linear layer that is adapted, in the order of `LoraTarget`.
    pub low: [Option<Array>; 7],
}

/// Runs the decoder over a batch and returns the final hidden states after the last norm, `[r, d]`
/// in T. A step of decoding that comes again is replayed (`steps`).
///
/// With a `tape`, records what [`backward`](super::backward()) needs: all rows must then share one
/// adapter and have no cache.
///
/// # Panics
///
/// If a token is outside the vocabulary, some sequences have a cache and others have none, or a tape is
/// asked for a batch with caches or several adapters.
pub fn forward(
    model: &DeviceModel,
    sequences: &mut [DeviceSequence<'_>],
    mut tape: Option<&mut DeviceTape>,
) -> Result<Array, GpuError> {
    let hidden = match tape.is_none().then(|| steps::decode(model, sequences)).transpose()?.flatten() {
        Some(hidden) => hidden,
        None => {
            let plan = Plan::new(model, sequences)?;
            if let Some(tape) = &mut tape {
                assert!(
                    plan.sequence_of.is_none() && plan.segments.len() <= 1,
                    "a tape holds whole sequences of one adapter"
                );
                tape.layers.clear();
            }
            let x = layers(model, &plan, tape.as_deref_mut())?;
            let hidden = final_norm(model, &x)?;
            if let Some(tape) = tape {
                tape.plan = Some(plan);
                tape.last = Some(x);
            }
            hidden
        }
    };
    for sequence in sequences {
        if let Some(cache) = &mut sequence.cache {
            cache.advance(sequence.tokens.len());
        }
    }
    Ok(hidden)
}

/// The residual stream after the last layer, f32 `[r, d]`.
pub(super) fn layers(
    model: &DeviceModel,
    plan: &Plan,
    mut tape: Option<&mut DeviceTape>,
) -> Result<Array, GpuError> {
    let mut x = model.gpu.embed(&model.embed, &plan.tokens, model.config.hidden_size)?;
    for (index, weights) in model.layers.iter().enumerate() {
        let layer = ForwardLayer { model, weights, index, plan };
        let activations = layer.activations(x)?;
        x = layer.result(&activations)?;
        if let Some(tape) = &mut tape {
            tape.layers.push(match tape.recomputes {
                true => Kept::Input(activations.input),
                false => Kept::Activations(Box::new(activations)),
            });
        }
    }
    Ok(x)
}

/// What the head reads, `[r, d]` in T.
pub(super) fn final_norm(model: &DeviceModel, x: &Array) -> Result<Array, GpuError> {
    model.gpu.rms_norm(x, &model.final_norm, model.config.rms_norm_eps, model.element)
}

/// One decoder block on its way forward.
pub(super) struct ForwardLayer<'a> {
    pub model: &'a DeviceModel,
    pub weights: &'a DeviceLayer,
    pub index: usize,
    pub plan: &'a Plan,
}

impl<'a> ForwardLayer<'a> {
    /// Everything but the layer's last product.
    pub(super) fn activations(&self, input: Array) -> Result<Activations, GpuError> {
        let DeviceModel { gpu, config, element, .. } = self.model;
        let eps = config.rms_norm_eps;
        let mut low = [const { None }; 7];
        let normed = gpu.rms_norm(&input, &self.weights.attn_norm, eps, *element)?;
        let (raw, q, k, v) = self.queries_keys_values(&normed, &mut low)?;
        drop(normed);
        if let Some(sequence_of) = &self.plan.sequence_of {
            let pages = self.plan.pages(self.model, self.index, &k, &v);
            gpu.append(&k, &v, sequence_of, &self.plan.positions, &pages)?;
        }
        let pages = self.plan.pages(self.model, self.index, &k, &v);
        let [attended, lse] = gpu.attention(self.model.shape(), &self.plan.spans, &pages, &q)?;
        let change = self.linear(OProj, &self.weights.o, &attended, &mut low)?;
        let middle = gpu.sum(&input, &change)?;
        drop(change);
        let normed = gpu.rms_norm(&middle, &self.weights.mlp_norm, eps, *element)?;
        let gate = self.linear(GateProj, &self.weights.gate, &normed, &mut low)?;
        let up = self.linear(UpProj, &self.weights.up, &normed, &mut low)?;
        Ok(Activations { input, raw, q, k, v, attended, lse, middle, gate, up, low })
    }

    /// The residual stream behind the layer; also `low` of the last product, which the backward wants.
    pub(super) fn result(&self, activations: &Activations) -> Result<Array, GpuError> {
        let gated = self.model.gpu.swiglu(&activations.gate, &activations.up)?;
        let (change, _) = self.layer(DownProj, &self.weights.down, &gated).forward(self.plan, &gated)?;
        self.model.gpu.sum(&activations.middle, &change)
    }

    /// Queries and keys before and after their norms, turned, and values.
    #[allow(clippy::type_complexity)]
    fn queries_keys_values(
        &self,
        normed: &Array,
        low: &mut [Option<Array>; 7],
    ) -> Result<(Option<[Array; 2]>, Array, Array, Array), GpuError> {
        let (gpu, config) = (&self.model.gpu, &self.model.config);
        let q = self.linear(QProj, &self.weights.q, normed, low)?;
        let k = self.linear(KProj, &self.weights.k, normed, low)?;
        let v = self.linear(VProj, &self.weights.v, normed, low)?;
        if let Some(bias) = &self.weights.qkv_bias {
            for (bias, y) in bias.iter().zip([&q, &k, &v]) {
                gpu.add_bias(bias, y)?;
            }
        }
        let (raw, q, k) = match &self.weights.qk_norm {
            None => (None, q, k),
            Some([q_norm, k_norm]) => {
                let eps = config.rms_norm_eps;
                let normed = [gpu.head_norm(&q, q_norm, eps)?, gpu.head_norm(&k, k_norm, eps)?];
                let [q_normed, k_normed] = normed;
                (Some([q, k]), q_normed, k_normed)
            }
        };
        let cos_sin = self.plan.cos_sin.each_ref();
        for x in [&q, &k] {
            gpu.rotary(x, &self.plan.positions, cos_sin, config.head_dim / 2, 1.0)?;
        }
        Ok((raw, q, k, v))
    }

    fn linear(
        &self,
        target: LoraTarget,
        weight: &'a Array,
        x: &Array,
        low: &mut [Option<Array>; 7],
    ) -> Result<Array, GpuError> {
        let (y, its_low) = self.layer(target, weight, x).forward(self.plan, x)?;
        low[target as usize] = its_low;
        Ok(y)
    }

    fn layer(&self, target: LoraTarget, weight: &'a Array, x: &Array) -> Linear<'a> {
        let in_features = x.len() / self.plan.rows;
        Linear { model: self.model, layer: self.index, target, weight, in_features }
    }
}
