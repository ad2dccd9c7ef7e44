//! Runs a part as this process: its actix system, its signals, its exit.

use std::{
    future::Future,
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    coordinator::{self, CoordinatorConfig},
    join::{self, Authority, Desk, JoinToken},
    node::{self, NodeConfig},
    protocol::{ALPN, JOIN_ALPN},
    store::BucketLocation,
    transport::{Doorway, Endpoint, Identity, Role},
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

/// Between two attempts to join.
const JOIN_AGAIN: Duration = Duration::from_secs(2);

/// Longest between two looks at the certificates of this machine, and looks in the life of one.
const TEND_EVERY: Duration = Duration::from_secs(60);
const TENDINGS: u32 = 20;

/// Control threads of a process. They decide and copy; computing has threads of its own.
const CONTROL_THREADS: usize = 2;

/// Runs `main` in an actix system over a multi-threaded runtime on this thread.
pub fn in_system<F>(name: &str, main: F) -> Result<(), ServiceError>
where
    F: Future<Output = Result<(), ServiceError>>,
{
    run_here(name, main)
}

/// The same for results of another kind.
pub fn run_here<F, T, E>(name: &str, main: F) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
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

/// What runs a coordinator as a process.
pub struct CoordinatorProcess {
    pub data_dir: PathBuf,
    /// Where it listens; port 0 is any.
    pub listen: SocketAddr,
    /// Where processes that hold a token come in; absent: none can.
    pub join: Option<SocketAddr>,
    /// Snapshots of each run that are kept, at least 1.
    pub history: u32,
    /// Holds the blobs; absent: the bucket of an earlier start, or else the data directory.
    pub store: Option<BucketLocation>,
    /// How long the certificates are good that it signs, at least 10 s.
    pub certificate_life: Duration,
}

/// Runs the coordinator of a data directory until it is told to stop; prints
/// `listening ADDRESS` once it is bound.
pub fn run_coordinator(process: CoordinatorProcess) -> Result<(), ServiceError> {
    let CoordinatorProcess { data_dir, listen, join, history, store, certificate_life } = process;
    let data = DataDirectory::open(data_dir)?;
    data.prepare_identities()?;
    in_system("coordinator", async move {
        let identity = data.identity("coordinator")?;
        let authority = Arc::new(Authority::open(data.path(), certificate_life)?);
        let doorway = join.map(|at| Doorway::bind(at, &identity, JOIN_ALPN)).transpose()?;
        let endpoint = Endpoint::quic(listen, identity, ALPN)?;
        let face = endpoint.clone();
        authority.show_by(move |identity| face.present(identity.clone()))?;
        let address = endpoint.local_address();
        let stop = shutdown_requested()?;
        if let Some(doorway) = doorway {
            tracing::info!("processes with a token join at {}", doorway.local_address());
            let doorway = Arc::new(doorway);
            let face = doorway.clone();
            authority.show_by(move |identity| face.present(identity))?;
            tokio::spawn(Desk::open(data.path(), authority.clone())?.serve(doorway));
        }
        tokio::spawn(tend(authority.clone(), certificate_life));
        let mut config = CoordinatorConfig::new(data.path());
        config.limits.history_snapshots = history as usize;
        config.store = store;
        config.authority = Some(authority);
        config.opened = Some(Box::new(move || announce(&data, &address)));
        Ok(coordinator::serve(config, endpoint, stop).await?)
    })
}

/// Keeps the certificates of this machine's processes fresh, the coordinator's own among them.
async fn tend(authority: Arc<Authority>, life: Duration) {
    loop {
        tokio::time::sleep((life / TENDINGS).min(TEND_EVERY)).await;
        let authority = authority.clone();
        match tokio::task::spawn_blocking(move || authority.tend()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::error!("certificates of this machine are not renewed: {error}"),
            Err(panic) => tracing::error!("certificates of this machine are not renewed: {panic}"),
        }
    }
}

/// Tells local clients and the supervisor where the coordinator is.
fn announce(data: &DataDirectory, address: &str) {
    if let Err(error) = data.write_endpoint(&from_here(address)) {
        tracing::error!("local clients won't find this service: {error}");
    }
    println!("{LISTENING} {address}");
}

/// How processes of this machine reach what listens on `address`: nobody can connect to "every address".
fn from_here(address: &str) -> String {
    let Ok(mut reached) = address.parse::<SocketAddr>() else { return address.into() };
    match reached.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => reached.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => reached.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    reached.to_string()
}

/// What runs a node as a process.
pub struct NodeProcess {
    pub config: NodeConfig,
    pub data_dir: PathBuf,
    /// Where it listens; absent: any port of the address that reaches the coordinator.
    pub listen: Option<SocketAddr>,
    /// Shown at this doorway for an identity, if there is none yet.
    pub join: Option<(String, JoinToken)>,
}

/// Runs a node until it, or the coordinator, is told to stop.
pub fn run_node(process: NodeProcess) -> Result<(), ServiceError> {
    let NodeProcess { config, data_dir, listen, join } = process;
    let data = DataDirectory::open(data_dir)?;
    in_system("node", async move {
        let mut stop = std::pin::pin!(shutdown_requested()?);
        let identity = tokio::select! {
            () = &mut stop => return Ok(()),
            identity = identity_of(&data, &config.name, join.as_ref()) => identity?,
        };
        let listen = match listen {
            Some(listen) => listen,
            None => SocketAddr::new(address_towards(&config.coordinator).await?, 0),
        };
        let endpoint = Endpoint::quic(listen, identity, ALPN)?;
        Ok(node::serve(config, endpoint, stop).await?)
    })
}

/// The identity that the data directory holds under this name, or one that a token gets. A doorway that
/// can't be reached is tried again: the coordinator may be on its way.
async fn identity_of(
    data: &DataDirectory,
    name: &str,
    join: Option<&(String, JoinToken)>,
) -> Result<Identity, ServiceError> {
    let present = data.identity(name);
    let Some((address, token)) = join else { return present };
    if let Ok(identity) = &present
        && identity.knows_ca(&token.ca)
    {
        return present;
    }
    loop {
        match join::apply(address, token, name).await {
            Ok(identity) if identity.role() != Role::Node => {
                let reason = format!("the token makes a {}, not a node", identity.role());
                return Err(ServiceError::Refused { part: "node".into(), reason });
            }
            Ok(identity) => {
                identity.save(&data.identities(), name)?;
                tracing::info!("joined the cluster as {name}");
                return data.identity(name);
            }
            Err(error) if error.is_retryable() => {
                tracing::warn!("{error}; trying again in {JOIN_AGAIN:?}");
                tokio::time::sleep(JOIN_AGAIN).await;
            }
            // The CA may have changed since the token was made, and the certificate with it.
            Err(error) if present.is_ok() => {
                tracing::warn!(
                    "the token is of no use ({error}); going on with the certificate that is there"
                );
                return present;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// This machine's address on the way to the coordinator, which others reach it at as well.
async fn address_towards(coordinator: &str) -> Result<IpAddr, ServiceError> {
    let unreachable =
        |source| ServiceError::Start { what: format!("towards the coordinator {coordinator}"), source };
    let to = tokio::net::lookup_host(coordinator).await.map_err(unreachable)?.next();
    let to = to.ok_or_else(|| unreachable(io::Error::other("the name has no address")))?;
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Connecting a UDP socket sends nothing; it asks for the route.
    let socket = tokio::net::UdpSocket::bind((any, 0)).await.map_err(unreachable)?;
    socket.connect(to).await.map_err(unreachable)?;
    Ok(socket.local_addr().map_err(unreachable)?.ip())
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
