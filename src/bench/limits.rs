//! What this machine can do at most, measured beside what Lockstep does.

use std::{hint::black_box, path::Path, thread, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use super::{
    BenchError, WorkerKind,
    figures::{Span, median},
    worker::{Parent, Trust, Worker, tell_all},
};
use crate::transport::{Connection, Endpoint, Role, receive_bulk, send_bulk};

/// Bytes that each thread copies: past every cache.
const COPIED: usize = 256 << 20;

/// One write of a bulk transfer.
const CHUNK: usize = 1 << 20;

/// For a worker to reach another.
const CONNECT: Duration = Duration::from_secs(10);

/// Copying between buffers of one process: bytes copied a second, one thread and all of them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memcpy {
    pub one_thread_gb_per_s: f64,
    pub all_threads_gb_per_s: f64,
}

/// quinn's own bulk transfer between two processes, with the connections that nodes have.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bulk {
    /// One sends, one receives.
    pub one_way_mb_per_s: f64,
    /// Both do both: bytes of both ways together.
    pub both_ways_mb_per_s: f64,
    /// Of both processes, for each GB that was moved, both ways at once.
    pub cpu_s_per_gb: f64,
}

/// Measures [`Memcpy`].
pub(super) fn memcpy(repeats: u32) -> Memcpy {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    Memcpy { one_thread_gb_per_s: copy(1, repeats), all_threads_gb_per_s: copy(threads, repeats) }
}

fn copy(threads: usize, repeats: u32) -> f64 {
    let mut buffers: Vec<_> = (0..threads).map(|_| (vec![1u8; COPIED], vec![0u8; COPIED])).collect();
    let rate = |_| {
        let (span, ()) = Span::of(|| {
            thread::scope(|scope| {
                for (from, to) in &mut buffers {
                    scope.spawn(|| black_box(to).copy_from_slice(black_box(from)));
                }
            });
        });
        (threads * COPIED) as f64 / span.seconds() / 1e9
    };
    median((0..repeats).map(rate))
}

/// First line that a bulk worker is told.
#[derive(Serialize, Deserialize)]
enum Meet {
    Accept,
    Connect(String),
}

/// Every later one: whether to send, to receive, or both, and how much.
#[derive(Serialize, Deserialize)]
struct Move {
    sends: bool,
    receives: bool,
    chunks: u64,
}

/// Measures [`Bulk`] with so many MB each way.
pub(super) fn bulk(program: &Path, trust: &Trust, megabytes: u64, repeats: u32) -> Result<Bulk, BenchError> {
    let mut pair = [
        Worker::start(program, WorkerKind::Bulk, trust, 0, &[])?,
        Worker::start(program, WorkerKind::Bulk, trust, 1, &[])?,
    ];
    let address = pair[0].address.clone();
    let meet = |i| if i == 0 { Meet::Accept } else { Meet::Connect(address.clone()) };
    tell_all::<(), _>(&mut pair, meet)?;
    let chunks = megabytes * 1_000_000 / CHUNK as u64 + 1;
    let mut run = |both: bool| -> Result<Span, BenchError> {
        let work = |i| Move { sends: both || i == 0, receives: both || i == 1, chunks };
        tell_all(&mut pair, work).map(|spans: Vec<Span>| Span::together(&spans))
    };
    run(true)?;
    let megabytes = chunks as f64 * CHUNK as f64 / 1e6;
    let (mut one_way, mut both_ways, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..repeats {
        one_way.push(megabytes / run(false)?.seconds());
        let both = run(true)?;
        both_ways.push(2.0 * megabytes / both.seconds());
        cpu.push(both.cpu_s / (2.0 * megabytes / 1e3));
    }
    Ok(Bulk {
        one_way_mb_per_s: median(one_way),
        both_ways_mb_per_s: median(both_ways),
        cpu_s_per_gb: median(cpu),
    })
}

/// A bulk worker's side.
pub(super) fn serve_bulk(
    parent: &mut Parent,
    endpoint: Endpoint,
    runtime: &Runtime,
) -> Result<(), BenchError> {
    let Some(meet) = parent.hear()? else { return Ok(()) };
    let connection = runtime.block_on(async {
        match meet {
            Meet::Accept => endpoint.accept().await.ok_or_else(|| parent.failed("its endpoint is closed")),
            Meet::Connect(address) => Ok(endpoint.connect(&address, Role::Node, CONNECT).await?),
        }
    })?;
    parent.tell(&())?;
    let chunk = Bytes::from(vec![7; CHUNK]);
    while let Some(work) = parent.hear()? {
        let (span, moved) = Span::of(|| runtime.block_on(move_bulk(&connection, &chunk, &work)));
        moved?;
        parent.tell(&span)?;
    }
    Ok(())
}

async fn move_bulk(connection: &Connection, chunk: &Bytes, work: &Move) -> Result<(), BenchError> {
    let sending = async {
        match work.sends {
            true => send_bulk(connection, chunk.clone(), work.chunks).await,
            false => Ok(()),
        }
    };
    let receiving = async {
        match work.receives {
            true => receive_bulk(connection).await.map(Some),
            false => Ok(None),
        }
    };
    let (_, received) = tokio::try_join!(sending, receiving)?;
    match received.is_none_or(|got| got == work.chunks * CHUNK as u64) {
        true => Ok(()),
        false => Err(BenchError::worker("bulk", format!("{received:?} bytes came of a bulk transfer"))),
    }
}
