use crate::{
    kernels::{Buffer, RotaryTable, Span},
    model::{ComputeOptions, KvCache},
};

use super::experts::Routing;

/// What the forward keeps for the backward: the activations of one micro-batch.
///
/// The backward gives the memory back to the workspace, where the next forward finds it; a tape
/// is good for one backward.
#[derive(Default)]
pub struct Tape {
    /// Whether `layers` hold their inputs alone.
    pub(super) recomputes: bool,
    pub(super) rows: usize,
    pub(super) spans: Vec<Span>,
    pub(super) positions: Vec<usize>,
    pub(super) layers: Vec<Activations>,
    /// The residual stream after the last layer, `[r, d]`.
    pub(super) last_rd: Buffer,
}

/// Buffers that are used again from call to call, so that steady state allocates nothing.
#[derive(Default)]
pub struct Workspace {
    pub(super) options: ComputeOptions,
    pub(super) rotary: RotaryTable,
    /// Keys and values of sequences without a cache, of one layer at a time.
    pub(super) own_caches: Vec<KvCache>,
    /// The layer at work, if no tape keeps what it computes.
    pub(super) activations: Activations,
    /// Memory of the last tape.
    pub(super) spare: Vec<Activations>,
    pub(super) normed_rd: Buffer,
    pub(super) gated_ri: Buffer,
    /// What a block adds to the residual stream, or the gradient of what it reads.
    pub(super) change_rd: Buffer,
    /// The residual stream between two layers.
    pub(super) next_rd: Buffer,
    /// Rows brought to their experts, or what those return.
    pub(super) slots_sd: Buffer,
    pub(super) gradients: LayerGradients,
    pub(super) head: HeadBuffers,
    after_layer: Option<AfterLayer>,
}

type AfterLayer = Box<dyn FnMut() + Send>;

/// What one layer computes and its backward reads.
#[derive(Default)]
pub(super) struct Activations {
    /// The residual stream that enters the layer.
    pub input_rd: Buffer,
    /// Queries and keys as their norms read them; empty where they have none.
    pub q_raw_rq: Buffer,
    pub k_raw_rk: Buffer,
    /// Queries and keys, normed if they have norms, turned.
    pub q_rq: Buffer,
    pub k_rk: Buffer,
    pub v_rk: Buffer,
    pub attended_rq: Buffer,
    /// Per row and query head.
    pub lse: Buffer,
    /// The residual stream between attention and MLP.
    pub middle_rd: Buffer,
    /// Of each slot, `[s, i]`, where the layer has experts.
    pub gate_ri: Buffer,
    pub up_ri: Buffer,
    /// Which rows went to which expert.
    pub routing: Routing,
    /// `scale · A x` of each linear layer, `[r, rank]` or `[s, rank]`, in the order of `LoraTarget`.
    pub low: [Buffer; 7],
}

/// Gradients within one layer.
#[derive(Default)]
pub(super) struct LayerGradients {
    pub residual_rd: Buffer,
    pub gated_ri: Buffer,
    pub gate_ri: Buffer,
    pub up_ri: Buffer,
    /// Of what the experts read.
    pub slots_sd: Buffer,
    /// Of the router's logits.
    pub logits_re: Buffer,
    pub attended_rq: Buffer,
    pub q_rq: Buffer,
    pub k_shares_rq: Buffer,
    pub v_shares_rq: Buffer,
    pub k_rk: Buffer,
    pub v_rk: Buffer,
    /// `scale · dy B` of up to three layers that read the same input.
    pub low: [Buffer; 3],
}

/// Operands of the head's products.
#[derive(Default)]
pub(super) struct HeadBuffers {
    pub hidden_cd: Buffer,
    pub logits_cv: Buffer,
    /// `scale · A x` of an adapted head, and its gradient.
    pub low_cr: Buffer,
    pub d_low_cr: Buffer,
    pub d_hidden_cd: Buffer,
}

impl Workspace {
    /// How passes are computed.
    pub fn options(&self) -> ComputeOptions {
        self.options
    }

    /// Without memory yet, for passes that are computed so.
    pub fn new(options: ComputeOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// Has `call` called after each layer and each chunk of the head, either way: a pass over a long
    /// sequence takes many minutes, and whoever waits for it hears so that it goes on.
    pub fn after_each_layer(&mut self, call: impl FnMut() + Send + 'static) {
        self.after_layer = Some(Box::new(call));
    }

    pub(super) fn layer_done(&mut self) {
        if let Some(call) = &mut self.after_layer {
            call();
        }
    }
}

#[cfg(test)]
impl Workspace {
    /// Bytes of memory that it holds, the last tape's included.
    pub(super) fn allocated(&self) -> usize {
        let LayerGradients {
            residual_rd,
            gated_ri,
            gate_ri,
            up_ri,
            slots_sd,
            logits_re,
            attended_rq,
            q_rq,
            k_shares_rq,
            v_shares_rq,
            k_rk,
            v_rk,
            low,
        } = &self.gradients;
        let gradients = [
            residual_rd,
            gated_ri,
            gate_ri,
            up_ri,
            slots_sd,
            logits_re,
            attended_rq,
            q_rq,
            k_shares_rq,
            v_shares_rq,
            k_rk,
            v_rk,
        ];
        let own = [&self.normed_rd, &self.gated_ri, &self.change_rd, &self.next_rd, &self.slots_sd];
        let head = [
            &self.head.hidden_cd,
            &self.head.logits_cv,
            &self.head.d_hidden_cd,
            &self.head.low_cr,
            &self.head.d_low_cr,
        ];
        let layers: usize = self.spare.iter().chain([&self.activations]).map(Activations::allocated).sum();
        let caches: usize = self.own_caches.iter().map(KvCache::allocated).sum();
        let buffers = own.into_iter().chain(gradients).chain(head).chain(low);
        layers + caches + self.rotary.allocated() + buffers.map(Buffer::allocated).sum::<usize>()
    }
}

#[cfg(test)]
impl Activations {
    fn allocated(&self) -> usize {
        let Self {
            input_rd,
            q_raw_rq,
            k_raw_rk,
            q_rq,
            k_rk,
            v_rk,
            attended_rq,
            lse,
            middle_rd,
            gate_ri,
            up_ri,
            routing,
            low,
        } = self;
        let buffers =
            [input_rd, q_raw_rq, k_raw_rk, q_rq, k_rk, v_rk, attended_rq, lse, middle_rd, gate_ri, up_ri];
        buffers.into_iter().chain(low).map(Buffer::allocated).sum::<usize>() + routing.allocated()
    }
}
