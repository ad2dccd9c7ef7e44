//! Publishes that can't be: refused when their turn comes where no node has a sampler for the model,
//! and ended with the nodes' reasons when none has served the weights in time. Neither may keep the
//! operations behind it waiting for ever.

use crate::{
    journal::{JournalError, Outcome, Record},
    protocol::{NodeId, OperationSeq},
    types::{ErrorKind, OperationError, PolicyId, RunId},
};

use super::{
    Appending, State, ms,
    run::{Run, Work},
    versions::Standing,
};

/// How long to wait before a failure is written again that could not be made durable.
const WRITE_AGAIN_MS: u64 = 1_000;

/// Whether a run's weights can be published now.
pub(super) enum Samplers {
    There,
    /// One may come, or come back.
    Awaited,
    Missing(OperationError),
}

impl State {
    /// Looks for a node with a sampler for the model that a run trains.
    pub(super) fn samplers_for(&self, run: &Run) -> Samplers {
        let model = &run.create.base_model;
        let serves = |(id, node): (&NodeId, &super::Node)| {
            node.hello.samplers > 0 && node.offers(model, run.model_digest) && !self.is_evacuated(*id)
        };
        if self.nodes.iter().any(serves) {
            return Samplers::There;
        }
        let seen_ms = self.samplers_seen_ms.get(model).copied().unwrap_or(self.started_ms);
        let grace = self.limits.sampler_grace;
        if self.now_ms < seen_ms + ms(grace) {
            return Samplers::Awaited;
        }
        let problem = format!(
            "not published: no node with a sampler for {model:?} has been there for {} s; start one, or save \
             without publishing (save_weights_for_sampler)",
            grace.as_secs()
        );
        Samplers::Missing(OperationError::new(ErrorKind::Unavailable, problem))
    }

    /// Ends a publish that no replica serves by its deadline, nor is about to.
    pub(super) fn expire_publish(&mut self, id: RunId) {
        let now_ms = self.now_ms;
        let Some(run) = self.runs.get(&id) else { return };
        let Some(publication) = run.publishing.as_ref().filter(|p| p.deadline_ms <= now_ms) else { return };
        let (seq, policy) = (publication.seq, publication.policy);
        // An `Init` on its way to the disk empties the slots that are put right here.
        if publication.failing || self.is_arriving(policy) || matches!(run.work, Work::Conclude(_)) {
            return;
        }
        if publication.recovered {
            // It was done before this life, and may have been reported so: that does not change.
            return self.end_publish(id, seq);
        }
        let reasons: Vec<String> =
            publication.reasons.iter().map(|(node, why)| format!("node {node}: {why}")).collect();
        let reasons =
            if reasons.is_empty() { "no node with a sampler came".to_owned() } else { reasons.join("; ") };
        let message = format!(
            "{policy} was saved, but not published: no sampler served it within {} s ({reasons})",
            self.limits.publish_deadline.as_secs()
        );
        self.fail_publish(id, OperationError::new(ErrorKind::Unavailable, message));
    }

    /// Whether some node has the policy, or will within a deadline of its own.
    fn is_arriving(&self, policy: PolicyId) -> bool {
        let standing =
            self.policies.served.get(&policy).into_iter().flat_map(|served| served.standing.values());
        standing
            .into_iter()
            .any(|s| matches!(s, Standing::Staged | Standing::Activating { .. } | Standing::Active))
    }

    /// Journals that the operation failed after all, and what its slot held before.
    fn fail_publish(&mut self, id: RunId, error: OperationError) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        let before = match &run.publishing {
            Some(p) if p.policy.step == 0 => run.initial,
            _ => run.live,
        };
        let base_model = run.create.base_model.clone();
        let Some(publication) = &mut run.publishing else { return };
        publication.failing = true;
        let (seq, policy) = (publication.seq, publication.policy);
        let mut records = vec![Record::PublishFailed { run: id, seq, policy, error: error.clone() }];
        if let Some((before, known)) = before.and_then(|policy| Some((policy, self.policies.get(&policy)?))) {
            records.push(Record::Slot { policy: before, base_model, adapter: known.adapter });
        }
        self.append(records, Appending::PublishFailed { run: id, seq, error });
    }

    pub(super) fn publish_failed(
        &mut self,
        id: RunId,
        seq: OperationSeq,
        error: OperationError,
        result: Result<(), JournalError>,
    ) {
        let again_ms = self.now_ms + WRITE_AGAIN_MS;
        let Some(run) = self.runs.get_mut(&id) else { return };
        if let Err(why) = result {
            tracing::error!(run = %id, operation = seq.0, "that it failed is not durable, trying again: {why}");
            if let Some(publication) = &mut run.publishing {
                (publication.failing, publication.deadline_ms) = (false, again_ms);
            }
            return;
        }
        if let Some(entry) = run.operations.get_mut(&seq) {
            entry.outcome = Some(Outcome::Failed { error });
        }
        self.end_publish(id, seq);
    }

    /// Shows the outcome as it stands, and lets the next publish begin.
    fn end_publish(&mut self, id: RunId, seq: OperationSeq) {
        if let Some(run) = self.runs.get_mut(&id) {
            run.publishing = None;
        }
        self.show(id, seq);
        self.advance(id);
    }
}
