//! What holds after every event. Checked in debug builds and by the simulation.

use super::{
    State,
    operations::QUEUE_MAX,
    run::{Ranks, Run, Work},
    sampling::HANDED_MAX,
};

impl State {
    /// Panics with the inequality that does not hold.
    pub fn check_invariants(&self) {
        for run in self.runs.values() {
            check_run(run);
            for node in run.rank_nodes() {
                assert!(self.nodes.contains_key(&node), "{}: a rank on {node}, which is gone", run.id);
            }
        }
        for (id, node) in &self.nodes {
            let counted = self.counted_samples(*id);
            assert_eq!((node.generating, node.generating_tokens), counted, "requests, tokens on {id}");
            let bound = HANDED_MAX * node.hello.samplers as usize;
            assert!(node.generating <= bound, "{id} has {} requests, over {bound}", node.generating);
        }
        for (policy, served) in &self.policies.served {
            assert_eq!(served.pins, self.counted_pins(*policy), "pins of {policy}");
            assert!(self.policies.get(policy).is_some(), "{policy} is served, and nobody knows its bytes");
            for node in served.standing.keys() {
                assert!(self.nodes.contains_key(node), "{policy} on {node}, which is gone");
            }
        }
        for id in self.samples.keys() {
            assert!(!self.is_stranded(*id), "request {} is looked after by nobody", id.0);
        }
    }
}

fn check_run(run: &Run) {
    let id = run.id;
    assert!(run.unfinished() <= QUEUE_MAX, "{id}: {} unfinished operations", run.unfinished());
    assert_eq!(run.keys.len(), run.operations.len(), "{id}: one key an operation");
    for (seq, entry) in &run.operations {
        assert_eq!(run.keys.get(&entry.key), Some(seq), "{id}: the key of operation {}", seq.0);
        assert!(seq.0 < run.next_seq, "{id}: operation {} was never given out", seq.0);
        let finished = *seq <= run.finished;
        assert_eq!(entry.outcome.is_some(), finished, "{id}: the outcome of operation {}", seq.0);
        assert!(!entry.visible || finished, "{id}: operation {} is seen before its outcome", seq.0);
        assert!(!finished || entry.accepted, "{id}: operation {} ran before it was durable", seq.0);
    }
    if let Some((covered, _)) = run.snapshot {
        assert!(covered <= run.finished, "{id}: a snapshot ahead of the outcomes");
    }
    match &run.work {
        Work::Idle => {}
        Work::Execute(execution) => {
            let Ranks::Formed { applied, .. } = &run.ranks else { panic!("{id}: executing without ranks") };
            let seq = execution.token.seq;
            assert!(*applied < seq, "{id}: operation {} is applied already", seq.0);
            assert_eq!(execution.token.generation, run.generation, "{id}: another generation executes");
            assert_eq!(execution.replay, seq <= run.finished, "{id}: operation {} twice", seq.0);
            assert!(execution.replay || run.head() == Some(seq), "{id}: operation {} out of order", seq.0);
        }
        Work::Conclude(conclusion) => {
            assert_eq!(run.head(), Some(conclusion.seq), "{id}: an outcome out of order");
        }
    }
}
