//! ServiceClient, TrainingClient, SamplingClient: what a Rust program drives Lockstep with.
//!
//! ```no_run
//! use lockstep::{client::{LoraOptions, ServiceClient}, types::*};
//!
//! # async fn example(data: Vec<Datum>) -> Result<(), lockstep::client::ClientError> {
//! let service = ServiceClient::connect("./lockstep-data").await?;
//! let training = service
//!     .create_lora_training_client("HuggingFaceTB/SmolLM2-135M-Instruct", 16, LoraOptions::default())
//!     .await?;
//! let loss = training.forward_backward(data, LossSpec::new(LossFn::CrossEntropy));
//! let step = training.optim_step(AdamParams::default());
//! println!("{:.3} after {:?}", loss.await?.loss, step.await?.metrics);
//! let sampling = training.save_weights_and_get_sampling_client("first").await?;
//! let prompt = ModelInput::from_ints(vec![1, 4093, 198]);
//! println!("{:?}", sampling.sample(prompt, 1, SamplingParams::default(), SampleFlags::default()).await?);
//! # Ok(())
//! # }
//! ```
//!
//! A client owns its threads: it works in any executor and in none. Operations may be
//! submitted before the ones before them have finished; a run executes them in the order in
//! which the methods were called. Gradients are divided by the token count at `optim_step`
//! unless the loss says `skip_token_normalization`.

mod error;
mod link;
mod runtime;

mod archive;
mod blocking;
mod custom;
mod follow;
mod sampling;
mod service;
mod submit;
mod training;
mod wandb;

pub use custom::{CustomLoss, CustomLossFn};
pub use error::ClientError;
pub(crate) use follow::RunFollower;
pub use link::{CLIENT_IDENTITY, ConnectTarget, Connector, ENDPOINT_FILE};
pub use sampling::SamplingClient;
pub use service::{LoraOptions, SamplingSource, ServiceClient};
pub use training::{TrainingClient, TrainingInfo};

pub(crate) use link::Link;
