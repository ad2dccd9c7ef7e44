//! Checkpoints that leave a service as directories, and adapters that come into one.

use std::{collections::BTreeMap, path::Path};

use bytes::Bytes;

use crate::{
    archive::{self, Manifest, Verified},
    protocol::BlobRef,
    types::{Checkpoint, CheckpointId},
};

use super::{ClientError, LoraOptions, ServiceClient, TrainingClient};

impl ServiceClient {
    /// Writes a checkpoint and its manifest into `directory`, which must be empty or not exist;
    /// `archive::verify_directory` proves it later. A sampler checkpoint is then a directory that
    /// PEFT loads.
    pub async fn export_checkpoint(
        &self,
        checkpoint: &Checkpoint,
        directory: &Path,
    ) -> Result<Manifest, ClientError> {
        let files: Vec<_> = self.fetch_checkpoint(checkpoint.id).await?.into_iter().collect();
        Ok(archive::write(directory, checkpoint, &files)?)
    }

    /// Proves a checkpoint where the service keeps it: fetches every file, and checks what it holds.
    pub async fn verify_checkpoint(&self, checkpoint: &Checkpoint) -> Result<Verified, ClientError> {
        let files = self.fetch_checkpoint(checkpoint.id).await?;
        Ok(archive::verify_files(Some(checkpoint.clone()), &files)?)
    }

    /// A checkpoint's files by name, each checked against its digest.
    async fn fetch_checkpoint(
        &self,
        checkpoint: CheckpointId,
    ) -> Result<BTreeMap<String, Vec<u8>>, ClientError> {
        let mut files = BTreeMap::new();
        let mut page_token = 0;
        loop {
            let page = self.get_checkpoint_archive_url(checkpoint, page_token).await?;
            for file in page.presigned_urls {
                let digest = file
                    .digest()
                    .ok_or_else(|| ClientError::Protocol(format!("`{}` is no blob", file.url)))?;
                let bytes = self.blob(BlobRef { digest, size: file.size_bytes }).await;
                let bytes = bytes.map_err(|e| e.about_file(&file.relative_file_name))?;
                files.insert(file.relative_file_name, bytes);
            }
            match page.next_page_token {
                Some(next) => page_token = next,
                None => return Ok(files),
            }
        }
    }

    /// Creates a run that goes on from the adapter in `directory`: PEFT's two files,
    /// `adapter_config.json` and `adapter_model.safetensors`, whoever made them. Rank, alpha and
    /// targets are the adapter's; `options` gives the rest.
    pub async fn create_training_client_from_adapter(
        &self,
        base_model: &str,
        directory: &Path,
        options: LoraOptions,
    ) -> Result<TrainingClient, ClientError> {
        let adapter = archive::read_adapter(directory)?;
        let config = &adapter.layout.config;
        let options = LoraOptions { alpha: config.alpha, targets: config.targets.clone(), ..options };
        let training = self.create_lora_training_client(base_model, config.rank, options).await?;
        let blob = self.put_blob(Bytes::from(adapter.to_bytes())).await?;
        training.load_state(&blob.load_path()).await?;
        Ok(training)
    }
}
