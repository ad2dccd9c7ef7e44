use std::mem;

use crate::{
    kernels::Team,
    model::{AdapterRows, BaseModel},
};

use super::{
    Tape, Workspace,
    forward::{ForwardLayer, Wanted},
    plan::Plan,
    tape::Activations,
};

/// The activations of a layer computed a second time, from the one thing of it that the tape kept:
/// its input. They have the bits that they had at first.
pub(super) struct Recomputation<'a> {
    model: &'a BaseModel,
    plan: Plan<'a>,
    team: &'a Team,
}

impl<'a> Recomputation<'a> {
    pub(super) fn new(model: &'a BaseModel, adapter: AdapterRows<'a>, tape: &Tape, team: &'a Team) -> Self {
        let all = 0..tape.rows;
        let plan = Plan {
            rows: tape.rows,
            // Their vectors are what the first layer's input is made of.
            tokens: Vec::new(),
            positions: tape.positions.clone(),
            spans: tape.spans.clone(),
            segments: vec![all],
            adapters: vec![Some(adapter)],
        };
        Self { model, plan, team }
    }

    /// Fills `activations` with what the forward of layer `index` makes of `input_rd` in it.
    pub(super) fn layer(&self, index: usize, activations: &mut Activations, workspace: &mut Workspace) {
        let heads = self.model.config.heads();
        let mut caches = mem::take(&mut workspace.own_caches);
        let own = self.plan.spans.iter().zip(&mut caches).map(|(span, cache)| {
            cache.clear(heads);
            cache.reserve(span.rows)
        });
        let layer = ForwardLayer {
            model: self.model,
            weights: &self.model.weights().layers[index],
            index,
            plan: &self.plan,
            blocks: &own.collect::<Vec<_>>(),
            team: self.team,
        };
        layer.run(Wanted::Activations, activations, workspace);
        workspace.own_caches = caches;
    }
}
