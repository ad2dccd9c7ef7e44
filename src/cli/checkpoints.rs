use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use futures::executor::block_on;
use lockstep::{
    archive::{self, Verified},
    client::{LoraOptions, ServiceClient},
    kernels::WeightDtype,
    types::{Checkpoint, CheckpointTarget, RunId},
};

use super::look::Look;

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Checkpoints {
    /// Only those of one run, `run-N`.
    #[arg(long)]
    run: Option<RunId>,
    #[command(flatten)]
    service: Look,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Subcommand)]
enum Action {
    /// Write a checkpoint into a directory, with a manifest of sizes and digests.
    Export(Export),
    /// Prove that a checkpoint is whole and unaltered: a directory, or a `bt://` path of a service.
    Verify(Verify),
    /// Make a run that goes on from an adapter in PEFT layout, whoever made it.
    Import(Import),
    /// Add an adapter to its model's weights: safetensors that need no adapter any more.
    Merge(Merge),
}

#[derive(Args)]
struct Export {
    /// `bt://loops:RUN/…/NAME`, or the checkpoint's id.
    checkpoint: String,
    /// Empty, or not there yet.
    directory: PathBuf,
    #[command(flatten)]
    service: Look,
}

#[derive(Args)]
struct Verify {
    /// A directory, or `bt://loops:RUN/…/NAME`.
    path: String,
    #[command(flatten)]
    service: Look,
}

#[derive(Args)]
struct Import {
    /// Holds adapter_config.json and adapter_model.safetensors.
    directory: PathBuf,
    /// The model that the adapter is for, by the name under which it is served.
    #[arg(long)]
    base_model: String,
    /// What the checkpoints of the new run are called.
    #[arg(long, default_value = "imported")]
    name: String,
    #[command(flatten)]
    service: Look,
}

#[derive(Args)]
struct Merge {
    /// Holds adapter_config.json and adapter_model.safetensors.
    adapter: PathBuf,
    /// The model: a Hugging Face directory or a GGUF file.
    #[arg(long)]
    model: PathBuf,
    /// What the weights of a GGUF file are written as, f32 or bf16; those of a directory keep their types.
    #[arg(long)]
    dtype: Option<WeightDtype>,
    /// Where the merged model goes; empty, or not there yet.
    #[arg(long)]
    out: PathBuf,
}

impl Checkpoints {
    pub fn run(self) -> anyhow::Result<()> {
        match self.action {
            None => list(&self.service.connect()?, self.run),
            Some(Action::Export(export)) => export.run(),
            Some(Action::Verify(verify)) => verify.run(),
            Some(Action::Import(import)) => import.run(),
            Some(Action::Merge(merge)) => merge.run(),
        }
    }
}

fn list(client: &ServiceClient, run: Option<RunId>) -> anyhow::Result<()> {
    for checkpoint in block_on(client.list_checkpoints(run))? {
        let target = match checkpoint.target {
            CheckpointTarget::Trainer => "trainer",
            CheckpointTarget::Sampler => "sampler",
        };
        println!(
            "{}  {}  {target}  step {}  {} bytes",
            checkpoint.id, checkpoint.path, checkpoint.step, checkpoint.size_bytes
        );
    }
    Ok(())
}

/// The checkpoint of a path or an id.
fn find(client: &ServiceClient, name: &str) -> anyhow::Result<Checkpoint> {
    let name = name.trim_end_matches('/');
    let all = block_on(client.list_checkpoints(None))?;
    let found = all.into_iter().find(|it| it.path == name || it.id.to_string() == name);
    found.with_context(|| format!("there is no checkpoint `{name}`; `lockstep checkpoints` lists them"))
}

impl Export {
    fn run(self) -> anyhow::Result<()> {
        let client = self.service.connect()?;
        let checkpoint = find(&client, &self.checkpoint)?;
        let manifest = block_on(client.export_checkpoint(&checkpoint, &self.directory))?;
        for file in manifest.files {
            println!("{}  {}  {} bytes", file.sha256, file.name, file.size_bytes);
        }
        Ok(())
    }
}

impl Verify {
    fn run(self) -> anyhow::Result<()> {
        let verified = if self.path.starts_with("bt://") {
            let client = self.service.connect()?;
            block_on(client.verify_checkpoint(&find(&client, &self.path)?))?
        } else {
            archive::verify_directory(self.path.as_ref())?
        };
        print(&verified);
        Ok(())
    }
}

fn print(verified: &Verified) {
    for file in &verified.files {
        println!("{}  {}  {} bytes", file.sha256, file.name, file.size_bytes);
    }
    let lora = &verified.lora;
    let step = verified.step.map(|step| format!(", step {step}")).unwrap_or_default();
    println!("whole and unaltered: rank {}, alpha {}{step}", lora.rank, lora.alpha);
    match &verified.checkpoint {
        Some(checkpoint) => println!("{} of {}", checkpoint.path, checkpoint.base_model),
        None => {
            println!("there is no {}, so this is what the digest inside the file proves", archive::MANIFEST)
        }
    }
}

impl Import {
    fn run(self) -> anyhow::Result<()> {
        let client = self.service.connect()?;
        let options = LoraOptions { name: Some(self.name.clone()), ..LoraOptions::default() };
        block_on(async {
            let training = client
                .create_training_client_from_adapter(&self.base_model, &self.directory, options)
                .await?;
            let trainer = training.save_state(&self.name).await?;
            let sampler = training.save_weights_for_sampler(&self.name).await?;
            println!("{}\n{}", trainer.path, sampler.path);
            Ok(())
        })
    }
}

impl Merge {
    fn run(self) -> anyhow::Result<()> {
        if self.out == self.model {
            bail!("--out must not be the model's own directory");
        }
        archive::merge(&self.adapter, &self.model, &self.out, self.dtype)?;
        println!("{}", self.out.display());
        Ok(())
    }
}
