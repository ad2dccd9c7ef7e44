//! What the gateway asks of the coordinator, typed by what is answered.

use std::{ops::Range, time::Duration};

use bytes::Bytes;

use crate::{
    client::ServiceClient,
    protocol::{
        BlobRef, Call, ClientRequest, ClientResponse, ClusterStatus, CreateRun, Figures, Operation,
        OperationKey, OperationSeq, OperationStatus, Quota, RunInfo, SampleRequest, SampleTarget,
        SubmitOperation, Trace,
    },
    types::{
        Checkpoint, CheckpointFilesResponse, CheckpointId, CheckpointPath, InvalidInput, PolicyId, RunId,
        SampleResult, ServerCapabilities, SessionId,
    },
};

use super::refusal::Refused;

/// How long a request is held while the coordinator is away, beyond what it waits for itself.
/// The Loops client waits 300 s for a call that it never repeats.
const HOLD: Duration = Duration::from_secs(240);

/// The way to the coordinator, for one caller. While the coordinator is away, requests wait for
/// it. What belongs to another caller does not exist.
#[derive(Clone)]
pub struct Upstream {
    client: ServiceClient,
    /// Whose runs and checkpoints are there; absent: all are.
    owner: Option<String>,
    /// Goes with every request.
    call: Call,
}

impl Upstream {
    pub fn new(client: ServiceClient) -> Self {
        Self { client, owner: None, call: Call::default() }
    }

    /// The same for a caller of this name, within these bounds.
    pub fn seen_by(&self, owner: Option<String>, quota: Quota) -> Self {
        Self { client: self.client.clone(), owner, call: Call { quota, ..self.call } }
    }

    /// The same for a request of this trace.
    pub fn traced(self, trace: Option<Trace>) -> Self {
        Self { call: Call { trace, ..self.call }, ..self }
    }

    /// What the coordinator has counted.
    pub async fn figures(&self, hold: Duration) -> Result<Figures, Refused> {
        match tokio::time::timeout(hold, self.client.figures()).await {
            Ok(figures) => Ok(figures?),
            Err(_) => Err(late(hold)),
        }
    }

    /// The session of the gateway itself, for runs of callers that open none.
    pub async fn own_session(&self) -> Result<SessionId, Refused> {
        self.client.session().await.map_err(Refused::from)
    }

