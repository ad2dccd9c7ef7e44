//! What clients ask that no operation decides: sessions, runs, information.

use crate::{
    journal::{JournalError, Record},
    protocol::{
        BlobRef, Call, ClientRequest, ClientResponse, ClusterStatus, CreateRun, NodeStatus, OperationKey,
        RunInfo,
    },
    types::{InvalidInput, RunId, ServerCapabilities, SessionId, SupportedModel},
};

use super::{
    Appending, Refusal, State, WaiterId, admission,
    memory::Asked,
    operations::WAITERS_MAX,
    run::{Run, WAITING},
};

/// Runs that one journal may hold.
const RUNS_MAX: usize = 4_096;

/// Sessions that one journal may hold.
const SESSIONS_MAX: usize = 1 << 20;

/// Tokens of a micro-batch when a run doesn't say: the best size measured on CPUs.
const MICRO_BATCH_TOKENS: u32 = 1_024;

/// Most tokens of a micro-batch: activations of more fit no machine we know.
const MICRO_BATCH_TOKENS_MAX: u32 = 1 << 20;

impl State {
    /// A request from outside.
    pub(super) fn request(&mut self, waiter: WaiterId, call: Call, request: ClientRequest, entropy: u64) {
        if self.needs_node(&request) && self.hold(waiter, call, &request, entropy) {
            return;
        }
        self.answer(waiter, call, request, entropy);
    }

    /// Requests that are wrong only because no node has introduced its models yet.
    fn needs_node(&self, request: &ClientRequest) -> bool {
        match request {
            ClientRequest::Capabilities
            | ClientRequest::CreateRun(_)
            | ClientRequest::Tokenizer { .. }
            | ClientRequest::Sample(_) => !self.ever_joined,
            ClientRequest::CreateSession
            | ClientRequest::Submit(_)
            | ClientRequest::WaitOperation { .. }
            | ClientRequest::RunInfo { .. }
            | ClientRequest::ListCheckpoints { .. }
            | ClientRequest::CheckpointFiles { .. }
            | ClientRequest::ClusterStatus
            | ClientRequest::FindRun { .. }
            | ClientRequest::CreateSessionFor { .. }
            | ClientRequest::SessionOwner { .. }
            | ClientRequest::DeleteCheckpoint { .. }
            | ClientRequest::DeleteRun { .. }
            | ClientRequest::ForkRun { .. }
            | ClientRequest::ReplayRun { .. }
            | ClientRequest::BackUp
            | ClientRequest::DrainNode { .. }
            | ClientRequest::Revoke { .. }
            | ClientRequest::RotateCa { .. } => false,
        }
    }

    /// Answers now, or makes somebody else owe the answer.
    pub(super) fn answer(&mut self, waiter: WaiterId, call: Call, request: ClientRequest, entropy: u64) {
        let answered = match request {
            ClientRequest::CreateSession => self.create_session(waiter, None),
            ClientRequest::CreateSessionFor { owner } => self.create_session(waiter, Some(owner)),
            ClientRequest::SessionOwner { session } => match self.sessions.get(&session) {
                Some(owner) => Ok(Some(ClientResponse::SessionOwner(owner.clone()))),
                None => Err(Refusal::UnknownSession(session)),
            },
            ClientRequest::DeleteCheckpoint { checkpoint } => self.delete_checkpoint(waiter, checkpoint),
            ClientRequest::DeleteRun { run } => self.delete_run(waiter, run),
            ClientRequest::CreateRun(create) => self.create_run(waiter, call, create),
            ClientRequest::Submit(submit) => self.submit(waiter, call, submit),
            ClientRequest::WaitOperation { run, seq, hold_ms } => {
                self.wait_operation(waiter, run, seq, hold_ms)
            }
            ClientRequest::Sample(sample) => self.sample(waiter, sample, entropy),
            ClientRequest::Capabilities => Ok(Some(ClientResponse::Capabilities(self.capabilities()))),
            ClientRequest::RunInfo { run } => self.run_info(run).map(Some),
            ClientRequest::ListCheckpoints { run } => {
                Ok(Some(ClientResponse::Checkpoints(self.checkpoints.list(run))))
            }
            ClientRequest::CheckpointFiles { checkpoint, page_size, page_token, presigned: _ } => {
                let page = self.checkpoints.files(checkpoint, page_size, page_token);
                page.map(|page| Some(ClientResponse::CheckpointFiles(page)))
            }
            ClientRequest::Tokenizer { base_model } => self.tokenizer(&base_model).map(Some),
            ClientRequest::ClusterStatus => Ok(Some(ClientResponse::Cluster(self.cluster_status()))),
            ClientRequest::FindRun { name } => self.find_run(name).map(Some),
            ClientRequest::ForkRun { run, step, name } => self.fork_run(waiter, call.key, (run, step, name)),
            ClientRequest::ReplayRun { run, step } => self.replay_run(waiter, run, step),
            // Seen to where the journal and the store are.
            ClientRequest::BackUp => Err(Refusal::Fault("a backup was asked of the state machine".into())),
            ClientRequest::Revoke { role, name } => self.revoke(waiter, role, name),
            // Seen to where the CA's key is, and asked again as `ClusterStatus`.
            ClientRequest::RotateCa { .. } => {
                Err(Refusal::Fault("a change of the CA was asked of the state machine".into()))
            }
            ClientRequest::DrainNode { name, drain } => self.drain_node(waiter, name, drain),
        };
        match answered {
            Ok(Some(response)) => self.respond(waiter, response),
            Ok(None) => {}
            Err(refusal) => self.refuse(waiter, refusal),
        }
    }

