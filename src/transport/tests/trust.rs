//! Identities that are replaced, revoked, and of two CAs, over connections that stay.

use super::*;

fn issue(ca: &ClusterCa, role: Role, name: &str, issued_at: u64) -> Identity {
    ca.issue_for(role, name, Validity::lasting(issued_at, CERTIFICATE_LIFE)).unwrap()
}

fn quic(identity: Identity) -> Endpoint {
    Endpoint::quic(loopback(), identity, ALPN).unwrap()
}

/// That both ends find one another in both directions.
async fn meet(a: &Endpoint, b: &Endpoint) {
    let (near, far) = connect(a, b, Role::Node).await;
    stream(&near, &far).await;
    let (near, far) = connect(b, a, Role::Node).await;
    stream(&near, &far).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_identity_is_shown_from_the_next_handshake_and_connections_stay() {
    let world = World::new(Twin::Quic);
    let (then, now) = (unix_now() - 1_000, unix_now());
    let server = quic(issue(&world.ca, Role::Coordinator, "main", then));
    let client = quic(issue(&world.ca, Role::Node, "a", then));
    let (near, far) = connect(&client, &server, Role::Coordinator).await;
    let (mut here, mut there) = stream(&near, &far).await;
    client.present(issue(&world.ca, Role::Node, "a", now)).unwrap();
    server.present(issue(&world.ca, Role::Coordinator, "main", now)).unwrap();
    here.send.send_frame(b"as before").await.unwrap();
    assert_eq!(there.recv.recv_frame(100).await.unwrap().unwrap(), b"as before");
    let issued = |connection: &Connection| connection.proof().unwrap().validity.issued_at;
    assert_eq!((issued(&near), issued(&far)), (then, then));
    let (near, far) = connect(&client, &server, Role::Coordinator).await;
    assert_eq!((issued(&near), issued(&far)), (now, now));
    assert_eq!(hex::encode(far.proof().unwrap().ca.unwrap()), world.ca.fingerprint());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_revoked_is_told_so_and_a_later_certificate_is_taken() {
    let world = World::new(Twin::Quic);
    let now = unix_now();
    let server = quic(issue(&world.ca, Role::Coordinator, "main", now));
    let client = quic(issue(&world.ca, Role::Node, "a", now - 10));
    let (near, far) = connect(&client, &server, Role::Coordinator).await;
    let revocation = Revocation { role: Role::Node, name: "a".into(), upto: now - 5 };
    server.refuse(vec![revocation.clone()]);
    // One that was decided before, and comes later, takes nothing back.
    let earlier = Revocation { upto: now - 20, ..revocation.clone() };
    server.refuse(vec![earlier, Revocation { role: Role::Client, name: "c".into(), upto: now }]);
    assert!(revocation.concerns(far.peer(), far.proof().unwrap()));
    far.shut_out(&revocation.to_string());
    let error = near.closed().await;
    assert!(
        matches!(&error, TransportError::ShutOut { reason } if reason.contains("node a was revoked")),
        "{error}"
    );

    let error = client.connect(&server.local_address(), Role::Coordinator, PATIENCE).await.unwrap_err();
    assert!(error.to_string().contains("node a was revoked"), "{error}");
    assert!(!error.is_retryable());
    // Others of the same name in another role, and of another name, are none of it.
    for (role, name) in [(Role::Gateway, "a"), (Role::Node, "b")] {
        connect(&quic(issue(&world.ca, role, name, now - 10)), &server, Role::Coordinator).await;
    }
    client.present(issue(&world.ca, Role::Node, "a", now - 4)).unwrap();
    connect(&client, &server, Role::Coordinator).await;
    // Nor is one asked: it may be the server that is revoked.
    let asker = quic(issue(&world.ca, Role::Node, "c", now));
    asker.refuse(vec![Revocation { role: Role::Node, name: "a".into(), upto: now }]);
    let error = asker.connect(&client.local_address(), Role::Node, PATIENCE).await.unwrap_err();
    assert!(matches!(error, TransportError::ShutOut { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn through_a_change_of_the_ca_everyone_trusts_everyone() {
    let directory = tempfile::tempdir().unwrap();
    let first = ClusterCa::open_or_create(directory.path()).unwrap();
    let old = quic(first.issue(Role::Node, "old").unwrap());
    let other_old = quic(first.issue(Role::Node, "other-old").unwrap());
    let second = ClusterCa::rotate(directory.path()).unwrap();
    let renewed = quic(second.issue(Role::Node, "renewed").unwrap());
    let other_renewed = quic(second.issue(Role::Node, "other-renewed").unwrap());
    meet(&old, &other_old).await;
    meet(&renewed, &other_renewed).await;
    // Whoever knows the former CA alone trusts the new one by the former one's word.
    meet(&old, &renewed).await;
    let (near, far) = connect(&renewed, &old, Role::Node).await;
    assert_eq!(far.proof().unwrap().ca, None, "signed by none that it knows");
    assert_eq!(hex::encode(near.proof().unwrap().ca.unwrap()), first.fingerprint());

    let finished = ClusterCa::finish(directory.path()).unwrap();
    renewed.present(finished.issue(Role::Node, "renewed").unwrap()).unwrap();
    meet(&renewed, &other_renewed).await;
    let error = old.connect(&renewed.local_address(), Role::Node, PATIENCE).await.unwrap_err();
    assert!(matches!(error, TransportError::Untrusted { .. }), "{error}");
    let error = renewed.connect(&old.local_address(), Role::Node, PATIENCE).await.unwrap_err();
    assert!(matches!(error, TransportError::Untrusted { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pin_is_good_until_its_ca_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let first = ClusterCa::open_or_create(directory.path()).unwrap();
    let alpn = b"lockstep-join-test";
    let shown = |ca: &ClusterCa| ca.issue(Role::Coordinator, "coordinator").unwrap();
    let doorway = Doorway::bind(loopback(), &shown(&first), alpn).unwrap();
    let address = doorway.local_address();
    let knock = async |pin: &ClusterCa| knock(&address, &pin.fingerprint(), alpn, PATIENCE).await;
    knock(&first).await.unwrap();
    let second = ClusterCa::rotate(directory.path()).unwrap();
    doorway.present(&shown(&second)).unwrap();
    knock(&first).await.unwrap();
    knock(&second).await.unwrap();
    let finished = ClusterCa::finish(directory.path()).unwrap();
    doorway.present(&shown(&finished)).unwrap();
    knock(&second).await.unwrap();
    let error = knock(&first).await.err().expect("refused");
    assert!(error.to_string().contains("older than a change of the CA"), "{error}");
    assert!(!error.is_retryable());
}
