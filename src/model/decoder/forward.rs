use crate::{
    kernels::{
        self, KvBlocks, Layer, Matrix, Shared, Team, Turn, add, add_bias, append, attention, for_rows,
        rms_norm, swiglu,
    },
    model::{BaseModel, Batch, KvCache, LayerWeights, Mlp},
    types::LoraTarget,
};

use super::{
    Tape, Workspace,
    plan::{Plan, Share},
    tape::Activations,
};

/// Runs the decoder over `batch` and returns the final hidden states after the last norm,
/// `[rows, hidden]`, rows in the batch's order.
///
/// With a `tape`, records what [`backward`](super::backward) needs (all rows must then share one
/// adapter and have no cache). A row's bits depend on its sequence and its adapter only: not on
/// its neighbours, the number of rows, the team, or on whether earlier positions came through the
/// cache in one call or several.
///
/// # Panics
///
/// If a token is outside the vocabulary, an adapter's layout is another model's, or a tape is asked
/// for a batch with caches or several adapters.
pub fn forward(
    model: &BaseModel,
    batch: &mut Batch<'_>,
    mut tape: Option<&mut Tape>,
    workspace: &mut Workspace,
    team: &Team,
) -> Vec<f32> {
    let plan = Plan::new(batch);
    let hidden = model.config.hidden_size;
    if let Some(tape) = tape.as_deref_mut() {
        let no_cache = batch.sequences.iter().all(|sequence| sequence.kv_cache.is_none());
        assert!(no_cache && plan.segments.len() <= 1, "a tape holds whole sequences of one adapter");
        tape.begin(&plan, model.config.num_layers, workspace);
    }
    let longest = plan.spans.iter().map(|span| span.start + span.rows).max().unwrap_or(0);
    workspace.rotary.prepare(&model.config.rope_frequencies(), longest);

    let mut own_caches = std::mem::take(&mut workspace.own_caches);
    let heads = model.config.heads();
    own_caches.resize_with(batch.sequences.len().max(own_caches.len()), || KvCache::with_layers(heads, 1));
    let caches = batch.sequences.iter_mut().zip(&mut own_caches);
    let blocks: Vec<KvBlocks<'_>> = caches
        .map(|(sequence, own)| match &mut sequence.kv_cache {
            Some(cache) => cache.reserve(sequence.tokens.len()),
            None => {
                own.clear(heads);
                own.reserve(sequence.tokens.len())
            }
        })
        .collect();

    embed(&model.weights().embed, &plan.tokens, workspace.next_rd.resize(plan.rows * hidden), team);
    for (index, weights) in model.weights().layers.iter().enumerate() {
        let mut activations = match tape.as_deref_mut() {
            Some(tape) if !tape.recomputes => std::mem::take(&mut tape.layers[index]),
            _ => std::mem::take(&mut workspace.activations),
        };
        // What the last layer left is this one's input.
        std::mem::swap(&mut activations.input_rd, &mut workspace.next_rd);
        let layer = ForwardLayer { model, weights, index, plan: &plan, blocks: &blocks, team };
        layer.run(Wanted::Result, &mut activations, workspace);
        match tape.as_deref_mut() {
            Some(tape) if !tape.recomputes => tape.layers[index] = activations,
            Some(tape) => {
                std::mem::swap(&mut tape.layers[index].input_rd, &mut activations.input_rd);
                workspace.activations = activations;
            }
            None => workspace.activations = activations,
        }
        workspace.layer_done();
    }
    let mut hidden_rd = vec![0.0; plan.rows * hidden];
    let eps = model.config.rms_norm_eps;
    rms_norm(&workspace.next_rd, &model.weights().final_norm, eps, &mut hidden_rd, team);

    drop(blocks);
    workspace.own_caches = own_caches;
    for sequence in &mut batch.sequences {
        if let Some(cache) = &mut sequence.kv_cache {
            cache.advance(sequence.tokens.len());
        }
    }
    if let Some(tape) = tape {
        std::mem::swap(&mut tape.last_rd, &mut workspace.next_rd);
    }
    hidden_rd
}

