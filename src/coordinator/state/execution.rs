//! Operations on the ranks: one at a time in a run's order, first those that a new rank set
//! must repeat, then the queue.

use std::collections::BTreeMap;

use crate::{
    journal::Outcome,
    protocol::{Blame, CoordinatorMessage, LoadSource, NodeId, OpToken, Operation, OperationSeq, RankIndex},
    types::{CheckpointTarget, ErrorKind, OperationError, RunId},
};

use super::{
    State,
    checkpoints::LoadPath,
    fault, ms,
    run::{Answer, Execution, Ranks, Run, Work},
    unpublished::Samplers,
};

impl State {
    /// Begins whatever the run can do next. Called after everything that may have made a
    /// difference; does nothing if nothing can begin.
    pub(super) fn advance(&mut self, id: RunId) {
        let Some(run) = self.runs.get(&id) else { return };
        if !matches!(run.work, Work::Idle) {
            return;
        }
        if let (Some(error), Some(_)) = (&run.broken, &run.replaying) {
            let difference = error.message.clone();
            return self.end_replay(id, Some(difference));
        }
        if let Some(error) = &run.broken {
            if let (Some(seq), None) = (run.head(), &self.drain) {
                let outcome = Outcome::Failed { error: error.clone() };
                self.conclude(id, seq, outcome, None, None, None);
            }
            return;
        }
        match run.ranks {
            Ranks::Absent => self.place(id),
            Ranks::Forming { .. } => {}
            Ranks::Formed { applied, .. } => match run.next_replay(applied) {
                Some(seq) if self.drain.is_none() => self.replay(id, seq),
                Some(_) => {}
                None => self.advance_formed(id),
            },
        }
    }

    /// The ranks hold the run's state as it is after its last outcome.
    fn advance_formed(&mut self, id: RunId) {
        if self.runs.get(&id).is_some_and(|run| run.replaying.is_some()) {
            return self.end_replay(id, None);
        }
        if !self.begin_snapshot_if_due(id) {
            return;
        }
        if self.drain.is_some() || self.rest(id) || self.move_if_better(id) {
            return;
        }
        let Some(run) = self.runs.get(&id) else { return };
        let Some(seq) = run.head() else { return };
        let Some(operation) = run.operations[&seq].operation.clone() else { return };
        let publishes = matches!(operation, Operation::SaveWeightsForSampler { publish: true, .. });
        if publishes {
            match self.samplers_for(run) {
                Samplers::Missing(error) => {
                    return self.conclude(id, seq, Outcome::Failed { error }, None, None, None);
                }
                Samplers::Awaited => return,
                // Two publishes of a run would race for its live slot.
                Samplers::There if run.publishing.is_some() => return,
                Samplers::There => {}
            }
        }
        match self.resolve(id, operation) {
            Ok(resolved) => self.execute(id, seq, resolved),
            Err(error) => self.conclude(id, seq, Outcome::Failed { error }, None, None, None),
        }
    }

    /// A `LoadState` with what its path means now, in the order of operations; others as they
    /// are (`None`).
    fn resolve(&self, id: RunId, operation: Operation) -> Result<Option<Operation>, OperationError> {
        let Operation::LoadState { path, with_optimizer, .. } = operation else { return Ok(None) };
        let stored = match LoadPath::parse(&path, with_optimizer)? {
            LoadPath::Checkpoint(parsed) => self.checkpoints.find(&parsed)?,
            LoadPath::Adapter(blob) => {
                let source = Some(LoadSource { target: CheckpointTarget::Sampler, blob });
                return Ok(Some(Operation::LoadState { path, with_optimizer, source }));
            }
        };
        let base_model = &self.runs[&id].create.base_model;
        if stored.checkpoint.base_model != *base_model {
            let problem = format!(
                "{path} was made of {:?}, and {id} trains {base_model:?}",
                stored.checkpoint.base_model
            );
            return Err(OperationError::new(ErrorKind::InvalidInput, problem));
        }
        let source = stored.load_source().ok_or_else(|| fault(format!("{path} has no file to load")))?;
        Ok(Some(Operation::LoadState { path, with_optimizer, source: Some(source) }))
    }

    fn execute(&mut self, id: RunId, seq: OperationSeq, resolved: Option<Operation>) {
        let Some(run) = self.runs.get(&id) else { return };
        let Some(operation) = resolved.clone().or_else(|| run.operations[&seq].operation.clone()) else {
            return;
        };
        self.dispatch_operation(id, seq, operation, resolved, false);
    }

