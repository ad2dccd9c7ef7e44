use crate::{
    kernels::{
        Adapted, AttentionGradients, Buffer, Gradients, Matrix, Shared, Team, Turn, attention_backward,
        linear_backward, rms_norm, rms_norm_backward, swiglu, swiglu_backward,
    },
    model::{AdapterRows, BaseModel, LayerWeights, Mlp},
    types::LoraTarget::{self, *},
};

use super::{
    Tape, Workspace,
    plan::Share,
    recompute::Recomputation,
    tape::{Activations, LayerGradients},
};

/// Adds the gradient with respect to the adapter's values to `gradient` (`layout.len()`
/// values), given `d_hidden`, the gradient with respect to what [`forward`](super::forward)
/// returned.
///
/// Goes from the last layer to the lowest adapted one, and no further. Uses the tape up: its
/// memory goes back to the workspace.
///
/// # Panics
///
/// If the tape is used up, or was not recorded with this model and adapter.
pub fn backward(
    model: &BaseModel,
    adapter: AdapterRows<'_>,
    tape: &mut Tape,
    d_hidden: &[f32],
    gradient: &mut [f32],
    workspace: &mut Workspace,
    team: &Team,
) {
    assert_eq!(tape.layers.len(), model.weights().layers.len(), "a tape serves one backward");
    assert_eq!(gradient.len(), adapter.layout.len(), "one gradient for each value of the adapter");
    let residual = workspace.gradients.residual_rd.resize(d_hidden.len());
    residual.fill(0.0);
    let eps = model.config.rms_norm_eps;
    rms_norm_backward(&tape.last_rd, &model.weights().final_norm, eps, d_hidden, residual, team);
    let lowest = adapter.layout.entries.first().map_or(usize::MAX, |entry| entry.layer);
    let gradient = Shared::new(gradient);
    let recomputation = tape.recomputes.then(|| Recomputation::new(model, adapter, tape, team));
    let mut again = std::mem::take(&mut workspace.activations);
    for (index, weights) in model.weights().layers.iter().enumerate().rev() {
        if index < lowest {
            break;
        }
        let activations = match &recomputation {
            None => &tape.layers[index],
            Some(recomputation) => {
                std::mem::swap(&mut again.input_rd, &mut tape.layers[index].input_rd);
                recomputation.layer(index, &mut again, workspace);
                &again
            }
        };
        let layer = BackwardLayer {
            model,
            weights,
            index,
            is_lowest: index == lowest,
            adapter,
            gradient,
            tape,
            activations,
            team,
        };
        layer.run(workspace);
        workspace.layer_done();
    }
    workspace.activations = again;
    workspace.spare = std::mem::take(&mut tape.layers);
}

/// One decoder block on its way back.
pub(super) struct BackwardLayer<'a> {
    pub model: &'a BaseModel,
    pub weights: &'a LayerWeights,
    index: usize,
    /// Nothing below this layer needs a gradient.
    is_lowest: bool,
    adapter: AdapterRows<'a>,
    /// Of all values of the adapter.
    gradient: Shared<'a>,
    pub tape: &'a Tape,
    pub activations: &'a Activations,
    pub team: &'a Team,
}

