use std::{ops::Range, path::Path, sync::Arc};

use bytes::Bytes;
use tokenizers::Tokenizer;

use crate::{
    protocol::{
        BlobRef, Call, ClientRequest, ClientResponse, ClusterStatus, CreateRun, Figures, Replayed, RunInfo,
        SampleTarget,
    },
    types::{
        Checkpoint, CheckpointFilesResponse, CheckpointId, CheckpointTarget, Digest, ErrorKind, LoraConfig,
        LoraTarget, OperationError, PolicyId, RunId, ServerCapabilities, SessionId, WandbConfig,
    },
};

use super::{
    ClientError, ConnectTarget, Link, SamplingClient, TrainingClient, runtime::ClientRuntime,
    submit::fresh_key, wandb::WandbLogger,
};

/// Files asked for at a time when a checkpoint is listed or downloaded.
const FILES_PER_PAGE: u32 = 1000;

/// The way into a service: makes training and sampling clients.
#[derive(Clone)]
pub struct ServiceClient {
    shared: Arc<Shared>,
}

/// What all clients of one connection share.
pub struct Shared {
    pub link: Arc<Link>,
    /// Declared after `link`: its tasks hold the link's sockets.
    pub runtime: ClientRuntime,
    /// Made with the first run: whoever only looks or samples leaves nothing in the journal.
    session: tokio::sync::OnceCell<SessionId>,
}

/// Settings of a training run beside model and rank.
#[derive(Debug, Clone)]
pub struct LoraOptions {
    /// Seeds the adapter's initialisation.
    pub seed: u64,
    /// Numerator of the adapter's scale `alpha / rank`.
    pub alpha: f32,
    /// Linear layers that carry an adapter.
    pub targets: Vec<LoraTarget>,
    /// Data-parallel ranks; absent: all that the cluster has, at any time.
    pub replicas: Option<u32>,
    /// Longest sequence in tokens; absent: the model's context.
    pub max_seq_len: Option<u32>,
    /// Tokens of a micro-batch, the unit that ranks share; absent: 1,024. Part of what decides
    /// the bits.
    pub micro_batch_tokens: Option<u32>,
    /// Display name; absent: the base model.
    pub name: Option<String>,
    /// Streams the run's metrics to Weights & Biases.
    pub wandb: Option<WandbConfig>,
}

impl Default for LoraOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            alpha: 32.0,
            targets: LoraTarget::OF_BLOCK.to_vec(),
            replicas: None,
            max_seq_len: None,
            micro_batch_tokens: None,
            name: None,
            wandb: None,
        }
    }
}

/// What a sampling client made by [`ServiceClient::create_sampling_client`] draws from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SamplingSource {
    /// A base model, without adapter.
    BaseModel(String),
    /// A sampler checkpoint, `bt://loops:<run>/sampler_weights/<name>`.
    ModelPath(String),
}

impl ServiceClient {
    /// Connects to a service: the data directory of a local one (`"./lockstep-data"`), an
    /// address (`"lockstep://HOST:PORT?identity=DIR"`), or a cluster of this process
    /// (`cluster.connector()`).
    pub async fn connect(target: impl Into<ConnectTarget>) -> Result<Self, ClientError> {
        let target = target.into();
        let runtime = ClientRuntime::start()?;
        let link = runtime
            .run(async move {
                let link = Link::open(target).await?;
                // Whoever is not let in hears of it here.
                match link.request(ClientRequest::ClusterStatus).await? {
                    ClientResponse::Cluster(_) => Ok(link),
                    other => Err(unexpected(&other)),
                }
            })
            .await?;
        let session = tokio::sync::OnceCell::new();
        Ok(Self { shared: Arc::new(Shared { link: Arc::new(link), runtime, session }) })
    }

    /// The models that can be trained and sampled here.
    pub async fn get_server_capabilities(&self) -> Result<ServerCapabilities, ClientError> {
        match self.request(ClientRequest::Capabilities).await? {
            ClientResponse::Capabilities(capabilities) => Ok(capabilities),
            other => Err(unexpected(&other)),
        }
    }