    pub async fn create_session(&self) -> Result<SessionId, Refused> {
        let request = match self.owner.clone() {
            None => ClientRequest::CreateSession,
            Some(owner) => ClientRequest::CreateSessionFor { owner },
        };
        match self.ask(request, HOLD).await? {
            ClientResponse::Session(session) => Ok(session),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn capabilities(&self) -> Result<ServerCapabilities, Refused> {
        match self.ask(ClientRequest::Capabilities, HOLD).await? {
            ClientResponse::Capabilities(capabilities) => Ok(capabilities),
            other => Err(unexpected(&other)),
        }
    }

    /// Whether a model is offered, under its name or another that it goes by.
    pub async fn find_model(&self, base_model: &str) -> Result<(), Refused> {
        // Every model that is offered has a tokenizer.
        let request = ClientRequest::Tokenizer { base_model: base_model.to_owned() };
        match self.ask(request, HOLD).await? {
            ClientResponse::Blob(_) => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn cluster(&self, hold: Duration) -> Result<ClusterStatus, Refused> {
        match self.ask(ClientRequest::ClusterStatus, hold).await? {
            ClientResponse::Cluster(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes a run, once for each key of a session.
    pub async fn create_run(&self, key: OperationKey, create: CreateRun) -> Result<RunInfo, Refused> {
        if self.owner.is_some() {
            let session = create.session;
            match self.ask(ClientRequest::SessionOwner { session }, HOLD).await? {
                ClientResponse::SessionOwner(owner) if owner == self.owner => {}
                ClientResponse::SessionOwner(_) => {
                    return Err(InvalidInput::new("session", format!("{session} does not exist")).into());
                }
                other => return Err(unexpected(&other)),
            }
        }
        let call = Call { key: Some(key), ..self.call };
        let created = self.ask_with(call, ClientRequest::CreateRun(create), HOLD).await?;
        self.own_run(created)
    }

    pub async fn run(&self, run: RunId, hold: Duration) -> Result<RunInfo, Refused> {
        self.run_of(ClientRequest::RunInfo { run }, hold).await
    }

    async fn run_of(&self, request: ClientRequest, hold: Duration) -> Result<RunInfo, Refused> {
        self.own_run(self.ask(request, hold).await?)
    }

    fn own_run(&self, response: ClientResponse) -> Result<RunInfo, Refused> {
        match response {
            ClientResponse::Run(run) if self.owner.is_none() || self.owner == run.owner => Ok(run),
            ClientResponse::Run(run) => Err(Refused::not_found(format!("{} does not exist", run.run))),
            other => Err(unexpected(&other)),
        }
    }

    /// The caller's runs, oldest first.
    pub async fn runs(&self) -> Result<Vec<RunInfo>, Refused> {
        let mut runs = self.cluster(HOLD).await?.runs;
        runs.retain(|run| self.owner.is_none() || run.owner == self.owner);
        Ok(runs)
    }

    /// Refuses what belongs to another caller; asks nothing if nothing can.
    async fn require(&self, run: RunId) -> Result<(), Refused> {
        match &self.owner {
            None => Ok(()),
            Some(_) => self.run(run, HOLD).await.map(drop),
        }
    }

    /// The same for the run of a path. A malformed one is the coordinator's to refuse.
    async fn require_path(&self, path: &str) -> Result<(), Refused> {
        match path.parse::<CheckpointPath>() {
            Ok(parsed) => self.require(parsed.run).await.map_err(|refused| match refused.is_not_found() {
                true => Refused::not_found(format!("there is no checkpoint {parsed}")),
                false => refused,
            }),
            Err(_) => Ok(()),
        }
    }

    /// The newest run of a display name.
    pub async fn find_run(&self, name: String, hold: Duration) -> Result<RunInfo, Refused> {
        self.run_of(ClientRequest::FindRun { name }, hold).await
    }

    /// Makes an operation durable and gives it its place.
    pub async fn submit(&self, submit: SubmitOperation, hold: Duration) -> Result<OperationSeq, Refused> {
        if let Operation::LoadState { path, .. } = &submit.operation {
            self.require_path(path).await?;
        }
        match self.ask(ClientRequest::Submit(submit), hold).await? {
            ClientResponse::Accepted { seq } => Ok(seq),
            other => Err(unexpected(&other)),
        }
    }

    /// The outcome of an operation, or `Pending` after `hold`; also if the coordinator is away
    /// all the while.
    pub async fn outcome(
        &self,
        run: RunId,
        seq: OperationSeq,
        hold: Duration,
    ) -> Result<OperationStatus, Refused> {
        self.require(run).await?;
        let hold_ms = u32::try_from(hold.as_millis()).unwrap_or(u32::MAX);
        let request = self.client.call(self.call, ClientRequest::WaitOperation { run, seq, hold_ms });
        match tokio::time::timeout(hold + ANSWER_SLACK, request).await {
            Err(_) => Ok(OperationStatus::Pending),
            Ok(answer) => match answer? {
                ClientResponse::Operation(status) => Ok(status),
                other => Err(unexpected(&other)),
            },
        }
    }

    /// Generates; the coordinator has its own deadlines. Dropping the future calls it off.
    pub async fn sample(&self, sample: SampleRequest) -> Result<(SampleResult, Option<PolicyId>), Refused> {
        match &sample.target {
            SampleTarget::Base { .. } => {}
            SampleTarget::Live { run, .. } | SampleTarget::Initial { run } => self.require(*run).await?,
            SampleTarget::Policy(policy) => self.require(policy.run).await?,
            SampleTarget::Checkpoint { path } => self.require_path(path).await?,
            SampleTarget::LiveOrCheckpoint { run, path, .. } => {
                self.require(*run).await?;
                self.require_path(path).await?;
            }
        }
        match self.client.call(self.call, ClientRequest::Sample(sample)).await? {
            ClientResponse::Sample { result, policy } => Ok((result, policy)),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn checkpoints(&self, run: Option<RunId>) -> Result<Vec<Checkpoint>, Refused> {
        let mut found = match self.ask(ClientRequest::ListCheckpoints { run }, HOLD).await? {
            ClientResponse::Checkpoints(checkpoints) => checkpoints,
            other => return Err(unexpected(&other)),
        };
        if self.owner.is_some() && !found.is_empty() {
            let runs = self.runs().await?;
            found.retain(|checkpoint| runs.iter().any(|run| run.run == checkpoint.run_id));
        }
        Ok(found)
    }

    /// Refuses a checkpoint of another caller.
    async fn require_checkpoint(&self, checkpoint: CheckpointId) -> Result<(), Refused> {
        if self.owner.is_none() || self.checkpoints(None).await?.iter().any(|c| c.id == checkpoint) {
            return Ok(());
        }
        Err(Refused::not_found(format!("{checkpoint} does not exist")))
    }

    pub async fn delete_run(&self, run: RunId) -> Result<(), Refused> {
        self.require(run).await?;
        match self.ask(ClientRequest::DeleteRun { run }, HOLD).await? {
            ClientResponse::Deleted => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn delete_checkpoint(&self, checkpoint: CheckpointId) -> Result<(), Refused> {
        self.require_checkpoint(checkpoint).await?;
        match self.ask(ClientRequest::DeleteCheckpoint { checkpoint }, HOLD).await? {
            ClientResponse::Deleted => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The checkpoint that a path names; `field` is what the caller calls the path.
    pub async fn checkpoint_at(&self, path: &str, field: &str) -> Result<Checkpoint, Refused> {
        let of_field = |e: InvalidInput| Refused::from(InvalidInput::new(field, e.problem));
        let parsed: CheckpointPath = path.parse().map_err(of_field)?;
        let found = self.checkpoints(Some(parsed.run)).await?;
        let named = |c: &Checkpoint| c.target == parsed.target && c.checkpoint_id == parsed.name;
        found
            .into_iter()
            .find(named)
            .ok_or_else(|| InvalidInput::new(field, format!("there is no checkpoint {parsed}")).into())
    }

    pub async fn files(
        &self,
        checkpoint: CheckpointId,
        page_size: u32,
        page_token: u64,
        presigned: bool,
    ) -> Result<CheckpointFilesResponse, Refused> {
        self.require_checkpoint(checkpoint).await?;
        let request = ClientRequest::CheckpointFiles { checkpoint, page_size, page_token, presigned };
        match self.ask(request, HOLD).await? {
            ClientResponse::CheckpointFiles(files) => Ok(files),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn put_blob(&self, bytes: Vec<u8>) -> Result<BlobRef, Refused> {
        Ok(self.client.put_blob(Bytes::from(bytes)).await?)
    }

    pub async fn blob(&self, blob: BlobRef) -> Result<Vec<u8>, Refused> {
        Ok(self.client.blob(blob).await?)
    }

    /// Some bytes of a blob, which whoever has all of them checks.
    pub async fn part(&self, blob: BlobRef, part: Range<u64>) -> Result<Vec<u8>, Refused> {
        Ok(self.client.blob_part(blob.digest, part).await?)
    }

    async fn ask(&self, request: ClientRequest, hold: Duration) -> Result<ClientResponse, Refused> {
        self.ask_with(self.call, request, hold).await
    }

    async fn ask_with(
        &self,
        call: Call,
        request: ClientRequest,
        hold: Duration,
    ) -> Result<ClientResponse, Refused> {
        match tokio::time::timeout(hold, self.client.call(call, request)).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(late(hold)),
        }
    }
}

/// From a wait's end at the coordinator to its answer here.
const ANSWER_SLACK: Duration = Duration::from_secs(2);

fn late(hold: Duration) -> Refused {
    Refused::away(format!("the coordinator has not answered for {} s", hold.as_secs()))
}

fn unexpected(response: &ClientResponse) -> Refused {
    let shown: String = format!("{response:?}").chars().take(200).collect();
    Refused::fault(format!("unexpected answer from the coordinator: {shown}"))
}
