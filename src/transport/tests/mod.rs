//! One body a claim, run over both twins.

use std::{net::SocketAddr, time::Duration};

use super::*;

mod one_twin;
mod trust;

const ALPN: &[u8] = b"lockstep-test/1";

/// For what must happen: long enough for a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy)]
enum Twin {
    Quic,
    Memory,
}

/// A cluster of one kind.
struct World {
    twin: Twin,
    network: MemoryNetwork,
    ca: ClusterCa,
    _directory: tempfile::TempDir,
}

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

impl World {
    fn new(twin: Twin) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ca = ClusterCa::open_or_create(directory.path()).unwrap();
        Self { twin, network: MemoryNetwork::default(), ca, _directory: directory }
    }

    fn endpoint(&self, role: Role, name: &str) -> Endpoint {
        match self.twin {
            Twin::Quic => Endpoint::quic(loopback(), self.ca.issue(role, name).unwrap(), ALPN).unwrap(),
            Twin::Memory => Endpoint::memory(&self.network, role, name).unwrap(),
        }
    }

    /// A coordinator, a node, and the two ends of a connection between them.
    async fn pair(&self) -> (Endpoint, Endpoint, Connection, Connection) {
        let server = self.endpoint(Role::Coordinator, "main");
        let client = self.endpoint(Role::Node, "a");
        let (near, far) = connect(&client, &server, Role::Coordinator).await;
        (server, client, near, far)
    }
}

async fn connect(client: &Endpoint, server: &Endpoint, role: Role) -> (Connection, Connection) {
    let address = server.local_address();
    let (near, far) = tokio::join!(client.connect(&address, role, PATIENCE), server.accept());
    (near.unwrap(), far.unwrap())
}

/// Opens a stream whose other end exists: the first frame says so.
async fn stream(near: &Connection, far: &Connection) -> (Stream, Stream) {
    let mut here = near.open_stream().await.unwrap();
    here.send.send_frame(b"open").await.unwrap();
    let mut there = far.accept_stream().await.unwrap();
    assert_eq!(there.recv.recv_frame(4).await.unwrap().unwrap(), b"open");
    (here, there)
}

macro_rules! over_both_twins {
    ($($name:ident),* $(,)?) => {
        mod quic_twin {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                tokio::time::timeout(PATIENCE, super::$name(World::new(Twin::Quic))).await.expect("it hangs");
            })*
        }
        mod memory_twin {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                tokio::time::timeout(PATIENCE, super::$name(World::new(Twin::Memory))).await.expect("it hangs");
            })*
        }
    };
}

over_both_twins!(
    each_end_knows_the_other,
    frames_travel_both_ways_and_end,
    eight_mebibytes_arrive_whole,
    raw_bytes_arrive_in_chunks,
    a_frame_over_the_limit_is_refused,
    a_forged_size_ends_as_truncated,
    a_cut_frame_is_truncated,
    one_direction_ends_and_the_other_goes_on,
    a_dropped_sender_is_a_reset,
    a_dropped_receiver_stops_the_sender,
    a_cancelled_receive_loses_nothing,
    a_finished_half_takes_no_more,
    many_streams_at_once,
    a_close_says_why,
    dropping_the_last_handle_closes,
    what_was_finished_outlives_the_close,
    nobody_there_ends_at_the_deadline,
    a_late_server_is_found,
    another_role_is_not_trusted,
    a_taken_address_is_named,
    a_closed_endpoint_closes_its_connections,
    an_address_of_another_kind_is_refused,
);

async fn each_end_knows_the_other(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    assert_eq!(near.peer(), &Peer { role: Role::Coordinator, name: "main".into() });
    assert_eq!(far.peer(), &Peer { role: Role::Node, name: "a".into() });
}

async fn frames_travel_both_ways_and_end(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (mut here, mut there) = stream(&near, &far).await;
    let frames = [vec![], vec![7], vec![1; 20 << 10], vec![2; 300 << 10]];
    for frame in &frames {
        here.send.send_frame(frame).await.unwrap();
        there.send.send_frame(frame).await.unwrap();
        assert_eq!(&there.recv.recv_frame(1 << 20).await.unwrap().unwrap(), frame);
        assert_eq!(&here.recv.recv_frame(1 << 20).await.unwrap().unwrap(), frame);
    }
    let (finished, end) = tokio::join!(here.send.finish(), there.recv.recv_frame(1));
    finished.unwrap();
    assert_eq!(end.unwrap(), None);
    assert_eq!(there.recv.recv_frame(1).await.unwrap(), None, "the end stays the end");
}

