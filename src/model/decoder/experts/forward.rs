use crate::{
    kernels::swiglu,
    model::{
        ExpertsWeights,
        decoder::{
            Workspace,
            forward::{ForwardLayer, Wanted},
            head::project,
            plan::Share,
            tape::Activations,
        },
    },
    types::LoraTarget::{DownProj, GateProj, UpProj},
};

use super::Routing;

impl ForwardLayer<'_> {
    /// From the normed middle to the change of the residual stream, through each row's experts.
    pub(in crate::model::decoder) fn mixture(
        &self,
        wanted: Wanted,
        weights: &ExpertsWeights,
        activations: &mut Activations,
        workspace: &mut Workspace,
    ) {
        let Workspace { normed_rd, slots_sd, gated_ri, change_rd, .. } = workspace;
        let Activations { gate_ri, up_ri, routing, low, .. } = activations;
        self.route(weights, normed_rd, routing);
        let hidden = self.model.config.hidden_size;
        let wide = weights.experts.first().map_or(0, |expert| expert.gate.out_features());
        let slots = routing.slots();
        let x_sd = slots_sd.resize(slots * hidden);
        routing.gather(normed_rd, x_sd, self.team);

        let (gate, up) = (gate_ri.resize(slots * wide), up_ri.resize(slots * wide));
        for (expert, share) in routing.shares() {
            let mlp = &weights.experts[expert];
            let segments = routing.segments(&share, &self.plan.segments);
            let [rows_sd, rows_si] = [hidden, wide].map(|width| share.start * width..share.end * width);
            let share = Share { expert, rows: share, of: slots, segments: &segments };
            let layers =
                [(GateProj, &mlp.gate, &mut gate[rows_si.clone()]), (UpProj, &mlp.up, &mut up[rows_si])];
            self.linear(share, &x_sd[rows_sd], layers, low);
        }
        let gated = gated_ri.resize(slots * wide);
        swiglu(gate, up, gated, self.team);
        routing.weigh(gated, self.team);

        // What the experts read is spent; its memory takes what they return.
        for (expert, share) in routing.shares() {
            let mlp = &weights.experts[expert];
            let segments = routing.segments(&share, &self.plan.segments);
            let [rows_sd, rows_si] = [hidden, wide].map(|width| share.start * width..share.end * width);
            let share = Share { expert, rows: share, of: slots, segments: &segments };
            let layers = [(DownProj, &mlp.down, &mut x_sd[rows_sd])];
            self.linear_for(wanted, share, &gated[rows_si], layers, low);
        }
        if wanted == Wanted::Activations {
            return;
        }
        let change = change_rd.resize(self.plan.rows * hidden);
        change.fill(0.0);
        routing.add_up(x_sd, change, self.team);
    }

    /// Asks the router where each row goes.
    fn route(&self, weights: &ExpertsWeights, normed_rd: &[f32], routing: &mut Routing) {
        let (rows, experts, per_row) = (self.plan.rows, weights.experts.len(), weights.per_row);
        let scores = routing.probabilities_re.resize(rows * experts);
        project(&weights.router, normed_rd, rows, scores, self.team);
        routing.chosen.resize(rows * per_row, 0);
        routing.weights.resize(rows * per_row, 0.0);
        weights.router().choose(scores, &mut routing.chosen, &mut routing.weights, self.team);
        routing.arrange(experts, per_row);
    }
}
