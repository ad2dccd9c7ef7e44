use std::time::Duration;

use crate::{
    protocol::{JOIN_ALPN, JoinReply, JoinRequest, MAX_JOIN_MESSAGE, PROTOCOL_VERSION, decode, encode},
    transport::{Admission, Applicant, Identity, knock},
};

use super::{JoinError, JoinToken};

/// For the handshake, and for the answer: the desk writes to its disk.
const DEADLINE: Duration = Duration::from_secs(10);

/// Asks the doorway at `address` for an identity called `name`.
pub async fn apply(address: &str, token: &JoinToken, name: &str) -> Result<Identity, JoinError> {
    let applicant = Applicant::new().map_err(JoinError::Identity)?;
    let request = JoinRequest {
        protocol_version: PROTOCOL_VERSION,
        token: token.id.clone(),
        secret: token.secret,
        name: name.to_owned(),
        public_key: applicant.public_key().bytes().to_vec(),
    };
    let doorway = |source| JoinError::Doorway { address: address.to_owned(), source };
    let mut stream = knock(address, &token.ca, JOIN_ALPN, DEADLINE).await.map_err(doorway)?;
    let no_answer = |reason: String| JoinError::NoAnswer { address: address.to_owned(), reason };
    let exchange = async {
        stream.send.send_frame(&encode(&request)).await.map_err(doorway)?;
        stream.recv.recv_frame(MAX_JOIN_MESSAGE).await.map_err(doorway)
    };
    let frame = tokio::time::timeout(DEADLINE, exchange)
        .await
        .map_err(|_| no_answer(format!("silent for {DEADLINE:?}")))??
        .ok_or_else(|| no_answer("it hung up".into()))?;
    match decode("join reply", &frame, MAX_JOIN_MESSAGE).map_err(|e| no_answer(e.to_string()))? {
        JoinReply::Refused { reason } => Err(JoinError::Refused(reason)),
        JoinReply::Admitted { chain, cas } => {
            applicant.admitted(Admission { chain, cas }, &token.ca).map_err(JoinError::Identity)
        }
    }
}
