use crate::{
    kernels::{Gradients, Shared, linear_backward, rms_norm, rms_norm_backward, swiglu, swiglu_backward},
    model::{
        ExpertsWeights,
        decoder::{
            Workspace,
            backward::BackwardLayer,
            plan::Share,
            tape::{Activations, LayerGradients},
        },
    },
    types::LoraTarget::*,
};

impl BackwardLayer<'_> {
    /// Turns the gradient of the layer's result, in `gradients.residual_rd`, into that of the
    /// middle of the layer, through the experts and through what the router made of each row. The
    /// router itself is frozen.
    pub(in crate::model::decoder) fn mixture(&self, weights: &ExpertsWeights, workspace: &mut Workspace) {
        let Workspace { gradients, normed_rd, change_rd, gated_ri, slots_sd, .. } = workspace;
        let LayerGradients {
            residual_rd,
            gated_ri: d_gated,
            gate_ri,
            up_ri,
            slots_sd: dx_sd,
            logits_re,
            low,
            ..
        } = gradients;
        let Activations { gate_ri: gate, up_ri: up, middle_rd, routing, .. } = self.activations;
        let eps = self.model.config.rms_norm_eps;
        let hidden = self.model.config.hidden_size;
        let slots = routing.slots();
        let wide = gate.len() / slots.max(1);
        let share = |expert: usize, rows| Share { expert, rows, of: slots, segments: &[] };

        let dy_sd = slots_sd.resize(slots * hidden);
        routing.gather(residual_rd, dy_sd, self.team);
        let gated = gated_ri.resize(gate.len());
        swiglu(gate, up, gated, self.team);
        routing.weigh(gated, self.team);
        let needed = self.is_needed(&[GateProj, UpProj, QProj, KProj, VProj, OProj]);
        let d_gated = d_gated.resize(gate.len());
        for (expert, rows) in routing.shares() {
            let [rows_sd, rows_si] = [hidden, wide].map(|width| rows.start * width..rows.end * width);
            let layers = [(DownProj, &weights.experts[expert].down, &dy_sd[rows_sd])];
            let dx = needed.then_some(&mut d_gated[rows_si.clone()]);
            self.linear(share(expert, rows), &gated[rows_si], layers, dx, low);
        }
        if !needed {
            return;
        }
        let needed = self.is_needed(&[QProj, KProj, VProj, OProj]);
        let d_weights = needed.then(|| {
            // As they were before they were weighed.
            swiglu(gate, up, gated, self.team);
            routing.weight_gradients(gated, d_gated, self.team)
        });
        routing.weigh(d_gated, self.team);
        let (d_gate, d_up) = (gate_ri.resize(gate.len()), up_ri.resize(up.len()));
        swiglu_backward(gate, up, d_gated, d_gate, d_up, self.team);

        let normed = normed_rd.resize(middle_rd.len());
        rms_norm(middle_rd, &self.weights.mlp_norm, eps, normed, self.team);
        let (x_sd, dx_sd) = (dy_sd, dx_sd.resize(slots * hidden));
        routing.gather(normed, x_sd, self.team);
        for (expert, rows) in routing.shares() {
            let [rows_sd, rows_si] = [hidden, wide].map(|width| rows.start * width..rows.end * width);
            let mlp = &weights.experts[expert];
            let layers = [(GateProj, &mlp.gate, &d_gate[rows_si.clone()]), (UpProj, &mlp.up, &d_up[rows_si])];
            let dx = needed.then_some(&mut dx_sd[rows_sd.clone()]);
            self.linear(share(expert, rows), &x_sd[rows_sd], layers, dx, low);
        }
        let Some(d_weights) = d_weights else { return };
        let d_logits = logits_re.resize(routing.probabilities_re.len());
        let (chosen, of_chosen) = (&routing.chosen, &routing.weights);
        weights.router().backward(&routing.probabilities_re, chosen, of_chosen, &d_weights, d_logits);
        let router = Gradients { weight: &weights.router, dy: d_logits, adapted: None };
        let change = change_rd.resize(middle_rd.len());
        linear_backward(&[], self.tape.rows, &[router], Some(Shared::new(change)), self.team);
        routing.add_up(dx_sd, change, self.team);
        rms_norm_backward(middle_rd, &self.weights.mlp_norm, eps, change, residual_rd, self.team);
    }
}
