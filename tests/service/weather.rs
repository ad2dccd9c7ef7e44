//! A stretch of bad network: a UDP proxy in front of a process, which loses, delays and reorders packets as a
//! seed says, and can be cut.
//!
//! ```text
//!   clients ◄──► front port ═══ weather ═══ a port for each client ◄──► the process
//! ```
//!
//! Fates are drawn in the order in which packets come, so a seed repeats the weather and not each packet's
//! fate: which packets come when depends on the machine.

use std::{
    collections::{HashMap, HashSet},
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use tokio::{net::UdpSocket, runtime::Runtime};

/// What befalls packets, in each direction.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    /// Packets in a thousand that are lost.
    pub lost: u32,
    pub delay: Duration,
    /// Packets in a thousand that take twice the delay, behind those that come after them.
    pub late: u32,
}

pub const CALM: Weather = Weather { lost: 0, delay: Duration::ZERO, late: 0 };

/// Proxies of one test, on a runtime of their own.
pub struct Network {
    runtime: Runtime,
    seed: u64,
}

/// One proxy; it goes with its network.
#[derive(Clone)]
pub struct Proxy {
    pub address: SocketAddr,
    state: Arc<State>,
}

struct State {
    weather: Weather,
    dice: Mutex<ChaCha8Rng>,
    cut: AtomicBool,
    cut_clients: Mutex<HashSet<SocketAddr>>,
    passed: AtomicU64,
    dropped: AtomicU64,
    late: AtomicU64,
}

/// The largest UDP packet.
const PACKET: usize = 64 << 10;

impl Network {
    pub fn new(seed: u64) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Self { runtime: runtime.expect("a runtime"), seed }
    }

    /// Listens on a free port and passes on to `to`, whether somebody is there yet or not.
    pub fn proxy(&mut self, to: SocketAddr, weather: Weather) -> Proxy {
        self.seed = self.seed.wrapping_add(1);
        let state = Arc::new(State {
            weather,
            dice: Mutex::new(ChaCha8Rng::seed_from_u64(self.seed)),
            cut: AtomicBool::new(false),
            cut_clients: Mutex::default(),
            passed: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            late: AtomicU64::new(0),
        });
        let front = self.runtime.block_on(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))).expect("a port");
        let address = front.local_addr().expect("bound");
        self.runtime.spawn(serve(Arc::new(front), to, state.clone()));
        Proxy { address, state }
    }
}

impl Proxy {
    /// Nothing passes any more, in neither direction; or everything again.
    pub fn cut(&self, cut: bool) {
        self.state.cut.store(cut, Ordering::Relaxed);
    }

    /// The same for one client alone.
    pub fn cut_client(&self, client: SocketAddr, cut: bool) {
        let mut clients = self.state.cut_clients.lock().expect("nobody panics here");
        if cut {
            clients.insert(client)
        } else {
            clients.remove(&client)
        };
    }

    /// Packets that passed, were dropped, and were late.
    pub fn counts(&self) -> [u64; 3] {
        let State { passed, dropped, late, .. } = &*self.state;
        [passed, dropped, late].map(|count| count.load(Ordering::Relaxed))
    }
}

/// Takes what clients send; each has a socket of its own towards the process, so that answers find back.
async fn serve(front: Arc<UdpSocket>, to: SocketAddr, state: Arc<State>) {
    let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut packet = vec![0; PACKET];
    loop {
        // An error is that of a packet that nobody took: the next may be taken.
        let Ok((size, client)) = front.recv_from(&mut packet).await else { continue };
        let back = match backs.get(&client) {
            Some(back) => back.clone(),
            None => {
                let back = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port"));
                back.connect(to).await.expect("an address");
                backs.insert(client, back.clone());
                tokio::spawn(answer(back.clone(), front.clone(), client, state.clone()));
                back
            }
        };
        let bytes = packet[..size].to_vec();
        state.pass(client, async move { drop(back.send(&bytes).await) });
    }
}

async fn answer(back: Arc<UdpSocket>, front: Arc<UdpSocket>, client: SocketAddr, state: Arc<State>) {
    let mut packet = vec![0; PACKET];
    loop {
        let Ok(size) = back.recv(&mut packet).await else {
            // The process is not there: no reason to spin.
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        };
        let (bytes, front) = (packet[..size].to_vec(), front.clone());
        state.pass(client, async move { drop(front.send_to(&bytes, client).await) });
    }
}

impl State {
    /// Lets a packet from or to a client meet its fate.
    fn pass(&self, client: SocketAddr, send: impl Future<Output = ()> + Send + 'static) {
        let [lost, late] = {
            let mut dice = self.dice.lock().expect("nobody panics here");
            [self.weather.lost, self.weather.late].map(|in_a_thousand| dice.next_u32() % 1000 < in_a_thousand)
        };
        if lost || self.is_cut(&client) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.passed.fetch_add(1, Ordering::Relaxed);
        self.late.fetch_add(late.into(), Ordering::Relaxed);
        let delay = self.weather.delay * if late { 2 } else { 1 };
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            send.await;
        });
    }

    fn is_cut(&self, client: &SocketAddr) -> bool {
        let clients = self.cut_clients.lock().expect("nobody panics here");
        self.cut.load(Ordering::Relaxed) || clients.contains(client)
    }
}