impl Tape {
    fn begin(&mut self, plan: &Plan<'_>, layers: usize, workspace: &mut Workspace) {
        if self.layers.is_empty() {
            self.layers = std::mem::take(&mut workspace.spare);
        }
        self.layers.resize_with(layers, Activations::default);
        self.recomputes = workspace.options.activation_checkpointing;
        self.rows = plan.rows;
        self.spans.clone_from(&plan.spans);
        self.positions.clone_from(&plan.positions);
    }
}

/// `x[r] = embedding of token r`.
fn embed(embedding: &Matrix, tokens: &[u32], x_rd: &mut [f32], team: &Team) {
    let hidden = embedding.in_features();
    let x_rd = Shared::new(x_rd);
    for_rows(team, tokens.len(), hidden, |rows| {
        for row in rows {
            // SAFETY: tasks have distinct rows.
            let x = unsafe { x_rd.part(row * hidden..(row + 1) * hidden) };
            embedding.copy_row(tokens[row] as usize, x);
        }
    });
}

/// What a layer is run for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Result,
    /// Only what its backward reads: the last product is left out.
    Activations,
}

/// One decoder block on its way forward.
pub(super) struct ForwardLayer<'a> {
    pub model: &'a BaseModel,
    pub weights: &'a LayerWeights,
    pub index: usize,
    pub plan: &'a Plan<'a>,
    pub blocks: &'a [KvBlocks<'a>],
    pub team: &'a Team,
}

