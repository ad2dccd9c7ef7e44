//! The replica's two threads: `replica-N` decodes, `replica-N-loader` reads weights, so that a
//! publish never holds up a step for longer than the cores that it takes.
//!
//! Each takes tasks from a bounded channel and ends when the replica drops the other side. A
//! panic ends the thread; the actor hears of it and answers whoever waits.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
};

use actix::Addr;
use bytes::Bytes;

use crate::{
    kernels::lower_thread_priority,
    model::{Adapter, BaseModel, Library, ModelConfig},
    types::PolicyId,
};

use super::{
    actor::SamplerReplica,
    engine::{Engine, EngineOrder},
    error::SamplerError,
    schedule::ModelIndex,
    state::StepReport,
};

/// What a thread tells the actor.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub enum FromThread {
    StepDone(StepReport),
    ModelLoaded { model: ModelIndex, outcome: Result<Arc<BaseModel>, SamplerError> },
    Verified { policy: PolicyId, outcome: Result<Arc<Adapter>, SamplerError> },
    Died { reason: String },
}

/// What the loader reads.
pub enum Load {
    Model { model: ModelIndex, name: String },
    Adapter { policy: PolicyId, config: Arc<ModelConfig>, bytes: Bytes },
}

/// Starts the thread that decodes.
pub fn spawn_engine(
    replica: u32,
    mut engine: Engine,
    orders: mpsc::Receiver<EngineOrder>,
    actor: Addr<SamplerReplica>,
) -> std::io::Result<()> {
    spawn(format!("replica-{replica}"), orders, actor, move |order| {
        FromThread::StepDone(engine.carry_out(order))
    })
}

/// Starts the thread that reads base models and verifies adapters.
pub fn spawn_loader(
    replica: u32,
    library: Arc<Library>,
    loads: mpsc::Receiver<Load>,
    actor: Addr<SamplerReplica>,
) -> std::io::Result<()> {
    spawn(format!("replica-{replica}-loader"), loads, actor, move |load| match load {
        Load::Model { model, name } => {
            let unavailable =
                |problem: String| SamplerError::ModelUnavailable { name: name.clone(), problem };
            let outcome = library.load(&name).map_err(|error| unavailable(error.to_string()));
            FromThread::ModelLoaded { model, outcome }
        }
        Load::Adapter { policy, config, bytes } => {
            FromThread::Verified { policy, outcome: verify(policy, &config, &bytes).map(Arc::new) }
        }
    })
}

/// Reads an adapter and hashes the values that were read, not the bytes that came: what is served
/// is what was verified.
fn verify(policy: PolicyId, config: &ModelConfig, bytes: &[u8]) -> Result<Adapter, SamplerError> {
    let adapter = Adapter::from_bytes(config, bytes)
        .map_err(|error| SamplerError::BadAdapter { policy, problem: error.to_string() })?;
    let found = adapter.digest();
    if found == policy.digest { Ok(adapter) } else { Err(SamplerError::DigestMismatch { policy, found }) }
}

/// A thread that performs what comes through `tasks` and tells the actor of each.
pub(super) fn spawn<Task: Send + 'static>(
    name: String,
    tasks: mpsc::Receiver<Task>,
    actor: Addr<SamplerReplica>,
    mut perform: impl FnMut(Task) -> FromThread + Send + 'static,
) -> std::io::Result<()> {
    let control = tokio::runtime::Handle::current();
    std::thread::Builder::new().name(name.clone()).spawn(move || {
        lower_thread_priority();
        // Waits for room in the mailbox, which no handler blocks; fails once the actor is gone.
        let tell = |event| control.block_on(actor.send(event)).is_ok();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while let Ok(task) = tasks.recv() {
                if !tell(perform(task)) {
                    break;
                }
            }
        }));
        if let Err(panic) = outcome {
            tell(FromThread::Died { reason: format!("thread {name} has panicked: {}", message(&*panic)) });
        }
    })?;
    Ok(())
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