    /// Creates a run with a fresh adapter of `rank` on `base_model`.
    ///
    /// Refused: a model that is not offered, rank 0, more replicas than the cluster has had.
    pub async fn create_lora_training_client(
        &self,
        base_model: &str,
        rank: u32,
        options: LoraOptions,
    ) -> Result<TrainingClient, ClientError> {
        let lora = LoraConfig { rank, alpha: options.alpha, seed: options.seed, targets: options.targets };
        lora.validate()?;
        // Before there is a run: what is missing here should leave nothing behind.
        let logger = match options.wandb {
            None => None,
            Some(wandb) => {
                wandb.validate()?;
                let (base_model, lora) = (base_model.to_owned(), lora.clone());
                let start = move || WandbLogger::start(&wandb, &base_model, &lora);
                Some(self.shared.runtime.run(async { blocking(start).await }).await?)
            }
        };
        let create = CreateRun {
            session: self.session().await?,
            base_model: base_model.into(),
            lora,
            replicas: options.replicas,
            max_seq_len: options.max_seq_len,
            micro_batch_tokens: options.micro_batch_tokens,
            name: options.name,
        };
        let link = self.shared.link.clone();
        // Whatever happens to the connection, there is one run.
        let call = Call { key: Some(fresh_key()?), ..Call::default() };
        let run = self
            .shared
            .runtime
            .run(async move {
                match link.call(call, ClientRequest::CreateRun(create)).await? {
                    ClientResponse::Run(run) => Ok(run),
                    other => Err(unexpected(&other)),
                }
            })
            .await?;
        Ok(TrainingClient::new(self.shared.clone(), run, logger))
    }

    /// The session of this client's runs.
    pub(crate) async fn session(&self) -> Result<SessionId, ClientError> {
        let create = async || match self.request(ClientRequest::CreateSession).await? {
            ClientResponse::Session(session) => Ok(session),
            other => Err(unexpected(&other)),
        };
        self.shared.session.get_or_try_init(create).await.copied()
    }

    /// A training client on a run that exists: of an earlier session, or of a service that was
    /// restarted. It goes on where the run stands.
    pub async fn attach_training_client(&self, run: RunId) -> Result<TrainingClient, ClientError> {
        Ok(TrainingClient::new(self.shared.clone(), self.run_info(run).await?, None))
    }

    /// A new run whose adapter starts with the weights of a checkpoint; moments are fresh and
    /// the step is 0.
    pub async fn create_training_client_from_state(&self, path: &str) -> Result<TrainingClient, ClientError> {
        let client = self.training_client_like(path).await?;
        client.load_state(path).await?;
        Ok(client)
    }

    /// The same with the checkpoint's moments and step.
    pub async fn create_training_client_from_state_with_optimizer(
        &self,
        path: &str,
    ) -> Result<TrainingClient, ClientError> {
        let client = self.training_client_like(path).await?;
        client.load_state_with_optimizer(path).await?;
        Ok(client)
    }

    /// A run of the model, rank and alpha of a checkpoint.
    async fn training_client_like(&self, path: &str) -> Result<TrainingClient, ClientError> {
        let checkpoint = self.find_checkpoint(|c| c.path == path.trim_end_matches('/')).await?;
        let checkpoint = checkpoint.ok_or_else(|| not_found(format!("no checkpoint `{path}`")))?;
        let run = self.run_info(checkpoint.run_id).await?;
        let options = LoraOptions {
            alpha: run.lora.alpha,
            targets: run.lora.targets,
            seed: run.lora.seed,
            ..LoraOptions::default()
        };
        self.create_lora_training_client(&checkpoint.base_model, checkpoint.lora_rank, options).await
    }

    /// A client that samples from a base model or a saved checkpoint.
    pub async fn create_sampling_client(
        &self,
        source: SamplingSource,
    ) -> Result<SamplingClient, ClientError> {
        match source {
            SamplingSource::BaseModel(base_model) => {
                // Names and aliases are the service's to resolve; it refuses one that it lacks.
                let request = ClientRequest::Tokenizer { base_model: base_model.clone() };
                let ClientResponse::Blob(_) = self.request(request).await? else {
                    return Err(ClientError::Protocol("no tokenizer came for a tokenizer".into()));
                };
                let target = SampleTarget::Base { base_model: base_model.clone() };
                Ok(SamplingClient::new(self.shared.clone(), base_model, target, None))
            }
            SamplingSource::ModelPath(path) => {
                let path = path.trim_end_matches('/').to_owned();
                let checkpoint = self.find_checkpoint(|c| c.path == path).await?;
                let checkpoint = checkpoint
                    .filter(|c| c.target == CheckpointTarget::Sampler)
                    .ok_or_else(|| not_found(format!("no sampler checkpoint `{path}`")))?;
                let target = SampleTarget::Checkpoint { path };
                Ok(SamplingClient::new(self.shared.clone(), checkpoint.base_model, target, None))
            }
        }
    }

    /// A client pinned to exactly these published weights.
    pub fn create_policy_sampling_client(&self, base_model: &str, policy: PolicyId) -> SamplingClient {
        let target = SampleTarget::Policy(policy);
        SamplingClient::new(self.shared.clone(), base_model.into(), target, Some(policy))
    }