impl ForwardLayer<'_> {
    /// Reads `activations.input_rd` and leaves the layer's result in `workspace.next_rd`, if it is wanted.
    pub(super) fn run(&self, wanted: Wanted, activations: &mut Activations, workspace: &mut Workspace) {
        let config = &self.model.config;
        let eps = config.rms_norm_eps;
        let len_rd = self.plan.rows * config.hidden_size;
        let normed = workspace.normed_rd.resize(len_rd);
        rms_norm(&activations.input_rd, &self.weights.attn_norm, eps, normed, self.team);
        self.attend(activations, workspace);
        let change = workspace.change_rd.resize(len_rd);
        let Activations { attended_rq, low, .. } = &mut *activations;
        self.linear(self.plan.whole(), attended_rq, [(LoraTarget::OProj, &self.weights.o, change)], low);
        let middle = activations.middle_rd.resize(len_rd);
        add(&activations.input_rd, &workspace.change_rd, middle, self.team);

        rms_norm(middle, &self.weights.mlp_norm, eps, &mut workspace.normed_rd, self.team);
        self.feed_forward(wanted, activations, workspace);
        if wanted == Wanted::Activations {
            return;
        }
        let next = workspace.next_rd.resize(len_rd);
        add(&activations.middle_rd, &workspace.change_rd, next, self.team);
    }

    /// From the normed input to `attended_rq`.
    fn attend(&self, activations: &mut Activations, workspace: &mut Workspace) {
        let (rows, heads) = (self.plan.rows, self.model.config.heads());
        let (len_q, len_k) = (rows * heads.queries * heads.dim, rows * heads.keys * heads.dim);
        self.queries_keys_values(len_q, len_k, activations, &workspace.normed_rd);
        let Activations { q_rq: q, k_rk: k, v_rk: v, attended_rq, lse, .. } = activations;
        workspace.rotary.turn(q, &self.plan.positions, Turn::Forward, self.team);
        workspace.rotary.turn(k, &self.plan.positions, Turn::Forward, self.team);
        let spans = &self.plan.spans;
        append(heads, self.index, spans, k, v, self.blocks, self.team);
        let (out, lse) = (attended_rq.resize(len_q), lse.resize(rows * heads.queries));
        attention(heads, self.index, spans, q, self.blocks, out, Some(lse), self.team);
    }

    /// From the normed input to queries, keys and values, not yet turned.
    fn queries_keys_values(
        &self,
        len_q: usize,
        len_k: usize,
        activations: &mut Activations,
        normed_rd: &[f32],
    ) {
        let Activations { q_raw_rq, k_raw_rk, q_rq, k_rk, v_rk, low, .. } = activations;
        let (q, k, v) = (q_rq.resize(len_q), k_rk.resize(len_k), v_rk.resize(len_k));
        let (q_raw, k_raw) = match &self.weights.qk_norm {
            Some(_) => (q_raw_rq.resize(len_q), k_raw_rk.resize(len_k)),
            None => (&mut *q, &mut *k),
        };
        let layers = [
            (LoraTarget::QProj, &self.weights.q, &mut *q_raw),
            (LoraTarget::KProj, &self.weights.k, &mut *k_raw),
            (LoraTarget::VProj, &self.weights.v, &mut *v),
        ];
        self.linear(self.plan.whole(), normed_rd, layers, low);
        if let Some(bias) = &self.weights.qkv_bias {
            add_bias(&bias.q, q_raw, self.team);
            add_bias(&bias.k, k_raw, self.team);
            add_bias(&bias.v, v, self.team);
        }
        if let Some(norm) = &self.weights.qk_norm {
            // Each head is a row of its own.
            let eps = self.model.config.rms_norm_eps;
            rms_norm(q_raw_rq, &norm.q, eps, q, self.team);
            rms_norm(k_raw_rk, &norm.k, eps, k, self.team);
        }
    }

    /// From the normed middle to the change of the residual stream.
    fn feed_forward(&self, wanted: Wanted, activations: &mut Activations, workspace: &mut Workspace) {
        let mlp = match &self.weights.mlp {
            Mlp::Dense(mlp) => mlp,
            Mlp::Experts(experts) => return self.mixture(wanted, experts, activations, workspace),
        };
        let config = &self.model.config;
        let len_ri = self.plan.rows * config.intermediate_size;
        let Activations { gate_ri, up_ri, low, .. } = activations;
        let (gate, up) = (gate_ri.resize(len_ri), up_ri.resize(len_ri));
        let layers = [(LoraTarget::GateProj, &mlp.gate, &mut *gate), (LoraTarget::UpProj, &mlp.up, &mut *up)];
        self.linear(self.plan.whole(), &workspace.normed_rd, layers, low);
        swiglu(gate, up, workspace.gated_ri.resize(len_ri), self.team);
        let change = workspace.change_rd.resize(self.plan.rows * config.hidden_size);
        let layers = [(LoraTarget::DownProj, &mlp.down, change)];
        self.linear_for(wanted, self.plan.whole(), &workspace.gated_ri, layers, low);
    }

    /// Linear layers that read the same `x`, with the adapters of their rows; `x` and the results
    /// are those of the share's rows.
    pub(super) fn linear<const N: usize>(
        &self,
        share: Share<'_>,
        x: &[f32],
        layers: [(LoraTarget, &Matrix, &mut [f32]); N],
        low: &mut [kernels::Buffer; 7],
    ) {
        self.linear_for(Wanted::Result, share, x, layers, low);
    }

    /// The same, or only what the gradient of the layers' adapters needs of it.
    pub(super) fn linear_for<const N: usize>(
        &self,
        wanted: Wanted,
        share: Share<'_>,
        x: &[f32],
        layers: [(LoraTarget, &Matrix, &mut [f32]); N],
        low: &mut [kernels::Buffer; 7],
    ) {
        let rank = self.plan.largest_rank();
        for (target, ..) in &layers {
            low[*target as usize].resize(share.of * rank);
        }
        let low = low.each_mut().map(|buffer| Shared::new(buffer));
        let (plan, index, Share { expert, rows, segments, .. }) = (self.plan, self.index, share);
        let layers = layers.map(|(target, weight, y)| Layer {
            weight,
            low_rank: move |segment: usize| plan.adapters[segment]?.low_rank(index, target, expert),
            low: low[target as usize].range(rows.start * rank..rows.end * rank),
            low_row: rank,
            y: Shared::new(y),
        });
        match wanted {
            Wanted::Result => kernels::linear(x, segments, &layers, self.team),
            Wanted::Activations => kernels::down_projections(x, segments, &layers, self.team),
        }
    }
}