    fn create_session(
        &mut self,
        waiter: WaiterId,
        owner: Option<String>,
    ) -> Result<Option<ClientResponse>, Refusal> {
        if let Some(owner) = &owner {
            admission::owner(owner)?;
        }
        self.refuse_while_draining()?;
        if self.sessions.len() >= SESSIONS_MAX {
            return Err(Refusal::Overloaded { what: "sessions", bound: SESSIONS_MAX });
        }
        let session = SessionId(self.next_session);
        self.next_session += 1;
        let record = Record::Session { session, owner: owner.clone(), created_at_ms: self.wall_ms };
        self.append(vec![record], Appending::Session { session, owner, waiter });
        Ok(None)
    }

    pub(super) fn session_durable(
        &mut self,
        session: SessionId,
        owner: Option<String>,
        waiter: WaiterId,
        result: Result<(), JournalError>,
    ) {
        match result {
            Ok(()) => {
                self.sessions.insert(session, owner);
                self.respond(waiter, ClientResponse::Session(session));
            }
            Err(why) => self.refuse(waiter, Refusal::NotDurable(why.to_string())),
        }
    }

    fn create_run(
        &mut self,
        waiter: WaiterId,
        call: Call,
        mut create: CreateRun,
    ) -> Result<Option<ClientResponse>, Refusal> {
        self.refuse_while_draining()?;
        if !self.sessions.contains_key(&create.session) {
            return Err(Refusal::UnknownSession(create.session));
        }
        if let Some(key) = call.key
            && let Some(known) = self.created_before(waiter, key, &create)
        {
            return known;
        }
        self.refuse_more_runs()?;
        self.admit_run(create.session, &call.quota)?;
        let offer = self.offer(&create.base_model)?.clone();
        admission::lora(&create.lora)?;
        admission::rank(&create.lora, &offer)?;
        let replicas = create.replicas.unwrap_or(1);
        if replicas == 0 {
            return Err(InvalidInput::new("replicas", "must be at least 1, got 0").into());
        }
        let most = self.most_slots.get(&offer.name).copied().unwrap_or(0);
        if replicas > most {
            if self.hold_for_nodes(waiter, call, &create) {
                return Ok(None);
            }
            return Err(Refusal::TooManyReplicas { asked: replicas, most, model: offer.name });
        }
        // What is away now may come back; what is there must have room.
        let there = self.slots_for(&offer.name, offer.digest).max(1);
        let replicas = create.replicas.unwrap_or(there).min(there);
        if let Some(max_seq_len) = create.max_seq_len {
            admission::in_range("max_seq_len", max_seq_len, 1, offer.context)?;
        }
        let micro_batch_tokens = create.micro_batch_tokens.unwrap_or(MICRO_BATCH_TOKENS);
        admission::in_range("micro_batch_tokens", micro_batch_tokens, 1, MICRO_BATCH_TOKENS_MAX)?;
        let asked = Asked {
            offer: &offer,
            lora: &create.lora,
            replicas,
            micro_batch_tokens,
            max_seq_len: create.max_seq_len,
        };
        let max_seq_len = self.fit(&asked)?;
        create.name = Some(admission::display_name(create.name, &offer.name)?);
        create.base_model = offer.name;
        create.max_seq_len = Some(max_seq_len);
        create.micro_batch_tokens = Some(micro_batch_tokens);

        let run = RunId(self.next_run);
        self.next_run += 1;
        let record = Record::Run {
            run,
            create: create.clone(),
            model_digest: offer.digest,
            key: call.key,
            created_at_ms: self.wall_ms,
        };
        let run = Box::new(Run { key: call.key, ..Run::new(run, create, offer.digest) });
        self.append(vec![record], Appending::Run { run, waiters: vec![waiter] });
        Ok(None)
    }