    /// Checkpoints of one run, or of all, newest first.
    pub async fn list_checkpoints(&self, run: Option<RunId>) -> Result<Vec<Checkpoint>, ClientError> {
        match self.request(ClientRequest::ListCheckpoints { run }).await? {
            ClientResponse::Checkpoints(checkpoints) => Ok(checkpoints),
            other => Err(unexpected(&other)),
        }
    }

    async fn find_checkpoint(
        &self,
        wanted: impl Fn(&Checkpoint) -> bool,
    ) -> Result<Option<Checkpoint>, ClientError> {
        Ok(self.list_checkpoints(None).await?.into_iter().find(wanted))
    }

    /// One page of a checkpoint's files.
    pub async fn get_checkpoint_archive_url(
        &self,
        checkpoint: CheckpointId,
        page_token: u64,
    ) -> Result<CheckpointFilesResponse, ClientError> {
        let request = ClientRequest::CheckpointFiles {
            checkpoint,
            page_size: FILES_PER_PAGE,
            page_token,
            presigned: false,
        };
        match self.request(request).await? {
            ClientResponse::CheckpointFiles(files) => Ok(files),
            other => Err(unexpected(&other)),
        }
    }

    /// Writes a checkpoint's files into `directory`, made if it is missing. A sampler
    /// checkpoint is then a directory that PEFT loads.
    pub async fn download_checkpoint(
        &self,
        checkpoint: CheckpointId,
        directory: &Path,
    ) -> Result<(), ClientError> {
        let mut page_token = 0;
        loop {
            let page = self.get_checkpoint_archive_url(checkpoint, page_token).await?;
            for file in &page.presigned_urls {
                let digest = file
                    .digest()
                    .ok_or_else(|| ClientError::Protocol(format!("`{}` is no blob", file.url)))?;
                let bytes = self.blob(BlobRef { digest, size: file.size_bytes }).await?;
                write_below(directory, &file.relative_file_name, &bytes)?;
            }
            match page.next_page_token {
                Some(next) => page_token = next,
                None => return Ok(()),
            }
        }
    }

    /// The tokenizer of a model that is offered.
    pub async fn get_tokenizer(&self, base_model: &str) -> Result<Tokenizer, ClientError> {
        tokenizer(&self.shared, base_model).await
    }

    /// Where a run stands.
    pub async fn run_info(&self, run: RunId) -> Result<RunInfo, ClientError> {
        match self.request(ClientRequest::RunInfo { run }).await? {
            ClientResponse::Run(run) => Ok(run),
            other => Err(unexpected(&other)),
        }
    }

