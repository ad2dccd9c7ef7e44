//! Lets strangers in at the coordinator's doorway.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{
    protocol::{JoinReply, JoinRequest, MAX_JOIN_MESSAGE, PROTOCOL_VERSION, decode, encode},
    transport::{Doorway, PublicKey, Stream},
};

use super::{Authority, JoinError, Ledger};

/// For a stranger's request, and for taking our answer.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(10);

/// Hands out identities of one cluster.
pub struct Desk {
    authority: Arc<Authority>,
    ledger: Ledger,
}

impl Desk {
    /// The desk of a data directory, whose authority this is.
    pub fn open(data_dir: &Path, authority: Arc<Authority>) -> Result<Self, JoinError> {
        Ok(Self { authority, ledger: Ledger::open(data_dir)? })
    }

    /// Serves strangers until the doorway is closed. Each has a task of its own.
    pub async fn serve(self, doorway: Arc<Doorway>) {
        let desk = Arc::new(self);
        while let Some((stream, from)) = doorway.accept().await {
            let desk = desk.clone();
            tokio::spawn(async move {
                match tokio::time::timeout(2 * MESSAGE_DEADLINE, desk.answer(stream, from)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(reason)) => tracing::warn!(%from, "a stranger left: {reason}"),
                    Err(_) => tracing::warn!(%from, "a stranger was too slow"),
                }
            });
        }
    }

    async fn answer(self: Arc<Self>, mut stream: Stream, from: SocketAddr) -> Result<(), String> {
        let frame = tokio::time::timeout(MESSAGE_DEADLINE, stream.recv.recv_frame(MAX_JOIN_MESSAGE))
            .await
            .map_err(|_| "it asked for nothing".to_owned())?
            .map_err(|e| e.to_string())?
            .ok_or("it asked for nothing")?;
        let request: JoinRequest =
            decode("join request", &frame, MAX_JOIN_MESSAGE).map_err(|e| e.to_string())?;
        // The ledger waits for the disk.
        let reply = tokio::task::spawn_blocking(move || self.decide(&request, from))
            .await
            .map_err(|e| e.to_string())?;
        stream.send.send_frame(&encode(&reply)).await.map_err(|e| e.to_string())?;
        stream.send.finish().await.map_err(|e| e.to_string())
    }

    fn decide(&self, request: &JoinRequest, from: SocketAddr) -> JoinReply {
        match self.admit(request) {
            Ok(reply) => {
                tracing::info!(%from, token = %request.token, "let in {:?}", request.name);
                reply
            }
            Err(error) => {
                tracing::warn!(%from, "refused {request:?}: {error}");
                let reason = match error {
                    JoinError::Refused(reason) => reason,
                    // Names of our files are nobody's business.
                    JoinError::File { .. } | JoinError::Damaged { .. } => "its ledger can't be read".into(),
                    other => other.to_string(),
                };
                JoinReply::Refused { reason }
            }
        }
    }

    /// Everything that may be wrong is looked at before a use of the token is taken.
    fn admit(&self, request: &JoinRequest) -> Result<JoinReply, JoinError> {
        let refused = |reason: String| Err(JoinError::Refused(reason));
        if request.protocol_version != PROTOCOL_VERSION {
            let theirs = request.protocol_version;
            return refused(format!("it speaks protocol {PROTOCOL_VERSION}, you {theirs}"));
        }
        let Some(key) = PublicKey::from_bytes(&request.public_key) else {
            return refused("the public key is no point on P-256".into());
        };
        if let Err(error) = crate::transport::check_name(&request.name) {
            return refused(error.to_string());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(u64::MAX, |since| since.as_secs());
        let role = self.ledger.redeem(&request.token, &request.secret, &request.name, now)?;
        let admitted = self.authority.admit(role, &request.name, &key)?;
        Ok(JoinReply::Admitted { chain: admitted.chain, cas: admitted.cas })
    }
}
