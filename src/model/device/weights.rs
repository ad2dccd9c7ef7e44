use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{
    gpu::{Array, BACKWARD_ROWS, Element, Gpu, GpuError, HeadShape, MAX_HEAD_DIM},
    kernels::Matrix,
    model::{BaseWeights, LayerWeights, Mlp, ModelConfig, param_vector::VectorWatch},
};

use super::{DeviceAdapter, StepCounts, steps::Steps};

/// A base model in the memory of a GPU.
pub struct DeviceModel {
    // Before what they have addresses of.
    steps: Mutex<Steps>,
    /// Of its steps of decoding.
    pub(super) counts: StepCounts,
    pub(super) gpu: Gpu,
    /// T.
    pub(super) element: Element,
    pub(super) config: ModelConfig,
    /// `[vocab, hidden]`
    pub(super) embed: Array,
    pub(super) layers: Vec<DeviceLayer>,
    pub(super) final_norm: Array,
    /// `[vocab, hidden]`; the same memory as `embed` when tied.
    pub(super) head: Array,
    rotary: Mutex<Option<RotaryArrays>>,
    /// As many as versions are in use: runs' present weights, and what samplers hold.
    pub(super) adapters: Mutex<Vec<(VectorWatch, Arc<DeviceAdapter>)>>,
}

/// One decoder block: matrices `[out, in]` in T, vectors in f32.
pub(super) struct DeviceLayer {
    pub attn_norm: Array,
    pub q: Array,
    pub k: Array,
    pub v: Array,
    pub o: Array,
    pub qkv_bias: Option<[Array; 3]>,
    pub qk_norm: Option<[Array; 2]>,
    pub mlp_norm: Array,
    pub gate: Array,
    pub up: Array,
    pub down: Array,
}

/// Cosines and sines of the first positions, `[positions, head_dim / 2]` each.
#[derive(Clone)]
struct RotaryArrays {
    positions: usize,
    cos_sin: [Array; 2],
}

impl DeviceModel {
    /// Copies a model's weights to the GPU.
    ///
    /// Refused: mixtures of experts, heads wider than 128, and groups of more than 16 query heads, which no
    /// kernel covers; and a model that is larger than the memory that is free, with both figures.
    pub fn new(gpu: &Gpu, config: &ModelConfig, weights: &BaseWeights) -> Result<Self, GpuError> {
        Self::check(config)?;
        let element = element_of(weights);
        check_memory(gpu, element, weights)?;
        let upload = Upload { gpu, element };
        let embed = upload.matrix(&weights.embed)?;
        let head = match weights.embed.shares_storage(&weights.head) {
            true => embed.clone(),
            false => upload.matrix(&weights.head)?,
        };
        let layers = weights.layers.iter().map(|layer| upload.layer(layer)).collect::<Result<_, _>>()?;
        Ok(Self {
            steps: Mutex::new(Steps::new(config, element)),
            counts: StepCounts::default(),
            gpu: gpu.clone(),
            element,
            config: config.clone(),
            embed,
            layers,
            final_norm: upload.vector(&weights.final_norm)?,
            head,
            rotary: Mutex::default(),
            adapters: Mutex::default(),
        })
    }

    /// Refuses a configuration that the kernels do not cover.
    pub fn check(config: &ModelConfig) -> Result<(), GpuError> {
        let refuse = |field, problem: String| Err(GpuError::Unsupported { field, problem });
        let group = config.num_heads / config.num_kv_heads;
        if config.experts.is_some() {
            return refuse(
                "num_experts",
                "is set; mixtures of experts run with `--device cpu` only (`auto` takes it by itself)"
                    .to_owned(),
            );
        }
        if config.head_dim > MAX_HEAD_DIM {
            let problem = format!("is {}; the GPU's attention takes at most {MAX_HEAD_DIM}", config.head_dim);
            return refuse("head_dim", problem);
        }
        if group > BACKWARD_ROWS {
            let problem = format!(
                "is {group} to a key head; the GPU's attention takes at most {BACKWARD_ROWS} query heads to one"
            );
            return refuse("num_attention_heads", problem);
        }
        Ok(())
    }

    /// The same with every step of decoding launched kernel by kernel: recorded steps of use to nobody, or in doubt.
    pub fn with_plain_decoding(mut self) -> Self {
        self.steps.get_mut().unwrap_or_else(PoisonError::into_inner).turn_off();
        self
    }

    /// Its recorded steps; whoever looks has a turn at the GPU.
    pub(super) fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The GPU that it is on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(super) fn shape(&self) -> HeadShape {
        let ModelConfig { num_heads, num_kv_heads, head_dim, .. } = self.config;
        HeadShape { group: num_heads / num_kv_heads, keys: num_kv_heads, dim: head_dim }
    }

