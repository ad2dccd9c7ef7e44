//! What is counted of the state machine's events and effects as they pass through the actor.

use std::collections::BTreeMap;

use crate::{
    protocol::{ClientResponse, EndedOperations, Figures, NodeMessage},
    types::ErrorKind,
};

use super::state::{Ended, Event};

/// Counts since the start.
#[derive(Default)]
pub(super) struct Tally {
    /// By operation and outcome: how many, and their milliseconds.
    operations: BTreeMap<(&'static str, &'static str), (u64, u64)>,
    figures: Figures,
}

impl Tally {
    pub(super) fn happened(&mut self, event: &Event) {
        match event {
            Event::NodeMessage { message: NodeMessage::StageFailed { .. }, .. } => {
                self.figures.stage_failures += 1;
            }
            Event::NodeMessage { message: NodeMessage::Activated { .. }, .. } => {
                self.figures.activations += 1
            }
            _ => {}
        }
    }

    pub(super) fn answered(&mut self, response: &ClientResponse) {
        if let ClientResponse::Sample { result, .. } = response {
            self.figures.samples += 1;
            self.figures.sampled_tokens +=
                result.sequences.iter().map(|s| s.tokens.len() as u64).sum::<u64>();
        }
    }

    /// Counts an operation and tells the log, with the trace of the request that it came with.
    pub(super) fn ended(&mut self, ended: &Ended) {
        let Ended { run, seq, operation, error, took_ms, trained_tokens, trace } = ended;
        let outcome = error.map_or("done", name);
        let (count, ms) = self.operations.entry((operation, outcome)).or_default();
        (*count, *ms) = (*count + 1, *ms + took_ms);
        self.figures.trained_tokens += trained_tokens;
        let (trace_id, request_id) = trace.map_or_else(Default::default, |trace| {
            (hex::encode(trace.trace_id), hex::encode(trace.request_id))
        });
        tracing::debug!(
            target: "lockstep::operation",
            %run, seq = seq.0, operation, outcome, ms = took_ms, trace_id, request_id, "ended"
        );
    }

    pub(super) fn figures(&self) -> Figures {
        let operations = self.operations.iter().map(|((operation, outcome), (count, ms))| EndedOperations {
            operation: (*operation).to_owned(),
            outcome: (*outcome).to_owned(),
            count: *count,
            seconds: *ms as f64 / 1e3,
        });
        Figures { operations: operations.collect(), ..self.figures.clone() }
    }
}

fn name(error: ErrorKind) -> &'static str {
    match error {
        ErrorKind::InvalidInput => "invalid_input",
        ErrorKind::NotFound => "not_found",
        ErrorKind::NotFinite => "not_finite",
        ErrorKind::ResourceExhausted => "resource_exhausted",
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::DeadlineExceeded => "deadline_exceeded",
        ErrorKind::PermissionDenied => "permission_denied",
        ErrorKind::Internal => "internal",
    }
}

#[cfg(test)]
mod tests {
    use crate::{protocol::OperationSeq, types::RunId};

    use super::*;

    #[test]
    fn operations_are_counted_by_kind_and_outcome() {
        let mut tally = Tally::default();
        let mut end = |operation, error, trained_tokens| {
            let (run, seq) = (RunId(1), OperationSeq(1));
            tally.ended(&Ended { run, seq, operation, error, took_ms: 250, trained_tokens, trace: None });
        };
        end("optim_step", None, 40);
        end("optim_step", None, 2);
        end("optim_step", Some(ErrorKind::NotFinite), 0);
        let figures = tally.figures();
        assert_eq!(figures.trained_tokens, 42);
        let counted: Vec<_> =
            figures.operations.iter().map(|o| (o.outcome.as_str(), o.count, o.seconds)).collect();
        assert_eq!(counted, [("done", 2, 0.5), ("not_finite", 1, 0.25)]);
    }
}
