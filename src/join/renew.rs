//! Keeps the certificate of a process fresh for as long as it runs, over the connection that it has anyway.

use std::time::Duration;

use crate::{
    protocol::{
        CodecError, HeldCertificate, JoinReply, MAX_JOIN_MESSAGE, StreamOpen, TrustReply, decode, encode,
    },
    transport::{Admission, Applicant, Connection, Endpoint, Identity, TransportError, unix_now},
};

use super::JoinError;

/// Longest between two looks; a change of the CA reaches a process within it.
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// Looks in the life of a certificate, if that makes them more frequent.
const LOOKS: u32 = 20;

/// Shortest between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(250);

/// For one exchange with the coordinator.
const DEADLINE: Duration = Duration::from_secs(10);

/// Renews what `endpoint` shows when it is time, asking over `connection`, until that is gone. The new
/// identity goes where the old one was loaded from. Returns at once where nobody has one.
pub async fn keep_fresh(connection: Connection, endpoint: Endpoint) {
    let mut said = String::new();
    while let Some(mine) = endpoint.identity() {
        match look(&connection, &endpoint, mine.clone()).await {
            Ok(None) => said.clear(),
            Ok(Some(renewed)) => {
                let days = (renewed.validity().expires_at.saturating_sub(unix_now())) as f64 / 86_400.0;
                tracing::info!(
                    "the certificate of {} {} is renewed for {days:.1} days",
                    mine.role(),
                    mine.name()
                );
            }
            Err(JoinError::Identity(TransportError::ShutOut { .. })) => return,
            // Once for each reason: it is tried again soon, and the old one is good for a while.
            Err(error) if said != error.to_string() => {
                said = error.to_string();
                tracing::warn!("the certificate of {} {} is not renewed: {said}", mine.role(), mine.name());
            }
            Err(_) => {}
        }
        let validity = mine.validity();
        let life = Duration::from_secs(validity.expires_at.saturating_sub(validity.issued_at));
        tokio::select! {
            () = tokio::time::sleep((life / LOOKS).clamp(LOOK_PAUSE, LOOK_EVERY)) => {}
            _ = connection.closed() => return,
        }
    }
}

/// One look; the identity that came of it, if a new one did.
async fn look(
    connection: &Connection,
    endpoint: &Endpoint,
    mut mine: Identity,
) -> Result<Option<Identity>, JoinError> {
    // Whoever has the CA may have put a newer one there, and so may another process of the same identity.
    let newer = mine.home().and_then(|(directory, name)| Identity::load(directory, name).ok());
    let mut changed = None;
    if let Some(newer) = newer.filter(|newer| newer.validity().issued_at > mine.validity().issued_at) {
        endpoint.present(newer.clone()).map_err(JoinError::Identity)?;
        (mine, changed) = (newer.clone(), Some(newer));
    }
    let mut ca = [0; 32];
    hex::decode_to_slice(mine.ca_fingerprint(), &mut ca).expect("a SHA-256 has 32 bytes");
    let validity = mine.validity();
    let held = HeldCertificate { ca, issued_at: validity.issued_at, expires_at: validity.expires_at };
    let TrustReply { cas } = exchange(connection, &StreamOpen::Trust(held), |frame| {
        decode("trust reply", frame, MAX_JOIN_MESSAGE)
    })
    .await?;
    if mine.trusts(&cas) && !validity.is_due(unix_now()) {
        return Ok(changed);
    }
    let renewed = renew(connection, &mine).await?;
    if let Some((directory, name)) = renewed.home() {
        renewed.save(directory, name).map_err(JoinError::Identity)?;
    }
    endpoint.present(renewed.clone()).map_err(JoinError::Identity)?;
    Ok(Some(renewed))
}

/// A certificate of the same name and role for a new key.
async fn renew(connection: &Connection, mine: &Identity) -> Result<Identity, JoinError> {
    let applicant = Applicant::new().map_err(JoinError::Identity)?;
    let public_key = applicant.public_key().bytes().to_vec();
    let open = StreamOpen::Renew { public_key };
    match exchange(connection, &open, |frame| decode("renewal", frame, MAX_JOIN_MESSAGE)).await? {
        JoinReply::Refused { reason } => Err(JoinError::Refused(reason)),
        JoinReply::Admitted { chain, cas } => {
            mine.renewed(applicant, Admission { chain, cas }).map_err(JoinError::Identity)
        }
    }
}

/// One frame there and one back.
async fn exchange<T>(
    connection: &Connection,
    open: &StreamOpen,
    read: impl FnOnce(&[u8]) -> Result<T, CodecError>,
) -> Result<T, JoinError> {
    let no_answer = |reason: String| JoinError::NoAnswer { address: "the coordinator".into(), reason };
    let exchange = async {
        let mut stream = connection.open_stream().await?;
        stream.send.send_frame(&encode(open)).await?;
        stream.send.finish().await?;
        stream.recv.recv_frame(MAX_JOIN_MESSAGE).await
    };
    let frame = tokio::time::timeout(DEADLINE, exchange)
        .await
        .map_err(|_| no_answer(format!("silent for {DEADLINE:?}")))?
        .map_err(JoinError::Identity)?
        .ok_or_else(|| no_answer("it hung up".into()))?;
    read(&frame).map_err(|e| no_answer(e.to_string()))
}
