//! The decoder with candle's operations, all of which have a backward, in f64.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::targets;
use crate::{
    kernels::Matrix,
    model::{
        Adapter, BaseModel, ExpertsWeights, LayerWeights, LoraEntry, LoraLayout, Mlp, MlpWeights, ModelConfig,
    },
    types::LoraTarget,
};

pub(super) struct Reference<'a> {
    model: &'a BaseModel,
    matrices: Vec<(Var, Var)>,
    layout: Arc<LoraLayout>,
}

impl<'a> Reference<'a> {
    pub(super) fn new(model: &'a BaseModel, adapter: &Adapter) -> Self {
        let rank = adapter.layout.config.rank as usize;
        let var = |values: &[f32], shape: (usize, usize)| {
            let values: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
            Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
        };
        let matrices = adapter.layout.entries.iter().map(|entry| {
            let a = var(&adapter.values[entry.a.clone()], (rank, entry.in_features));
            (a, var(&adapter.values[entry.b.clone()], (entry.out_features, rank)))
        });
        Self { model, matrices: matrices.collect(), layout: adapter.layout.clone() }
    }

    fn linear(&self, x: &Tensor, weight: &Matrix, layer: usize, target: LoraTarget) -> Tensor {
        self.linear_of(x, weight, layer, target, None)
    }

    fn linear_of(
        &self,
        x: &Tensor,
        weight: &Matrix,
        layer: usize,
        target: LoraTarget,
        expert: Option<usize>,
    ) -> Tensor {
        let y = x.matmul(&dense(weight).t().unwrap()).unwrap();
        let is_it = |e: &LoraEntry| (e.layer, e.target, e.expert) == (layer, target, expert);
        let index = self.layout.entries.iter().position(is_it);
        let Some(index) = index else { return y };
        let (a, b) = &self.matrices[index];
        let low = x.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
        (y + (low * f64::from(self.layout.scale())).unwrap()).unwrap()
    }

    fn attend(&self, normed: &Tensor, index: usize, layer: &LayerWeights) -> Tensor {
        let config = &self.model.config;
        let mut q = self.linear(normed, &layer.q, index, LoraTarget::QProj);
        let mut k = self.linear(normed, &layer.k, index, LoraTarget::KProj);
        let mut v = self.linear(normed, &layer.v, index, LoraTarget::VProj);
        if let Some(bias) = &layer.qkv_bias {
            let add = |x: &Tensor, bias: &[f32]| x.broadcast_add(&vector(bias)).unwrap();
            (q, k, v) = (add(&q, &bias.q), add(&k, &bias.k), add(&v, &bias.v));
        }
        if let Some(weights) = &layer.qk_norm {
            let by_head = |x: &Tensor, weight: &[f32]| {
                let heads = x.reshape(((), config.head_dim)).unwrap();
                norm(&heads, weight, f64::from(config.rms_norm_eps)).reshape(x.shape()).unwrap()
            };
            (q, k) = (by_head(&q, &weights.q), by_head(&k, &weights.k));
        }
        attend(&q, &k, &v, config)
    }

    fn hidden(&self, tokens: &[u32]) -> Tensor {
        let (config, weights) = (&self.model.config, self.model.weights());
        let eps = f64::from(config.rms_norm_eps);
        let ids = Tensor::new(tokens, &Device::Cpu).unwrap();
        let mut x = dense(&weights.embed).index_select(&ids, 0).unwrap();
        for (index, layer) in weights.layers.iter().enumerate() {
            let normed = norm(&x, &layer.attn_norm, eps);
            let attended = self.attend(&normed, index, layer);
            x = (x + self.linear(&attended, &layer.o, index, LoraTarget::OProj)).unwrap();
            let normed = norm(&x, &layer.mlp_norm, eps);
            let change = match &layer.mlp {
                Mlp::Dense(mlp) => self.mlp(&normed, mlp, index, None),
                Mlp::Experts(experts) => self.mixture(&normed, experts, index),
            };
            x = (x + change).unwrap();
        }
        norm(&x, &weights.final_norm, eps)
    }

    fn mlp(&self, x: &Tensor, mlp: &MlpWeights, layer: usize, expert: Option<usize>) -> Tensor {
        let gate = self.linear_of(x, &mlp.gate, layer, LoraTarget::GateProj, expert);
        let up = self.linear_of(x, &mlp.up, layer, LoraTarget::UpProj, expert);
        let gated = (gate.silu().unwrap() * up).unwrap();
        self.linear_of(&gated, &mlp.down, layer, LoraTarget::DownProj, expert)
    }

