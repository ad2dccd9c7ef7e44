//! Certificates that are known, revoked and replaced by those of another CA.

use std::collections::BTreeMap;

use crate::{
    coordinator::state::{Effect, Event},
    journal::{KnownCertificate, Record, Recovered},
    protocol::{ClientRequest, ClientResponse, ClusterStatus, CoordinatorMessage, NodeId, TrustStatus},
    transport::{Revocation, Role},
    types::{Digest, ErrorKind},
};

use super::desk::{Desk, disk_full, nothing, optim_step};

/// The time on the desk, in seconds.
const NOW_S: u64 = 1_000;

fn known(role: Role, name: &str, ca: &str, issued_at: u64) -> KnownCertificate {
    let ca = Digest::of(ca.as_bytes());
    KnownCertificate { role, name: name.into(), ca, issued_at, expires_at: NOW_S + 10_000 }
}

fn certify(desk: &mut Desk, role: Role, name: &str, ca: &str, issued_at: u64) {
    desk.feed(Event::Certified(known(role, name, ca, issued_at)));
}

fn ca(desk: &mut Desk, ca: &str, rotating: bool) {
    desk.feed(Event::Ca { ca: Digest::of(ca.as_bytes()), rotating });
}

fn trust(desk: &mut Desk) -> TrustStatus {
    match desk.asked(ClientRequest::ClusterStatus) {
        ClientResponse::Cluster(status) => status.trust,
        other => panic!("no status: {other:?}"),
    }
}

fn revoke(role: Option<&str>, name: &str) -> ClientRequest {
    ClientRequest::Revoke { role: role.map(str::to_owned), name: name.into() }
}

/// Revokes, and says what is answered, once the certificates are refused and not before.
fn revoked(desk: &mut Desk, role: Option<&str>, name: &str) -> ClusterStatus {
    let asking = desk.ask(revoke(role, name));
    assert!(desk.answer(asking).is_none(), "answered before anybody is refused");
    let Some(Effect::Revoked { revocations, waiter }) = desk.others.pop() else {
        panic!("nobody is refused")
    };
    assert_eq!(revocations, desk.state.revocations());
    desk.feed(Event::ShutOut { waiter });
    match desk.answer(asking) {
        Some(ClientResponse::Cluster(status)) => status.clone(),
        other => panic!("not revoked: {other:?}"),
    }
}

fn finishes(desk: &Desk) -> usize {
    desk.others.iter().filter(|effect| **effect == Effect::FinishRotation).count()
}

#[test]
fn a_revoked_node_loses_its_ranks_and_everyone_is_told() {
    let mut desk = Desk::with_run(&[(1, 0), (1, 0)], None);
    desk.pass(5_000);
    certify(&mut desk, Role::Node, "node2", "first", 1);
    desk.sent.clear();
    let now_s = desk.now_ms / 1_000;
    let status = revoked(&mut desk, None, "node2");
    assert_eq!(status.nodes.len(), 1);
    assert_eq!(status.trust.revoked, ["node node2"]);
    let (role, name) = (Role::Node, "node2".to_owned());
    let durable = Record::Revoked { role, name: name.clone(), upto: now_s };
    assert!(desk.records.contains(&durable));
    let revocations = vec![Revocation { role, name, upto: now_s }];
    assert_eq!(desk.state.revocations(), revocations);
    let told = CoordinatorMessage::Revoked { nodes: vec![("node2".into(), now_s)] };
    assert!(desk.sent.contains(&(NodeId(1), told.clone())));
    assert!(desk.sent.iter().all(|(node, _)| *node == NodeId(1)), "it is told nothing more");
    let waiter = desk.run(1, optim_step());
    desk.pass(5_000);
    desk.done(waiter);
    // Whoever joins later must know it, too.
    desk.join(3, 1, 0);
    assert!(desk.sent.contains(&(NodeId(3), told)));
    // What it still shows of the old one is no news; a later one is.
    certify(&mut desk, Role::Node, "node2", "first", now_s);
    assert_eq!(desk.refused(revoke(None, "node2")).kind, ErrorKind::InvalidInput);
    certify(&mut desk, Role::Node, "node2", "first", now_s + 1);
    revoked(&mut desk, None, "node2");
}