impl BackwardLayer<'_> {
    /// Turns the gradient of the layer's result, in `gradients.residual_rd`, into that of its
    /// input; stops where nothing further down is adapted.
    fn run(&self, workspace: &mut Workspace) {
        self.feed_forward(workspace);
        if self.is_needed(&[QProj, KProj, VProj, OProj]) {
            self.attention(workspace);
        }
    }

    /// Whether a gradient is needed that only `targets` and lower layers use.
    pub(super) fn is_needed(&self, targets: &[LoraTarget]) -> bool {
        !self.is_lowest
            || targets.iter().any(|target| !self.adapter.layout.entries_of(self.index, *target).is_empty())
    }

    fn feed_forward(&self, workspace: &mut Workspace) {
        let mlp = match &self.weights.mlp {
            Mlp::Dense(mlp) => mlp,
            Mlp::Experts(experts) => return self.mixture(experts, workspace),
        };
        let Workspace { gradients, normed_rd, change_rd, gated_ri, .. } = workspace;
        let LayerGradients { residual_rd, gated_ri: d_gated, gate_ri, up_ri, low, .. } = gradients;
        let Activations { gate_ri: gate, up_ri: up, middle_rd, .. } = self.activations;
        let eps = self.model.config.rms_norm_eps;

        swiglu(gate, up, gated_ri.resize(gate.len()), self.team);
        let needed = self.is_needed(&[GateProj, UpProj, QProj, KProj, VProj, OProj]);
        let dx = needed.then(|| d_gated.resize(gate.len()));
        self.linear(self.whole(), gated_ri, [(DownProj, &mlp.down, residual_rd)], dx, low);
        if !needed {
            return;
        }
        let (d_gate, d_up) = (gate_ri.resize(gate.len()), up_ri.resize(up.len()));
        swiglu_backward(gate, up, d_gated, d_gate, d_up, self.team);

        let normed = normed_rd.resize(middle_rd.len());
        rms_norm(middle_rd, &self.weights.mlp_norm, eps, normed, self.team);
        let needed = self.is_needed(&[QProj, KProj, VProj, OProj]);
        let layers = [(GateProj, &mlp.gate, &*d_gate), (UpProj, &mlp.up, &*d_up)];
        self.linear(self.whole(), normed, layers, needed.then(|| change_rd.resize(middle_rd.len())), low);
        if needed {
            rms_norm_backward(middle_rd, &self.weights.mlp_norm, eps, change_rd, residual_rd, self.team);
        }
    }

    fn attention(&self, workspace: &mut Workspace) {
        let Workspace { gradients, normed_rd, change_rd, rotary, .. } = workspace;
        let LayerGradients { residual_rd, attended_rq: d_attended, low, .. } = gradients;
        let Activations { input_rd, q_raw_rq, k_raw_rk, q_rq, k_rk, v_rk, attended_rq, lse, .. } =
            self.activations;
        let eps = self.model.config.rms_norm_eps;

        let needed = self.is_needed(&[QProj, KProj, VProj]);
        let dx = needed.then(|| d_attended.resize(attended_rq.len()));
        self.linear(self.whole(), attended_rq, [(OProj, &self.weights.o, residual_rd)], dx, low);
        if !needed {
            return;
        }
        let dq = gradients.q_rq.resize(q_rq.len());
        let dk = gradients.k_rk.resize(k_rk.len());
        let dv = gradients.v_rk.resize(v_rk.len());
        let grads = AttentionGradients {
            q: q_rq,
            k: k_rk,
            v: v_rk,
            out: attended_rq,
            d_out: d_attended,
            lse,
            dq: &mut *dq,
            dk_shares: gradients.k_shares_rq.resize(q_rq.len()),
            dv_shares: gradients.v_shares_rq.resize(q_rq.len()),
            dk: &mut *dk,
            dv: &mut *dv,
        };
        attention_backward(self.model.config.heads(), &self.tape.spans, grads, self.team);
        rotary.turn(dq, &self.tape.positions, Turn::Back, self.team);
        rotary.turn(dk, &self.tape.positions, Turn::Back, self.team);
        // Attention's shares are used up; their memory takes the gradients below the norms.
        let (dq, dk) = match &self.weights.qk_norm {
            None => (dq, dk),
            Some(norm) => {
                let LayerGradients { k_shares_rq: dq_raw, v_shares_rq: dk_raw, .. } = gradients;
                (self.head_norm(q_raw_rq, &norm.q, dq, dq_raw), self.head_norm(k_raw_rk, &norm.k, dk, dk_raw))
            }
        };

        let normed = normed_rd.resize(input_rd.len());
        rms_norm(input_rd, &self.weights.attn_norm, eps, normed, self.team);
        let layers =
            [(QProj, &self.weights.q, &*dq), (KProj, &self.weights.k, &*dk), (VProj, &self.weights.v, &*dv)];
        let dx = (!self.is_lowest).then(|| change_rd.resize(input_rd.len()));
        self.linear(self.whole(), normed, layers, dx, low);
        if !self.is_lowest {
            rms_norm_backward(input_rd, &self.weights.attn_norm, eps, change_rd, residual_rd, self.team);
        }
    }

    /// The gradient of what the norm of the heads read, given that of its result.
    fn head_norm<'b>(&self, raw: &[f32], weight: &[f32], dy: &[f32], dx: &'b mut Buffer) -> &'b mut [f32] {
        let dx = dx.resize(raw.len());
        dx.fill(0.0);
        rms_norm_backward(raw, weight, self.model.config.rms_norm_eps, dy, dx, self.team);
        dx
    }

    /// All rows, before the same weights.
    fn whole(&self) -> Share<'static> {
        let rows = self.tape.rows;
        Share { expert: 0, rows: 0..rows, of: rows, segments: &[] }
    }

    /// Linear layers that read the same `x`, given the gradients of their results; all are those
    /// of the share's rows.
    pub(super) fn linear<const N: usize>(
        &self,
        share: Share<'_>,
        x: &[f32],
        layers: [(LoraTarget, &Matrix, &[f32]); N],
        dx: Option<&mut [f32]>,
        d_low: &mut [Buffer; 3],
    ) {
        let rank = self.adapter.rank();
        let low = share.rows.start * rank..share.rows.end * rank;
        let mut d_low = d_low.iter_mut();
        let layers = layers.map(|(target, weight, dy)| {
            let low_rank = self.adapter.low_rank(self.index, target, share.expert);
            let adapted = low_rank.zip(d_low.next()).and_then(|(low_rank, d_low)| {
                let entry = self.adapter.layout.entries_of(self.index, target).get(share.expert)?;
                Some(Adapted {
                    low_rank,
                    low: &self.activations.low[target as usize][low.clone()],
                    d_low: Shared::new(d_low.resize(low.len())),
                    d_a: self.gradient.range(entry.a.clone()),
                    d_b: self.gradient.range(entry.b.clone()),
                })
            });
            Gradients { weight, dy, adapted }
        });
        linear_backward(x, share.rows.len(), &layers, dx.map(Shared::new), self.team);
    }
}