    /// Nodes and runs of the cluster.
    pub async fn cluster_status(&self) -> Result<ClusterStatus, ClientError> {
        match self.request(ClientRequest::ClusterStatus).await? {
            ClientResponse::Cluster(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Reads some bytes of a blob; only whoever has all of them can check that they are right.
    pub(crate) async fn blob_part(&self, digest: Digest, part: Range<u64>) -> Result<Vec<u8>, ClientError> {
        let link = self.shared.link.clone();
        self.shared.runtime.run(async move { link.get_part(digest, part).await }).await
    }

    /// What the coordinator has counted since it started.
    pub(crate) async fn figures(&self) -> Result<Figures, ClientError> {
        let link = self.shared.link.clone();
        self.shared.runtime.run(async move { link.figures().await }).await
    }

    /// Gives a node nothing new, so that it can stop once it has nothing left
    /// ([`NodeStatus::drain`](crate::protocol::NodeStatus)); or, without `drain`, work again.
    pub async fn drain_node(&self, name: &str, drain: bool) -> Result<ClusterStatus, ClientError> {
        match self.request(ClientRequest::DrainNode { name: name.into(), drain }).await? {
            ClientResponse::Cluster(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the certificates of a process refused from now on, and its connections ended. `role` (`node`, `gateway`
    /// or `client`) may be left out if one process of this name is known.
    pub async fn revoke(&self, role: Option<&str>, name: &str) -> Result<ClusterStatus, ClientError> {
        let request = ClientRequest::Revoke { role: role.map(str::to_owned), name: name.to_owned() };
        match self.request(request).await? {
            ClientResponse::Cluster(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Has a new CA sign. The former one is trusted until every known process has a certificate of the new one, or
    /// with `finish` no longer.
    pub async fn rotate_ca(&self, finish: bool) -> Result<ClusterStatus, ClientError> {
        match self.request(ClientRequest::RotateCa { finish }).await? {
            ClientResponse::Cluster(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// A new run that stands where `run` stood after `step`: weights, moments and counts. Refused
    /// beyond the history that the service keeps, with the steps that it reaches.
    pub async fn fork_run(
        &self,
        run: RunId,
        step: u64,
        name: Option<String>,
    ) -> Result<RunInfo, ClientError> {
        let call = Call { key: Some(fresh_key()?), ..Call::default() };
        match self.call(call, ClientRequest::ForkRun { run, step, name }).await? {
            ClientResponse::Run(forked) => Ok(forked),
            other => Err(unexpected(&other)),
        }
    }

    /// Computes again what led `run` to `step`, from the nearest earlier snapshot, and compares the
    /// state after each operation with the journal. Takes as long as training did.
    pub async fn replay_run(&self, run: RunId, step: u64) -> Result<Replayed, ClientError> {
        match self.request(ClientRequest::ReplayRun { run, step }).await? {
            ClientResponse::Replayed(found) => Ok(found),
            other => Err(unexpected(&other)),
        }
    }

    /// A copy of the journal as it is now. It, and the blobs that it names, are there for a while.
    pub(crate) async fn back_up_journal(&self) -> Result<BlobRef, ClientError> {
        match self.request(ClientRequest::BackUp).await? {
            ClientResponse::Blob(copy) => Ok(copy),
            other => Err(unexpected(&other)),
        }
    }

    /// A message of the protocol as it is, for the gateway; one that may be repeated. While the
    /// service is away it waits; dropping the future calls the request off.
    pub(crate) async fn request(&self, request: ClientRequest) -> Result<ClientResponse, ClientError> {
        self.call(Call::default(), request).await
    }

    /// The same with what accompanies it.
    pub(crate) async fn call(
        &self,
        call: Call,
        request: ClientRequest,
    ) -> Result<ClientResponse, ClientError> {
        let link = self.shared.link.clone();
        self.shared.runtime.run(async move { link.call(call, request).await }).await
    }

    /// Stores bytes in the service and returns their name.
    pub(crate) async fn put_blob(&self, bytes: Bytes) -> Result<BlobRef, ClientError> {
        let link = self.shared.link.clone();
        self.shared.runtime.run(async move { link.put_blob(bytes).await }).await
    }

    /// Reads a blob and checks that it is what its name says.
    pub(crate) async fn blob(&self, blob: BlobRef) -> Result<Vec<u8>, ClientError> {
        let link = self.shared.link.clone();
        self.shared.runtime.run(async move { link.get_blob(blob).await }).await
    }
}

/// Runs what blocks on a thread for it.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ClientError> + Send + 'static,
) -> Result<T, ClientError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(ClientError::Protocol(format!("a client task died: {e}"))))
}

/// Fetches and reads a model's tokenizer.json.
pub async fn tokenizer(shared: &Arc<Shared>, base_model: &str) -> Result<Tokenizer, ClientError> {
    let link = shared.link.clone();
    let request = ClientRequest::Tokenizer { base_model: base_model.into() };
    let json = shared
        .runtime
        .run(async move {
            match link.request(request).await? {
                ClientResponse::Blob(blob) => link.get_blob(blob).await,
                other => Err(unexpected(&other)),
            }
        })
        .await?;
    Tokenizer::from_bytes(json).map_err(|e| ClientError::Protocol(format!("tokenizer.json: {e}")))
}

/// Writes `bytes` to `directory/name`; a name that would leave the directory is refused.
fn write_below(directory: &Path, name: &str, bytes: &[u8]) -> Result<(), ClientError> {
    let relative = Path::new(name);
    let plain = |part| matches!(part, std::path::Component::Normal(_));
    if name.is_empty() || !relative.components().all(plain) {
        return Err(ClientError::Protocol(format!("`{name}` is no file name below a directory")));
    }
    let path = directory.join(relative);
    let file = |source| ClientError::File { path: path.clone(), source };
    std::fs::create_dir_all(path.parent().unwrap_or(directory)).map_err(file)?;
    std::fs::write(&path, bytes).map_err(file)
}

fn not_found(message: String) -> ClientError {
    OperationError::new(ErrorKind::NotFound, message).into()
}

pub fn unexpected(response: &ClientResponse) -> ClientError {
    ClientError::Protocol(format!("{response:?}").chars().take(200).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_name_that_leaves_the_directory_is_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for name in ["../escape", "/etc/escape", "a/../../escape", ""] {
            let refused = write_below(directory.path(), name, b"x");
            assert!(matches!(refused, Err(ClientError::Protocol(_))), "{name:?}: {refused:?}");
        }
        write_below(directory.path(), "a/b.json", b"x").expect("a plain relative name");
        assert_eq!(std::fs::read(directory.path().join("a/b.json")).expect("written"), b"x");
    }
}