#[test]
fn a_revocation_that_is_not_durable_is_none() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    certify(&mut desk, Role::Node, "node1", "first", 1);
    desk.durable = false;
    let waiter = desk.ask(revoke(None, "node1"));
    desk.wrote(Err(disk_full()));
    assert!(
        matches!(desk.answer(waiter), Some(ClientResponse::Error(e)) if e.kind == ErrorKind::ResourceExhausted)
    );
    desk.durable = true;
    assert!(trust(&mut desk).revoked.is_empty());
    assert!(desk.state.revocations().is_empty());
}

#[test]
fn whom_a_name_means_is_said_where_it_is_not_clear() {
    let mut desk = Desk::new();
    let unknown = desk.refused(revoke(None, "a"));
    assert!(unknown.message.contains("\"a\"") && unknown.message.contains("role"), "{unknown}");
    certify(&mut desk, Role::Client, "a", "first", 1);
    certify(&mut desk, Role::Node, "a", "first", 1);
    let both = desk.refused(revoke(None, "a"));
    assert!(both.message.contains("node and a client"), "{both}");
    revoked(&mut desk, Some("client"), "a");
    assert_eq!(trust(&mut desk).revoked, ["client a"]);
    // One that was never seen can be revoked by its role; a coordinator can't.
    revoked(&mut desk, Some("gateway"), "b");
    for role in ["coordinator", "king"] {
        assert_eq!(desk.refused(revoke(Some(role), "a")).kind, ErrorKind::InvalidInput);
    }
    assert!(desk.refused(revoke(Some("node"), "A b")).message.contains("process name"));
}

#[test]
fn what_is_revoked_stays_so_over_a_restart() {
    let revoked = BTreeMap::from([((Role::Node, "node1".to_owned()), 77)]);
    let mut desk = Desk::recovered(Recovered { revoked, ..nothing() });
    assert_eq!(desk.state.revocations(), [Revocation { role: Role::Node, name: "node1".into(), upto: 77 }]);
    assert_eq!(trust(&mut desk).revoked, ["node node1"]);
}

#[test]
fn a_change_of_the_ca_ends_when_everyone_known_has_a_certificate_of_the_new_one() {
    let certificates = vec![known(Role::Node, "away", "first", 1), known(Role::Gateway, "g", "first", 2)];
    let mut desk = Desk::recovered(Recovered { certificates, ..nothing() });
    ca(&mut desk, "first", false);
    certify(&mut desk, Role::Client, "c", "first", 3);
    desk.pass(60_000);
    assert_eq!((trust(&mut desk).rotation, finishes(&desk)), (None, 0));

    ca(&mut desk, "second", true);
    assert_eq!(
        trust(&mut desk).rotation,
        Some(vec!["node away".into(), "gateway g".into(), "client c".into()])
    );
    certify(&mut desk, Role::Client, "c", "second", 10);
    certify(&mut desk, Role::Client, "c", "first", 3);
    certify(&mut desk, Role::Gateway, "g", "second", 11);
    desk.pass(60_000);
    assert_eq!(
        trust(&mut desk).rotation,
        Some(vec!["node away".into()]),
        "its connection may still show the old one"
    );
    assert_eq!(finishes(&desk), 0);
    certify(&mut desk, Role::Node, "away", "second", 12);
    desk.pass(1_000);
    assert_eq!(finishes(&desk), 1, "once");
    ca(&mut desk, "second", false);
    desk.pass(60_000);
    assert_eq!((trust(&mut desk).rotation, finishes(&desk)), (None, 1));
}

#[test]
fn nobody_is_waited_for_whose_certificate_is_revoked_or_over() {
    let mut desk = Desk::new();
    certify(&mut desk, Role::Node, "bad", "first", 1);
    let short = KnownCertificate { expires_at: NOW_S + 100, ..known(Role::Node, "short", "first", 1) };
    desk.feed(Event::Certified(short));
    ca(&mut desk, "second", true);
    revoked(&mut desk, None, "bad");
    desk.pass(50_000);
    assert_eq!(trust(&mut desk).rotation, Some(vec!["node short".into()]));
    desk.pass(120_000);
    assert_eq!(finishes(&desk), 1);
    let forgotten = Record::ForgetCertificate { role: Role::Node, name: "short".into() };
    assert!(desk.records.contains(&forgotten));
}

#[test]
fn a_change_of_the_ca_lasts_a_while_even_if_nobody_is_known() {
    let mut desk = Desk::new();
    ca(&mut desk, "second", true);
    desk.pass(19_000);
    assert_eq!(finishes(&desk), 0, "who was let in just before has not connected yet");
    desk.pass(2_000);
    assert_eq!(finishes(&desk), 1);
}