    fn replay(&mut self, id: RunId, seq: OperationSeq) {
        let Some(operation) = self.runs[&id].operations[&seq].operation.clone() else { return };
        self.dispatch_operation(id, seq, operation, None, true);
    }

    fn dispatch_operation(
        &mut self,
        id: RunId,
        seq: OperationSeq,
        operation: Operation,
        resolved: Option<Operation>,
        replay: bool,
    ) {
        let deadline_ms = self.now_ms + ms(self.limits.operation_deadline);
        let token = self.token(id, seq);
        let Some(run) = self.runs.get_mut(&id) else { return };
        run.work =
            Work::Execute(Execution { token, replay, resolved, answers: BTreeMap::new(), deadline_ms });
        for node in run.rank_nodes() {
            self.send(node, CoordinatorMessage::Execute { token, operation: operation.clone() });
        }
    }

    /// The token of one of the run's operations under its present rank set.
    pub(super) fn token(&self, id: RunId, seq: OperationSeq) -> OpToken {
        let run = &self.runs[&id];
        let incarnation = run.operations.get(&seq).map_or(run.incarnation, |entry| entry.incarnation);
        OpToken { run: id, epoch: self.epoch, generation: run.generation, seq, incarnation }
    }

    /// One rank has prepared or refused the operation.
    pub(super) fn rank_answered(&mut self, node: NodeId, token: OpToken, rank: RankIndex, answer: Answer) {
        let Some(run) = self.runs.get_mut(&token.run) else { return };
        let seated = run.roster().iter().any(|seat| seat.node == node && seat.rank == rank);
        let ranks = run.roster().len();
        let Work::Execute(execution) = &mut run.work else { return };
        if execution.token != token || !seated {
            return;
        }
        execution.answers.insert(rank, answer);
        if execution.answers.len() == ranks {
            self.judge(token.run);
        }
    }

    /// A rank is still at it. So may others be that wait for it: the deadline is one for all.
    pub(super) fn rank_progressed(&mut self, node: NodeId, token: OpToken, rank: RankIndex) {
        let deadline_ms = self.now_ms + ms(self.limits.operation_deadline);
        let Some(run) = self.runs.get_mut(&token.run) else { return };
        let seated = run.roster().iter().any(|seat| seat.node == node && seat.rank == rank);
        if let Work::Execute(execution) = &mut run.work
            && execution.token == token
            && seated
        {
            execution.deadline_ms = deadline_ms;
        }
    }

    /// A rank could not do it though the operation may be sound: the rank set is given up.
    pub(super) fn rank_failed(&mut self, node: NodeId, token: OpToken, error: OperationError, blame: Blame) {
        let Some(run) = self.runs.get(&token.run) else { return };
        let concerned = matches!(&run.work, Work::Execute(execution) if execution.token == token)
            && run.rank_nodes().contains(&node);
        if concerned {
            let seats =
                run.roster().iter().map(|seat| format!("{} on {}", seat.rank.0, self.node_name(seat.node)));
            let seats = seats.collect::<Vec<_>>().join(", ");
            let kind = match error.kind {
                ErrorKind::ResourceExhausted => ErrorKind::ResourceExhausted,
                _ => ErrorKind::Unavailable,
            };
            let message = format!("node {} says: {error} (ranks: {seats})", self.node_name(node));
            self.note_blame(token.run, node, blame);
            self.lose_ranks(token.run, OperationError::new(kind, message));
        }
    }

