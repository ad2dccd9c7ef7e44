//! Runs a part as this process: its actix system, its signals, its exit.

use std::{
    future::Future,
    io::{self, Read},
    net::SocketAddr,
    path::PathBuf,
};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    coordinator::{self, CoordinatorConfig},
    node::{self, NodeConfig},
    protocol::ALPN,
    transport::Endpoint,
};

use super::{DataDirectory, ServiceError};

/// Exit status of a part that can't run for a reason a restart would not change (bad
/// configuration, a data directory in use): `EX_CONFIG` of sysexits.h.
pub const EXIT_REFUSED: u8 = 78;

/// Set for the parts that a supervisor starts: their standard input is a pipe from it, whose
/// end means that it is gone.
pub const PARENT_PIPE: &str = "LOCKSTEP_PARENT_PIPE";

/// First word of the line by which a coordinator tells its supervisor its address.
pub const LISTENING: &str = "listening";

/// Control threads of a process. They decide and copy; computing has threads of its own.
const CONTROL_THREADS: usize = 2;

/// Runs `main` in an actix system over a multi-threaded runtime on this thread.
pub fn in_system<F>(name: &str, main: F) -> Result<(), ServiceError>
where
    F: Future<Output = Result<(), ServiceError>>,
{
    run_here(name, main)
}

/// The same for errors of another kind.
pub fn run_here<F, E>(name: &str, main: F) -> Result<(), E>
where
    F: Future<Output = Result<(), E>>,
    E: From<ServiceError>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name(name)
        .enable_all()
        .build()
        .map_err(|source| ServiceError::Start { what: "the control runtime".into(), source })?;
    // `with_tokio_rt` wants a factory that can't fail, hence the runtime made before.
    let mut runtime = Some(runtime);
    let system = actix_rt::System::with_tokio_rt(|| runtime.take().expect("called once"));
    system.block_on(main)
}

/// Runs the coordinator of a data directory until it is told to stop; prints
/// `listening ADDRESS` once it is bound.
pub fn run_coordinator(data_dir: PathBuf, listen: SocketAddr) -> Result<(), ServiceError> {
    let data = DataDirectory::open(data_dir)?;
    data.prepare_identities()?;
    in_system("coordinator", async move {
        let endpoint = Endpoint::quic(listen, data.identity("coordinator")?, ALPN)?;
        let address = endpoint.local_address();
        let stop = shutdown_requested()?;
        let mut config = CoordinatorConfig::new(data.path());
        config.opened = Some(Box::new(move || announce(&data, &address)));
        Ok(coordinator::serve(config, endpoint, stop).await?)
    })
}

/// Tells local clients and the supervisor where the coordinator is.
fn announce(data: &DataDirectory, address: &str) {
    if let Err(error) = data.write_endpoint(address) {
        tracing::error!("local clients won't find this service: {error}");
    }
    println!("{LISTENING} {address}");
}

/// Runs a node until it, or the coordinator, is told to stop.
pub fn run_node(config: NodeConfig, data_dir: PathBuf, listen: SocketAddr) -> Result<(), ServiceError> {
    let data = DataDirectory::open(data_dir)?;
    in_system("node", async move {
        let endpoint = Endpoint::quic(listen, data.identity("node")?, ALPN)?;
        let stop = shutdown_requested()?;
        Ok(node::serve(config, endpoint, stop).await?)
    })
}

/// Resolves at SIGINT, SIGTERM, or when the supervisor that started this process is gone.
pub fn shutdown_requested() -> Result<impl Future<Output = ()>, ServiceError> {
    let signals =
        |kind| signal(kind).map_err(|source| ServiceError::Start { what: "signal handling".into(), source });
    let (mut interrupt, mut terminate) =
        (signals(SignalKind::interrupt())?, signals(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = parent_gone() => {}
        }
    })
}

/// Resolves at the end of the supervisor's pipe; never for a process that has none.
async fn parent_gone() {
    if std::env::var_os(PARENT_PIPE).is_none() {
        return std::future::pending().await;
    }
    let (ended, end) = tokio::sync::oneshot::channel();
    // A thread of its own, and not one of the runtime's: those are waited for at the end, and a
    // read of standard input can't be called off.
    let watching = std::thread::Builder::new().name("parent-pipe".into()).spawn(move || {
        // Nothing is ever written: it returns at the end, or with an error, which is as final.
        let _ = io::stdin().lock().read(&mut [0]);
        let _ = ended.send(());
    });
    match watching {
        // A dropped sender can't be: the thread sends whatever happens.
        Ok(_) => drop(end.await),
        Err(error) => {
            tracing::warn!("can't watch for the supervisor's end: {error}");
            std::future::pending().await
        }
    }
}