async fn eight_mebibytes_arrive_whole(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (mut here, mut there) = stream(&near, &far).await;
    let blob: Vec<u8> = (0..8u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let expected = blob.clone();
    let sender = tokio::spawn(async move {
        here.send.send_bytes(&blob).await.unwrap();
        here.send.send_frame(&blob).await.unwrap();
        here.send.finish().await.unwrap();
        here
    });
    assert!(there.recv.recv_bytes(8 << 20).await.unwrap() == expected);
    assert!(there.recv.recv_frame(8 << 20).await.unwrap().unwrap() == expected);
    assert_eq!(there.recv.recv_frame(0).await.unwrap(), None);
    sender.await.unwrap();
}

async fn raw_bytes_arrive_in_chunks(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (mut here, mut there) = stream(&near, &far).await;
    here.send.send_bytes(&[5; 100_000]).await.unwrap();
    let finisher = tokio::spawn(async move { here.send.finish().await });
    let mut got = Vec::new();
    while let Some(chunk) = there.recv.recv_chunk(1000).await.unwrap() {
        assert!((1..=1000).contains(&chunk.len()));
        got.extend_from_slice(&chunk);
    }
    assert_eq!(got, [5; 100_000]);
    finisher.await.unwrap().unwrap();
}

async fn a_frame_over_the_limit_is_refused(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (mut here, mut there) = stream(&near, &far).await;
    // The size alone, of a frame that never comes: refused before anything is allocated for it.
    here.send.send_bytes(&u32::MAX.to_le_bytes()).await.unwrap();
    for _ in 0..2 {
        match there.recv.recv_frame(1000).await {
            Err(TransportError::FrameTooLarge { size, limit: 1000 }) => assert_eq!(size, u32::MAX as usize),
            other => panic!("{other:?}"),
        }
    }
}

async fn a_forged_size_ends_as_truncated(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (mut here, mut there) = stream(&near, &far).await;
    here.send.send_bytes(b"abc").await.unwrap();
    here.send.finish().await.unwrap();
    match there.recv.recv_bytes(1 << 40).await {
        Err(TransportError::Truncated { got: 3, expected }) => assert_eq!(expected, 1 << 40),
        other => panic!("{other:?}"),
    }
}

async fn a_cut_frame_is_truncated(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    for (bytes, expected) in [(&[10, 0, 0, 0, 1, 2, 3][..], (3, 10)), (&[10, 0], (2, 4))] {
        let (mut here, mut there) = stream(&near, &far).await;
        here.send.send_bytes(bytes).await.unwrap();
        here.send.finish().await.unwrap();
        match there.recv.recv_frame(100).await {
            Err(TransportError::Truncated { got, expected: whole }) => assert_eq!((got, whole), expected),
            other => panic!("{other:?}"),
        }
    }
}

async fn one_direction_ends_and_the_other_goes_on(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (mut here, mut there) = stream(&near, &far).await;
    here.send.finish().await.unwrap();
    assert_eq!(there.recv.recv_frame(10).await.unwrap(), None);
    drop((here.send, there.recv));
    there.send.send_frame(b"answer").await.unwrap();
    assert_eq!(here.recv.recv_frame(10).await.unwrap().unwrap(), b"answer");
}

async fn a_dropped_sender_is_a_reset(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (mut here, mut there) = stream(&near, &far).await;
    here.send.send_bytes(&[100, 0, 0, 0, 1]).await.unwrap();
    drop(here.send);
    let error = there.recv.recv_frame(100).await.unwrap_err();
    assert!(matches!(error, TransportError::Reset { code: 0 }), "{error}");
    assert!(error.is_retryable());
    let (here_too, mut there_too) = stream(&near, &far).await;
    here_too.send.reset(77);
    let error = there_too.recv.recv_frame(100).await.unwrap_err();
    assert!(matches!(error, TransportError::Reset { code: 77 }), "{error}");
    // The other direction is as it was.
    there.send.send_frame(b"still").await.unwrap();
    assert_eq!(here.recv.recv_frame(10).await.unwrap().unwrap(), b"still");
}

async fn a_dropped_receiver_stops_the_sender(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (mut here, mut there) = stream(&near, &far).await;
    drop(there.recv);
    let error = loop {
        match here.send.send_bytes(&[0; 1000]).await {
            Ok(()) => tokio::task::yield_now().await,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, TransportError::Stopped), "{error}");
    there.send.send_frame(b"refused").await.unwrap();
    assert_eq!(here.recv.recv_frame(10).await.unwrap().unwrap(), b"refused");

    // Nobody reads the end: finishing is no error.
    let (mut here, there) = stream(&near, &far).await;
    drop(there.recv);
    here.send.finish().await.unwrap();
}

async fn a_cancelled_receive_loses_nothing(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (mut here, mut there) = stream(&near, &far).await;
    let frame: Vec<u8> = (0..200).collect();
    let mut bytes = 200u32.to_le_bytes().to_vec();
    bytes.extend_from_slice(&frame);
    for piece in bytes.chunks(51) {
        here.send.send_bytes(piece).await.unwrap();
        if piece.len() == 51 {
            let early = tokio::time::timeout(Duration::from_millis(10), there.recv.recv_frame(200)).await;
            // Only the last piece (of four) completes it.
            if let Ok(whole) = early {
                assert_eq!(whole.unwrap().unwrap(), frame);
                return;
            }
        }
    }
    assert_eq!(there.recv.recv_frame(200).await.unwrap().unwrap(), frame);
}

async fn a_finished_half_takes_no_more(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (mut here, _there) = stream(&near, &far).await;
    here.send.finish().await.unwrap();
    for error in [here.send.send_frame(b"more").await, here.send.finish().await] {
        assert!(matches!(error, Err(TransportError::NotWritable { .. })), "{error:?}");
    }
}

async fn many_streams_at_once(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let echo = tokio::spawn(async move {
        for _ in 0..500 {
            let mut stream = far.accept_stream().await.unwrap();
            tokio::spawn(async move {
                while let Some(frame) = stream.recv.recv_frame(1 << 20).await.unwrap() {
                    stream.send.send_frame(&frame).await.unwrap();
                }
                stream.send.finish().await.unwrap();
            });
        }
        far
    });
    let callers = (0..500u32).map(|i| {
        let near = near.clone();
        tokio::spawn(async move {
            let mut stream = near.open_stream().await.unwrap();
            let frame = i.to_le_bytes().repeat(100);
            for _ in 0..3 {
                stream.send.send_frame(&frame).await.unwrap();
                assert_eq!(stream.recv.recv_frame(1000).await.unwrap().unwrap(), frame);
            }
            stream.send.finish().await.unwrap();
            assert_eq!(stream.recv.recv_frame(1000).await.unwrap(), None);
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        caller.await.unwrap();
    }
    echo.await.unwrap();
}

async fn a_close_says_why(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (here, mut there) = stream(&near, &far).await;
    let long = format!("replaced by a newer node {}", "é".repeat(1000));
    near.close(&long);
    let TransportError::ClosedByPeer { reason } = far.closed().await else { panic!() };
    assert!(reason.starts_with("replaced by a newer node é") && reason.len() <= MAX_CLOSE_REASON);
    assert!(matches!(near.closed().await, TransportError::ClosedLocally));
    assert!(matches!(near.open_stream().await, Err(TransportError::ClosedLocally)));
    assert!(matches!(far.open_stream().await, Err(TransportError::ClosedByPeer { .. })));
    assert!(matches!(far.accept_stream().await, Err(TransportError::ClosedByPeer { .. })));
    assert!(matches!(there.recv.recv_frame(1).await, Err(TransportError::ClosedByPeer { .. })));
    assert!(matches!(there.send.send_frame(b"x").await, Err(TransportError::ClosedByPeer { .. })));
    drop(here);
}

async fn dropping_the_last_handle_closes(world: World) {
    let (_server, _client, near, far) = world.pair().await;
    let (mut here, mut there) = stream(&near, &far).await;
    drop(near);
    // A stream keeps its connection.
    here.send.send_frame(b"alive").await.unwrap();
    assert_eq!(there.recv.recv_frame(10).await.unwrap().unwrap(), b"alive");
    drop(here);
    assert!(matches!(far.closed().await, TransportError::ClosedByPeer { .. }));
}

async fn what_was_finished_outlives_the_close(world: World) {
    let (server, client, near, far) = world.pair().await;
    let mut here = near.open_stream().await.unwrap();
    here.send.send_bytes(&[9; 1 << 20]).await.unwrap();
    here.send.finish().await.unwrap();
    near.close("done");
    client.close().await;
    drop((here, near, client));
    assert!(matches!(far.closed().await, TransportError::ClosedByPeer { .. }));
    let mut there = far.accept_stream().await.unwrap();
    assert_eq!(there.recv.recv_bytes(1 << 20).await.unwrap(), [9; 1 << 20]);
    assert_eq!(there.recv.recv_frame(0).await.unwrap(), None);
    match far.accept_stream().await.err() {
        Some(TransportError::ClosedByPeer { reason }) => assert_eq!(reason, "done"),
        other => panic!("{other:?}"),
    }
    drop(server);
}

/// An address at which nobody is.
fn vacant(twin: Twin) -> String {
    match twin {
        Twin::Quic => std::net::UdpSocket::bind(loopback()).unwrap().local_addr().unwrap().to_string(),
        Twin::Memory => "memory:nobody".into(),
    }
}

async fn nobody_there_ends_at_the_deadline(world: World) {
    let client = world.endpoint(Role::Node, "a");
    let address = vacant(world.twin);
    let error = client.connect(&address, Role::Coordinator, Duration::from_millis(200)).await.unwrap_err();
    assert!(matches!(error, TransportError::ConnectTimeout { .. }) && error.is_retryable(), "{error}");
    assert!(error.to_string().contains(&address), "{error}");
}

async fn a_late_server_is_found(world: World) {
    let client = world.endpoint(Role::Node, "a");
    let address = vacant(world.twin);
    let connecting = {
        let address = address.clone();
        tokio::spawn(async move {
            client.connect(&address, Role::Coordinator, PATIENCE).await.map(|c| (c, client))
        })
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!connecting.is_finished());
    let server = match world.twin {
        Twin::Quic => {
            let identity = world.ca.issue(Role::Coordinator, "main").unwrap();
            Endpoint::quic(address.parse().unwrap(), identity, ALPN).unwrap()
        }
        Twin::Memory => world.endpoint(Role::Coordinator, "nobody"),
    };
    let (accepted, connected) = tokio::join!(server.accept(), connecting);
    connected.unwrap().unwrap();
    assert_eq!(accepted.unwrap().peer().name, "a");
}

async fn another_role_is_not_trusted(world: World) {
    let node = world.endpoint(Role::Node, "b");
    let client = world.endpoint(Role::Node, "a");
    let error = client.connect(&node.local_address(), Role::Coordinator, PATIENCE).await.unwrap_err();
    assert!(matches!(error, TransportError::Untrusted { .. }) && !error.is_retryable(), "{error}");
    assert!(error.to_string().contains("coordinator"), "{error}");
    connect(&client, &node, Role::Node).await;
}

async fn a_taken_address_is_named(world: World) {
    let first = world.endpoint(Role::Coordinator, "main");
    let address = first.local_address();
    let second = || match world.twin {
        Twin::Quic => {
            let identity = world.ca.issue(Role::Coordinator, "main").unwrap();
            Endpoint::quic(address.parse().unwrap(), identity, ALPN)
        }
        Twin::Memory => Endpoint::memory(&world.network, Role::Coordinator, "main"),
    };
    let error = second().unwrap_err();
    assert!(matches!(error, TransportError::AddressInUse { .. }), "{error}");
    assert!(error.to_string().contains(&address), "{error}");
    // A successor can have it.
    first.close().await;
    drop(first);
    while let Err(error) = second() {
        assert!(matches!(error, TransportError::AddressInUse { .. }), "{error}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn a_closed_endpoint_closes_its_connections(world: World) {
    let (server, client, near, far) = world.pair().await;
    server.close().await;
    assert!(server.accept().await.is_none());
    match near.closed().await {
        TransportError::ClosedByPeer { reason } => assert_eq!(reason, "shutting down"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(far.closed().await, TransportError::ClosedLocally));
    let error = server.connect("127.0.0.1:9", Role::Node, PATIENCE).await.unwrap_err();
    assert!(!error.is_retryable(), "{error}");
    drop(client);
}

async fn an_address_of_another_kind_is_refused(world: World) {
    let client = world.endpoint(Role::Node, "a");
    let wrong = match world.twin {
        Twin::Quic => &["memory:main", "127.0.0.1", "127.0.0.1:0", ":1", ""][..],
        Twin::Memory => &["127.0.0.1:9000", ""],
    };
    for address in wrong {
        let error = client.connect(address, Role::Coordinator, PATIENCE).await.unwrap_err();
        assert!(matches!(error, TransportError::InvalidAddress { .. }), "{address}: {error}");
    }
}