    /// Every expert computes every row; the weights of those that a row didn't choose are zero.
    fn mixture(&self, x: &Tensor, weights: &ExpertsWeights, layer: usize) -> Tensor {
        let logits = x.matmul(&dense(&weights.router).t().unwrap()).unwrap();
        let exponentials = logits.exp().unwrap();
        let probabilities = exponentials.broadcast_div(&exponentials.sum_keepdim(1).unwrap()).unwrap();
        let mask: Vec<f64> = probabilities
            .to_vec2::<f64>()
            .unwrap()
            .iter()
            .flat_map(|row| {
                let mut ranked: Vec<usize> = (0..row.len()).collect();
                ranked.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
                let chosen = ranked[..weights.per_row].to_vec();
                (0..row.len()).map(move |expert| f64::from(u8::from(chosen.contains(&expert))))
            })
            .collect();
        let mask = Tensor::from_vec(mask, probabilities.shape(), &Device::Cpu).unwrap();
        let mut chosen = (probabilities * mask).unwrap();
        if weights.normalises {
            chosen = chosen.broadcast_div(&chosen.sum_keepdim(1).unwrap()).unwrap();
        }
        let of_expert = |(expert, mlp): (usize, &MlpWeights)| {
            let weight = chosen.narrow(1, expert, 1).unwrap();
            self.mlp(x, mlp, layer, Some(expert)).broadcast_mul(&weight).unwrap()
        };
        let parts = weights.experts.iter().enumerate().map(of_expert);
        parts.reduce(|sum, part| (sum + part).unwrap()).unwrap()
    }

    pub(super) fn train(&self, sequences: &[Vec<u32>]) -> (Vec<f64>, Vec<f64>) {
        let hidden: Vec<Tensor> = sequences.iter().map(|tokens| self.hidden(tokens)).collect();
        let hidden = Tensor::cat(&hidden, 0).unwrap();
        let logits = self.linear(&hidden, &self.model.weights().head, LoraEntry::HEAD, LoraTarget::LmHead);
        let lse = logits.exp().unwrap().sum_keepdim(1).unwrap().log().unwrap();
        let all = logits.broadcast_sub(&lse).unwrap();
        let (targets, factors) = targets(sequences);
        let rows: Vec<u32> = targets.iter().map(|(row, _)| *row as u32).collect();
        let ids: Vec<u32> = targets.iter().map(|(_, token)| *token).collect();
        let count = targets.len();
        let of_rows = all.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap();
        let ids = Tensor::from_vec(ids, (count, 1), &Device::Cpu).unwrap();
        let logprobs = of_rows.gather(&ids, 1).unwrap().flatten_all().unwrap();
        let factors: Vec<f64> = factors.iter().map(|f| f64::from(*f)).collect();
        let sum = (&logprobs * Tensor::new(factors, &Device::Cpu).unwrap()).unwrap().sum_all().unwrap();
        let gradients = sum.backward().unwrap();
        let flat = |var: &Var| match gradients.get(var) {
            Some(gradient) => gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap(),
            None => panic!("candle cut the graph"),
        };
        let gradient = self.matrices.iter().flat_map(|(a, b)| [flat(a), flat(b)].concat()).collect();
        (gradient, logprobs.to_vec1().unwrap())
    }
}

fn dense(matrix: &Matrix) -> Tensor {
    let (outputs, inputs) = (matrix.out_features(), matrix.in_features());
    let mut rows = vec![0.0; outputs * inputs];
    for (output, row) in rows.chunks_exact_mut(inputs).enumerate() {
        matrix.copy_row(output, row);
    }
    Tensor::from_vec(rows, (outputs, inputs), &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
}

fn norm(x: &Tensor, weight: &[f32], eps: f64) -> Tensor {
    let mean = x.sqr().unwrap().mean_keepdim(1).unwrap();
    let normed = x.broadcast_div(&(mean + eps).unwrap().sqrt().unwrap()).unwrap();
    normed.broadcast_mul(&vector(weight)).unwrap()
}

fn vector(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
}

fn attend(q: &Tensor, k: &Tensor, v: &Tensor, config: &ModelConfig) -> Tensor {
    let rows = q.dim(0).unwrap();
    let (group, dim) = (config.num_heads / config.num_kv_heads, config.head_dim);
    let head = |x: &Tensor, head: usize| x.narrow(1, head * dim, dim).unwrap();
    let mask: Vec<f64> =
        (0..rows * rows).map(|i| if i % rows > i / rows { f64::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(mask, (rows, rows), &Device::Cpu).unwrap();
    let heads: Vec<Tensor> = (0..config.num_heads)
        .map(|index| {
            let q = rotate(&head(q, index), config);
            let k = rotate(&head(k, index / group), config);
            let scores = (q.matmul(&k.t().unwrap()).unwrap() / (dim as f64).sqrt()).unwrap();
            let weights = (scores + &mask).unwrap().exp().unwrap();
            let weights = weights.broadcast_div(&weights.sum_keepdim(1).unwrap()).unwrap();
            weights.matmul(&head(v, index / group).contiguous().unwrap()).unwrap()
        })
        .collect();
    Tensor::cat(&heads, 1).unwrap()
}

fn rotate(x: &Tensor, config: &ModelConfig) -> Tensor {
    let (rows, half) = (x.dim(0).unwrap(), config.head_dim / 2);
    // What the frequencies should be is compared with transformers in tests/training_math.rs.
    let frequencies = config.rope_frequencies();
    let angle = |i: usize| (i / half) as f64 * f64::from(frequencies[i % half]);
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f64> = (0..rows * half).map(|i| f(angle(i))).collect();
        Tensor::from_vec(values, (rows, half), &Device::Cpu).unwrap()
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let (low, high) = (x.narrow(1, 0, half).unwrap(), x.narrow(1, half, half).unwrap());
    let new_low = ((&low * &cos).unwrap() - (&high * &sin).unwrap()).unwrap();
    let new_high = ((&high * &cos).unwrap() + (&low * &sin).unwrap()).unwrap();
    Tensor::cat(&[new_low, new_high], 1).unwrap()
}