    /// Width of keys, and of values.
    pub(super) fn key_width(&self) -> usize {
        self.config.num_kv_heads * self.config.head_dim
    }

    /// Cosines and sines of at least so many positions.
    ///
    /// Angles are rounded to f32 as the models' own training code does.
    pub(super) fn rotary(&self, positions: usize) -> Result<[Array; 2], GpuError> {
        let mut held = self.rotary.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = held.as_ref().filter(|held| held.positions >= positions) {
            return Ok(held.cos_sin.clone());
        }
        // Grown in large steps, so that a sequence that is decoded makes a new table now and then.
        let positions = positions.next_power_of_two().max(512);
        let frequencies = self.config.rope_frequencies();
        let angles = (0..positions).flat_map(|position| {
            frequencies.iter().map(move |frequency| f64::from(position as f32 * frequency))
        });
        let (cosines, sines): (Vec<f32>, Vec<f32>) =
            angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip();
        let cos_sin = [self.gpu.upload(Element::F32, &cosines)?, self.gpu.upload(Element::F32, &sines)?];
        *held = Some(RotaryArrays { positions, cos_sin: cos_sin.clone() });
        Ok(cos_sin)
    }
}

/// What products compute in: f32 is f32 whatever the file has, as on the CPU, which holds bf16 weights without
/// rounding what they are multiplied with.
fn element_of(weights: &BaseWeights) -> Element {
    if weights.embed.rounds_inputs() { Element::Bf16 } else { Element::F32 }
}

/// Refuses a model for which there is no room.
fn check_memory(gpu: &Gpu, element: Element, weights: &BaseWeights) -> Result<(), GpuError> {
    let Some([free, total]) = gpu.memory()? else { return Ok(()) };
    let tied = weights.embed.shares_storage(&weights.head);
    let tables = if tied { vec![&weights.embed] } else { vec![&weights.embed, &weights.head] };
    let layers = weights.layers.iter().flat_map(matrices);
    let values: usize = tables.into_iter().chain(layers).map(|m| m.out_features() * m.in_features()).sum();
    let bytes = values * element.bytes();
    if bytes as u64 > free {
        let problem = format!("the model's weights take {bytes}; {free} of {total} are free");
        return Err(GpuError::OutOfMemory { bytes, problem });
    }
    Ok(())
}

fn matrices(layer: &LayerWeights) -> Vec<&Matrix> {
    let LayerWeights { q, k, v, o, mlp, .. } = layer;
    match mlp {
        Mlp::Dense(mlp) => vec![q, k, v, o, &mlp.gate, &mlp.up, &mlp.down],
        Mlp::Experts(_) => vec![q, k, v, o],
    }
}

struct Upload<'a> {
    gpu: &'a Gpu,
    element: Element,
}

impl Upload<'_> {
    fn matrix(&self, matrix: &Matrix) -> Result<Array, GpuError> {
        let mut values = vec![0.0; matrix.out_features() * matrix.in_features()];
        for (output, row) in values.chunks_exact_mut(matrix.in_features()).enumerate() {
            matrix.copy_row(output, row);
        }
        self.gpu.upload(self.element, &values)
    }

    fn vector(&self, values: &[f32]) -> Result<Array, GpuError> {
        self.gpu.upload(Element::F32, values)
    }

    fn layer(&self, layer: &LayerWeights) -> Result<DeviceLayer, GpuError> {
        let LayerWeights { attn_norm, q, k, v, o, qkv_bias, qk_norm, mlp_norm, mlp } = layer;
        let Mlp::Dense(mlp) = mlp else { unreachable!("`check` refuses mixtures") };
        let bias = qkv_bias.as_ref().map(|bias| -> Result<_, GpuError> {
            Ok([self.vector(&bias.q)?, self.vector(&bias.k)?, self.vector(&bias.v)?])
        });
        let norm = qk_norm
            .as_ref()
            .map(|norm| -> Result<_, GpuError> { Ok([self.vector(&norm.q)?, self.vector(&norm.k)?]) });
        Ok(DeviceLayer {
            attn_norm: self.vector(attn_norm)?,
            q: self.matrix(q)?,
            k: self.matrix(k)?,
            v: self.matrix(v)?,
            o: self.matrix(o)?,
            qkv_bias: bias.transpose()?,
            qk_norm: norm.transpose()?,
            mlp_norm: self.vector(mlp_norm)?,
            gate: self.matrix(&mlp.gate)?,
            up: self.matrix(&mlp.up)?,
            down: self.matrix(&mlp.down)?,
        })
    }
}