    /// All ranks have answered: compares them, and with the journal on replay.
    fn judge(&mut self, id: RunId) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        let Work::Execute(execution) = &mut run.work else { return };
        let token = execution.token;
        let answers = std::mem::take(&mut execution.answers);
        let (replay, resolved) = (execution.replay, execution.resolved.take());
        let Some((first_rank, first)) = answers.first_key_value() else { return };
        if let Some((rank, other)) = answers.iter().find(|(_, answer)| !answer.agrees(first)) {
            let reason = format!(
                "rank {} and rank {} disagree on operation {}: {} against {}",
                first_rank.0,
                rank.0,
                token.seq.0,
                first.describe(),
                other.describe()
            );
            return self.quarantine(id, fault(format!("{id} is quarantined: {reason}")));
        }
        let first = first.clone();
        match (replay, first) {
            (true, answer) => self.judge_replay(id, token, answer),
            (false, Answer::Failed(error)) => {
                self.conclude(id, token.seq, Outcome::Failed { error }, Some(token), None, resolved);
            }
            (false, Answer::Prepared { state, result, saved, step }) => {
                let outcome = Outcome::Done { result, state, step };
                self.conclude(id, token.seq, outcome, Some(token), saved, resolved);
            }
        }
    }

    /// What was repeated must have come out as it is journaled.
    fn judge_replay(&mut self, id: RunId, token: OpToken, answer: Answer) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        let journaled = run.operations.get(&token.seq).and_then(|entry| entry.outcome.as_ref());
        let message = match (journaled, &answer) {
            (Some(Outcome::Done { state, step, .. }), Answer::Prepared { state: again, step: steps, .. })
                if state == again && step == steps =>
            {
                CoordinatorMessage::Commit { token }
            }
            (Some(Outcome::Failed { .. }), Answer::Failed(again)) if again.kind == ErrorKind::NotFinite => {
                CoordinatorMessage::Discard { token }
            }
            _ => {
                let journaled = match journaled {
                    Some(Outcome::Done { state, .. }) => format!("state {}", state.short()),
                    Some(Outcome::Failed { error }) => format!("the failure `{error}`"),
                    None => "no outcome".to_owned(),
                };
                let reason = format!(
                    "{id} is quarantined: repeating operation {} gave {}, and the journal has {journaled}; \
                     run it with the build and on the kind of processor that it was trained with",
                    token.seq.0,
                    answer.describe()
                );
                return self.quarantine(id, fault(reason));
            }
        };
        self.settle(id, token, message);
        if let Some(run) = self.runs.get_mut(&id) {
            run.work = Work::Idle;
        }
        self.advance(id);
    }

    /// Tells the ranks what becomes of what they hold prepared, if they are still those that
    /// prepared it.
    pub(super) fn settle(&mut self, id: RunId, token: OpToken, message: CoordinatorMessage) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        if run.generation != token.generation {
            return;
        }
        let Ranks::Formed { applied, .. } = &mut run.ranks else { return };
        *applied = token.seq;
        for node in run.rank_nodes() {
            self.send(node, message.clone());
        }
    }

    /// Nothing that this run's ranks say can be trusted: its operations fail until someone has
    /// looked. The journal still has everything up to the last outcome.
    pub(super) fn quarantine(&mut self, id: RunId, error: OperationError) {
        tracing::error!(run = %id, "{error}");
        let Some(run) = self.runs.get_mut(&id) else { return };
        run.broken = Some(error.clone());
        run.wanted = false;
        self.lose_ranks(id, error);
    }

    /// Deadlines of what the run is busy with.
    pub(super) fn expire_work(&mut self, id: RunId) {
        let now_ms = self.now_ms;
        let Some(run) = self.runs.get(&id) else { return };
        match &run.work {
            Work::Execute(execution) if execution.deadline_ms <= now_ms => {
                let silent = self.silent_nodes(run, |rank| !execution.answers.contains_key(&rank));
                let message = format!(
                    "node {silent} made no progress with operation {} of {id} for {} s",
                    execution.token.seq.0,
                    self.limits.operation_deadline.as_secs()
                );
                self.lose_ranks(id, OperationError::new(ErrorKind::Unavailable, message));
            }
            Work::Conclude(conclusion) if conclusion.retry_ms.is_some_and(|at| at <= now_ms) => {
                self.write_conclusion(id);
            }
            _ => self.expire_forming(id),
        }
        self.expire_snapshot(id);
    }

    /// Names of the nodes whose ranks `silent` picks.
    fn silent_nodes(&self, run: &Run, silent: impl Fn(RankIndex) -> bool) -> String {
        let mut names: Vec<String> =
            run.roster().iter().filter(|s| silent(s.rank)).map(|seat| self.node_name(seat.node)).collect();
        names.dedup();
        names.join(", ")
    }
}

impl Answer {
    /// Whether two ranks said the same; errors by kind, as their wording may name the rank.
    fn agrees(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Failed(a), Self::Failed(b)) => a.kind == b.kind,
            (a, b) => a == b,
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Prepared { state, step, .. } => format!("state {} at step {step}", state.short()),
            Self::Failed(error) => format!("the failure `{error}`"),
        }
    }
}
