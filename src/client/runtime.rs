use std::future::Future;

use tokio::{runtime::Runtime, task::JoinHandle};

use crate::types::{ErrorKind, OperationError};

use super::ClientError;

/// The threads that a client's tasks run on, whatever the caller's executor is.
pub struct ClientRuntime(Option<Runtime>);

impl ClientRuntime {
    /// Two threads: one may be busy compressing a payload while the other answers.
    pub fn start() -> Result<Self, ClientError> {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("lockstep-client")
            .enable_all()
            .build()
            .map(|runtime| Self(Some(runtime)))
            .map_err(|e| {
                ClientError::Operation(OperationError::new(ErrorKind::ResourceExhausted, e.to_string()))
            })
    }

    fn runtime(&self) -> &Runtime {
        self.0.as_ref().expect("taken in Drop only")
    }

    /// Starts a task.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.runtime().spawn(task)
    }

    /// Runs `task` on these threads and waits for it from any executor. Who stops waiting ends
    /// the task.
    pub async fn run<T, F>(&self, task: F) -> Result<T, ClientError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ClientError>> + Send + 'static,
    {
        // A JoinHandle may be polled by any executor; it needs no runtime around it.
        let mut task = AbortOnDrop(self.spawn(task));
        (&mut task.0).await.unwrap_or_else(|e| Err(ClientError::Protocol(format!("a client task died: {e}"))))
    }
}

/// A task that lives no longer than its handle.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Drop for ClientRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // A plain drop waits for the tasks, and panics inside another runtime's task.
            runtime.shutdown_background();
        }
    }
}
