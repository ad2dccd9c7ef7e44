//! Streams that the coordinator opens towards a node: one sample request each.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use actix::Addr;
use tokio::sync::oneshot;

use crate::{
    protocol::{Generate, GenerateReply, MAX_MESSAGE, StreamOpen, decode, encode},
    transport::{Connection, Stream},
    types::{ErrorKind, OperationError},
};

use super::{
    actor::{NodeActor, Notice, Sample},
    state::{Event, Ticket},
};

/// How long a request may take to arrive on its stream, or an answer to be taken.
const FRAME_DEADLINE: Duration = Duration::from_secs(30);

/// Hands out tickets, over all connections of a node's life.
#[derive(Clone, Default)]
pub(super) struct Tickets(Arc<AtomicU64>);

/// Takes the coordinator's streams until the connection is gone.
pub(super) async fn accept(connection: Connection, node: Addr<NodeActor>, tickets: Tickets) {
    while let Ok(stream) = connection.accept_stream().await {
        let ticket = Ticket(tickets.0.fetch_add(1, Ordering::Relaxed));
        // As many tasks as the transport admits streams; the state bounds what reaches replicas.
        tokio::spawn(serve(stream, node.clone(), ticket));
    }
}

async fn serve(mut stream: Stream, node: Addr<NodeActor>, ticket: Ticket) {
    let generate = match tokio::time::timeout(FRAME_DEADLINE, open(&mut stream)).await {
        Ok(Ok(generate)) => generate,
        Ok(Err(reason)) => return tracing::warn!(%reason, "a stream of the coordinator is no request"),
        Err(_) => return tracing::warn!("the coordinator opened a stream and said nothing"),
    };
    let (reply, answer) = oneshot::channel();
    // Without an answer the replica is gone or never got it: the request may be tried elsewhere.
    let unanswered = || {
        let problem = "the replica went away before it answered";
        GenerateReply::Failed(OperationError::new(ErrorKind::Unavailable, problem))
    };
    if node.send(Sample { ticket, generate, reply }).await.is_err() {
        return;
    }
    let answer = tokio::select! {
        answer = answer => Some(answer.unwrap_or_else(|_| unanswered())),
        // Dropping the receiver cancels the request.
        () = reset(&mut stream) => None,
    };
    if let Some(answer) = answer {
        let sent = tokio::time::timeout(FRAME_DEADLINE, async {
            stream.send.send_frame(&encode(&answer)).await?;
            stream.send.finish().await
        });
        // A coordinator that went away meanwhile asks again or not at all.
        let _ = sent.await;
    }
    // Last, so that a node that stops does not close the connection over an answer.
    let _ = node.send(Notice(Event::RequestDone { ticket })).await;
}

async fn open(stream: &mut Stream) -> Result<Generate, String> {
    let frame = stream.recv.recv_frame(MAX_MESSAGE).await.map_err(|e| e.to_string())?;
    let frame = frame.ok_or("it is empty")?;
    match decode("opening of a stream", &frame, MAX_MESSAGE).map_err(|e| e.to_string())? {
        StreamOpen::Generate(generate) => Ok(generate),
        other => Err(format!("it opens with {other:?}")),
    }
}

/// Returns when the coordinator gives the stream up; never, if it merely has nothing to add.
async fn reset(stream: &mut Stream) {
    if let Ok(None) = stream.recv.recv_frame(MAX_MESSAGE).await {
        std::future::pending().await
    }
}
