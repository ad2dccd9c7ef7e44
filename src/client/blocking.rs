//! Twins of the async calls for programs without an executor. They block this thread; from an
//! async task call the originals.

use std::path::Path;

use futures::executor::block_on;
use tokenizers::Tokenizer;

use crate::{
    protocol::{ClusterStatus, RunInfo},
    types::{Checkpoint, CheckpointFilesResponse, CheckpointId, RunId, ServerCapabilities},
};

use super::{
    ClientError, ConnectTarget, LoraOptions, SamplingClient, SamplingSource, ServiceClient, TrainingClient,
};

impl ServiceClient {
    /// [`connect`](Self::connect), blocking.
    pub fn connect_blocking(target: impl Into<ConnectTarget>) -> Result<Self, ClientError> {
        block_on(Self::connect(target))
    }

    /// [`get_server_capabilities`](Self::get_server_capabilities), blocking.
    pub fn get_server_capabilities_blocking(&self) -> Result<ServerCapabilities, ClientError> {
        block_on(self.get_server_capabilities())
    }

    /// [`create_lora_training_client`](Self::create_lora_training_client), blocking.
    pub fn create_lora_training_client_blocking(
        &self,
        base_model: &str,
        rank: u32,
        options: LoraOptions,
    ) -> Result<TrainingClient, ClientError> {
        block_on(self.create_lora_training_client(base_model, rank, options))
    }

    /// [`attach_training_client`](Self::attach_training_client), blocking.
    pub fn attach_training_client_blocking(&self, run: RunId) -> Result<TrainingClient, ClientError> {
        block_on(self.attach_training_client(run))
    }

    /// [`create_training_client_from_state`](Self::create_training_client_from_state), blocking.
    pub fn create_training_client_from_state_blocking(
        &self,
        path: &str,
    ) -> Result<TrainingClient, ClientError> {
        block_on(self.create_training_client_from_state(path))
    }

    /// [`create_training_client_from_state_with_optimizer`](Self::create_training_client_from_state_with_optimizer),
    /// blocking.
    pub fn create_training_client_from_state_with_optimizer_blocking(
        &self,
        path: &str,
    ) -> Result<TrainingClient, ClientError> {
        block_on(self.create_training_client_from_state_with_optimizer(path))
    }

    /// [`create_sampling_client`](Self::create_sampling_client), blocking.
    pub fn create_sampling_client_blocking(
        &self,
        source: SamplingSource,
    ) -> Result<SamplingClient, ClientError> {
        block_on(self.create_sampling_client(source))
    }

    /// [`list_checkpoints`](Self::list_checkpoints), blocking.
    pub fn list_checkpoints_blocking(&self, run: Option<RunId>) -> Result<Vec<Checkpoint>, ClientError> {
        block_on(self.list_checkpoints(run))
    }

    /// [`get_checkpoint_archive_url`](Self::get_checkpoint_archive_url), blocking.
    pub fn get_checkpoint_archive_url_blocking(
        &self,
        checkpoint: CheckpointId,
        page_token: u64,
    ) -> Result<CheckpointFilesResponse, ClientError> {
        block_on(self.get_checkpoint_archive_url(checkpoint, page_token))
    }

    /// [`download_checkpoint`](Self::download_checkpoint), blocking.
    pub fn download_checkpoint_blocking(
        &self,
        checkpoint: CheckpointId,
        directory: &Path,
    ) -> Result<(), ClientError> {
        block_on(self.download_checkpoint(checkpoint, directory))
    }

    /// [`get_tokenizer`](Self::get_tokenizer), blocking.
    pub fn get_tokenizer_blocking(&self, base_model: &str) -> Result<Tokenizer, ClientError> {
        block_on(self.get_tokenizer(base_model))
    }

    /// [`run_info`](Self::run_info), blocking.
    pub fn run_info_blocking(&self, run: RunId) -> Result<RunInfo, ClientError> {
        block_on(self.run_info(run))
    }

    /// [`cluster_status`](Self::cluster_status), blocking.
    pub fn cluster_status_blocking(&self) -> Result<ClusterStatus, ClientError> {
        block_on(self.cluster_status())
    }
}

impl TrainingClient {
    /// [`policy_version`](Self::policy_version), blocking.
    pub fn policy_version_blocking(&self) -> Result<u64, ClientError> {
        block_on(self.policy_version())
    }

    /// [`refresh`](Self::refresh), blocking.
    pub fn refresh_blocking(&self) -> Result<RunInfo, ClientError> {
        block_on(self.refresh())
    }

    /// [`get_tokenizer`](Self::get_tokenizer), blocking.
    pub fn get_tokenizer_blocking(&self) -> Result<Tokenizer, ClientError> {
        block_on(self.get_tokenizer())
    }
}

impl SamplingClient {
    /// [`get_tokenizer`](Self::get_tokenizer), blocking.
    pub fn get_tokenizer_blocking(&self) -> Result<Tokenizer, ClientError> {
        block_on(self.get_tokenizer())
    }
}
