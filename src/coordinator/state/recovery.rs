//! A starting coordinator's state from what the journal recovered.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    journal::{Outcome, Recovered, RecoveredOperation, RecoveredRun, RecoveredSnapshot},
    protocol::{Call, Operation, OperationSeq, encode},
    types::{Digest, PolicyId},
};

use super::{
    Limits, State,
    checkpoints::Checkpoints,
    history::Kept,
    ms,
    run::{Entry, Publication, Run, after},
    trust::Trust,
    versions::Policies,
};

impl State {
    /// The state as of the last append that became durable. `now_ms`: the first of the times
    /// that [`State::handle`] gets, in milliseconds since the Unix epoch.
    pub fn recover(limits: Limits, recovered: Recovered, now_ms: u64) -> Self {
        let mut checkpoints = Checkpoints::default();
        for saved in recovered.checkpoints {
            checkpoints.insert(saved);
        }
        let mut policies = Policies::default();
        for (policy, base_model, adapter) in checkpoints.policies() {
            policies.learn(policy, base_model, adapter);
        }
        let mut owners = recovered.owners;
        let sessions = recovered.sessions.into_iter().map(|session| (session, owners.remove(&session)));
        let sessions: BTreeMap<_, _> = sessions.collect();
        let mut state = Self {
            limits,
            epoch: recovered.epoch,
            now_ms,
            wall_ms: now_ms,
            slip_ms: 0,
            last_tick_ms: now_ms,
            next_session: sessions.last_key_value().map_or(1, |(last, _)| last.0 + 1),
            sessions,
            next_run: recovered.last_run + 1,
            runs: BTreeMap::new(),
            nodes: BTreeMap::new(),
            models: BTreeMap::new(),
            ever_joined: false,
            started_ms: now_ms,
            most_slots: BTreeMap::new(),
            samplers_seen_ms: BTreeMap::new(),
            membership_changed_ms: now_ms,
            next_ping_ms: now_ms,
            ping_nonce: 0,
            checkpoints,
            policies,
            samples: BTreeMap::new(),
            waiting: BTreeSet::new(),
            // Never a number that a replica may still know from an earlier epoch.
            next_request: recovered.epoch.0 << 32,
            held: Vec::new(),
            appends: BTreeMap::new(),
            next_append: 0,
            drain: None,
            recalls: BTreeMap::new(),
            evacuated: recovered.drained,
            severed: Default::default(),
            trust: Trust::recovered(recovered.certificates, recovered.revoked),
            next_tending_ms: now_ms,
            effects: Vec::new(),
        };
        for run in recovered.runs {
            state.recover_run(run);
        }
        state
    }

    pub(super) fn recover_run(&mut self, recovered: RecoveredRun) {
        let RecoveredRun { run: id, create, model_digest, key, snapshots, operations, slots, .. } = recovered;
        // Accepted once, so there were that many.
        let most = self.most_slots.entry(create.base_model.clone()).or_default();
        *most = (*most).max(create.replicas.unwrap_or(0));
        let mut run = Run { key, ..Run::new(id, create, model_digest) };
        let covered = snapshots.last().map_or(OperationSeq(0), |newest| newest.seq);
        let (old, new): (Vec<_>, Vec<_>) = operations.into_iter().partition(|o| o.seq <= covered);
        for operation in old {
            run.recover_operation(operation, self.now_ms);
        }
        run.recover_snapshots(snapshots);
        for operation in new {
            run.recover_operation(operation, self.now_ms);
        }
        // Ranks cost memory and a replay: only for whom something waits.
        run.wanted = run.head().is_some();
        for (policy, adapter) in slots {
            self.policies.learn(policy, &run.create.base_model, adapter);
            self.policies.served.entry(policy).or_default().last_used_ms = self.now_ms;
            run.serve(policy, self.wall_ms);
        }
        run.hide_last_publish(self.now_ms + ms(self.limits.publish_deadline));
        let finished = run.operations.range(after(covered)..).map(|(seq, _)| *seq);
        let finished: Vec<_> = finished.filter(|seq| *seq <= run.finished).collect();
        self.runs.insert(id, run);
        for seq in finished {
            self.adopt_lora(id, seq);
        }
        if let Some(run) = self.runs.get_mut(&id) {
            run.forget_covered();
        }
    }
}

impl Run {
    fn recover_operation(&mut self, recovered: RecoveredOperation, now_ms: u64) {
        let RecoveredOperation { seq, key, incarnation, operation, digest, outcome } = recovered;
        let body = match &operation {
            Some(operation) => Digest::of(&encode(&as_submitted(operation))),
            // Of a pass, which is as it was submitted.
            None => digest,
        };
        let entry = Entry {
            key,
            body,
            incarnation,
            operation,
            accepted: true,
            visible: outcome.is_some(),
            outcome: None,
            since_ms: now_ms,
            call: Call::default(),
            accept_waiters: Vec::new(),
            waiters: Vec::new(),
        };
        self.operations.insert(seq, entry);
        self.keys.insert(key, seq);
        self.next_seq = self.next_seq.max(seq.0 + 1);
        self.accepted_incarnation = self.accepted_incarnation.max(incarnation);
        if let Some(outcome) = outcome {
            self.finish(seq, outcome, None);
        }
    }

    /// The newest snapshot says where the run stood, whatever is left of the operations before it.
    fn recover_snapshots(&mut self, snapshots: Vec<RecoveredSnapshot>) {
        let Some(newest) = snapshots.last() else { return };
        let standing = newest.standing.clone();
        self.snapshot = Some((newest.seq, newest.blob));
        self.finished = newest.seq;
        self.next_seq = self.next_seq.max(newest.seq.0 + 1);
        self.accepted_incarnation = self.accepted_incarnation.max(standing.incarnation);
        (self.incarnation, self.step, self.lora) = (standing.incarnation, standing.step, standing.lora);
        let kept = snapshots.into_iter().map(|RecoveredSnapshot { seq, blob, payload_bytes, .. }| Kept {
            seq,
            blob,
            payload_bytes,
        });
        self.history = kept.collect();
    }

    /// The last publish is reported again only when a sampler serves it again.
    fn hide_last_publish(&mut self, deadline_ms: u64) {
        let slots = [self.live, self.initial];
        let published = self.operations.iter_mut().rev().find_map(|(seq, entry)| {
            let publish =
                matches!(entry.operation, Some(Operation::SaveWeightsForSampler { publish: true, .. }));
            match &entry.outcome {
                Some(Outcome::Done { step, .. }) if publish => Some((*seq, *step, entry)),
                _ => None,
            }
        });
        let Some((seq, step, entry)) = published else { return };
        // One whose slot an `Init` has emptied since is served by nobody, and was reported.
        let filled = |policy: &PolicyId| policy.incarnation == entry.incarnation && policy.step == step;
        if let Some(policy) = slots.into_iter().flatten().find(filled) {
            entry.visible = false;
            let publication = Publication::new(seq, policy, deadline_ms);
            self.publishing = Some(Publication { recovered: true, ..publication });
        }
    }
}

/// An operation without what the coordinator filled in: what a retry's is compared with.
fn as_submitted(operation: &Operation) -> Operation {
    match operation.clone() {
        Operation::LoadState { path, with_optimizer, .. } => {
            Operation::LoadState { path, with_optimizer, source: None }
        }
        operation => operation,
    }
}