    /// What a `CreateRun` gets whose key its session has used before: the run of then, or its part in the
    /// answer that is on its way.
    fn created_before(
        &mut self,
        waiter: WaiterId,
        key: OperationKey,
        create: &CreateRun,
    ) -> Option<Result<Option<ClientResponse>, Refusal>> {
        let base_model =
            self.offer(&create.base_model).map_or(&create.base_model, |offer| &offer.name).clone();
        let made = |run: &Run| run.key == Some(key) && run.create.session == create.session;
        let same = |run: &Run| {
            let then = &run.create;
            (&then.base_model, &then.lora, then.replicas) == (&base_model, &create.lora, create.replicas)
        };
        let other = |run: &Run| {
            let problem = format!("was used for another run, {}; every run needs one of its own", run.id);
            Some(Err(InvalidInput::new("Idempotency-Key", problem).into()))
        };
        if let Some(run) = self.runs.values().find(|run| made(run)) {
            return if same(run) {
                Some(Ok(Some(ClientResponse::Run(self.described(run)))))
            } else {
                other(run)
            };
        }
        let coming = self.appends.values_mut().find_map(|appending| match appending {
            Appending::Run { run, waiters } if made(run) => Some((run, waiters)),
            _ => None,
        });
        let (run, waiters) = coming?;
        if !same(run) {
            return other(run);
        }
        if waiters.len() >= WAITERS_MAX {
            return Some(Err(Refusal::Overloaded { what: "requests for one run", bound: WAITERS_MAX }));
        }
        waiters.push(waiter);
        Some(Ok(None))
    }

    pub(super) fn run_durable(
        &mut self,
        mut run: Run,
        waiters: Vec<WaiterId>,
        result: Result<(), JournalError>,
    ) {
        let response = match result {
            Ok(()) => {
                let id = run.id;
                run.last_used_ms = self.now_ms;
                self.runs.insert(id, run);
                self.advance(id);
                ClientResponse::Run(self.described(&self.runs[&id]))
            }
            Err(why) => ClientResponse::Error(Refusal::NotDurable(why.to_string()).into()),
        };
        for waiter in waiters {
            self.respond(waiter, response.clone());
        }
    }

    fn run_info(&self, run: RunId) -> Result<ClientResponse, Refusal> {
        let run = self.runs.get(&run).ok_or(Refusal::UnknownRun(run))?;
        Ok(ClientResponse::Run(self.described(run)))
    }

    fn find_run(&self, name: String) -> Result<ClientResponse, Refusal> {
        let named = |run: &&Run| run.create.name.as_ref() == Some(&name);
        let Some(run) = self.runs.values().rev().find(named) else { return Err(Refusal::NoRunNamed(name)) };
        Ok(ClientResponse::Run(self.described(run)))
    }

    pub(super) fn described(&self, run: &Run) -> RunInfo {
        let vocab_size = self.models.get(&run.create.base_model).map(|offer| offer.vocab);
        let owner = self.sessions.get(&run.create.session).cloned().flatten();
        let all = self.slots_for(&run.create.base_model, run.model_digest).max(1);
        let replicas = run.create.replicas.unwrap_or(all);
        let info = run.info();
        let waits_for = match self.models.get(&run.create.base_model) {
            // Only after a restart: the node that had its model offers another one under that name.
            Some(offer) if info.phase == WAITING && offer.digest != run.model_digest => {
                format!(
                    "{WAITING} that offer its base model: those that are here have other files or --dtype"
                )
            }
            _ => info.phase,
        };
        RunInfo { vocab_size, owner, replicas, phase: waits_for, ..info }
    }

    fn capabilities(&self) -> ServerCapabilities {
        let supported_models = self.models.values().map(|offer| SupportedModel {
            model_name: offer.name.clone(),
            max_context_length: Some(offer.context),
            devices: vec!["cpu".to_owned()],
        });
        ServerCapabilities { supported_models: supported_models.collect() }
    }

    fn tokenizer(&self, base_model: &str) -> Result<ClientResponse, Refusal> {
        let offer = self.offer(base_model)?;
        Ok(ClientResponse::Blob(BlobRef { digest: offer.tokenizer, size: offer.tokenizer_size }))
    }

    pub(super) fn cluster_status(&self) -> ClusterStatus {
        let nodes = self.nodes.iter().map(|(id, node)| NodeStatus {
            name: node.hello.name.clone(),
            pid: node.hello.pid,
            trainers: node.hello.trainers,
            samplers: node.hello.samplers,
            numerics: node.numerics(),
            certified_until: self.certified_until(&node.hello.name),
            drain: self.drain_of(*id),
        });
        let there = |name: &&String| self.nodes.values().any(|node| node.hello.name == **name);
        let drained_away = self.evacuated.iter().filter(|name| !there(name)).cloned().collect();
        ClusterStatus {
            nodes: nodes.collect(),
            drained_away,
            trust: self.trust_status(),
            runs: self.runs.values().map(|run| self.described(run)).collect(),
        }
    }

    pub(super) fn refuse_more_runs(&self) -> Result<(), Refusal> {
        if self.runs.len() < RUNS_MAX {
            return Ok(());
        }
        Err(Refusal::Overloaded { what: "runs", bound: RUNS_MAX })
    }

    pub(super) fn refuse_while_draining(&self) -> Result<(), Refusal> {
        if self.drain.is_some() { Err(Refusal::Draining) } else { Ok(()) }
    }
}
