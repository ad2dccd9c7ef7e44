//! The coordinator's actor: hands events to the [`State`] and performs its effects. Decides
//! nothing.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use actix::{Actor, ActorContext, Addr, AsyncContext, Context, Handler, Message, MessageResult};
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
};

use crate::{
    journal::{Journal, JournalError},
    protocol::{
        Call, ClientRequest, ClientResponse, CoordinatorMessage, Figures, Generate, GenerateReply,
        MAX_MESSAGE, NodeHello, NodeId, RequestId, StreamOpen, decode, encode,
    },
    transport::Connection,
    types::Digest,
};

use super::{
    doorkeeper::Doorkeeper,
    state::{AppendId, Effect, Event, State, TICK_MS, WaiterId},
    tally::Tally,
};

/// Messages that may wait for the actor. Senders wait for room; one takes microseconds.
const MAILBOX: usize = 1_024;

/// Appends whose end the actor has not heard of: more than the journal can have queued and
/// finished at once, so that there is always room.
const APPENDS_HEARD: usize = 16_384;

/// A request from a client; the answer goes to `reply`.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Ask {
    pub waiter: WaiterId,
    pub call: Call,
    pub request: ClientRequest,
    pub reply: oneshot::Sender<ClientResponse>,
}

/// Nobody waits for `waiter` any more.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Gone {
    pub waiter: WaiterId,
}

/// A node's control stream is open.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Join {
    pub node: NodeId,
    pub hello: NodeHello,
    pub link: Link,
}

/// An event that needs nothing but the state machine.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Happened(pub Event);

/// Asks which of these blobs, which no row names, nothing counts on.
#[derive(Message)]
#[rtype(result = "Vec<Digest>")]
pub(super) struct Unneeded(pub Vec<Digest>);

/// Asks what has been counted.
#[derive(Message)]
#[rtype(result = "Figures")]
pub(super) struct Count;

/// The way to a node.
pub(super) struct Link {
    /// Read by the control stream's writer.
    pub control: mpsc::Sender<CoordinatorMessage>,
    pub connection: Connection,
}

/// The journal takes nothing more.
#[derive(Message)]
#[rtype(result = "()")]
struct JournalEnded(JournalError);

/// How the actor ended: after a drain, or because nothing can be made durable until the journal
/// has been opened again, which is for the next process to do.
pub(super) type Stopped = Result<(), JournalError>;

/// Owns what effects are performed on.
pub(super) struct Coordinator {
    state: State,
    clock: Clock,
    entropy: Entropy,
    journal: Journal,
    /// Where the journal's thread reports.
    durable: mpsc::Sender<(AppendId, Result<(), JournalError>)>,
    links: HashMap<NodeId, Link>,
    waiters: HashMap<WaiterId, oneshot::Sender<ClientResponse>>,
    generating: HashMap<RequestId, AbortHandle>,
    tally: Tally,
    generate_deadline: Duration,
    doorkeeper: Arc<Doorkeeper>,
    /// Told at the end; dropped without a word if a handler panics.
    stopped: Option<oneshot::Sender<Stopped>>,
}

impl Coordinator {
    /// Starts the actor in the current actix system. The receiver hears how the actor stopped, and
    /// an error if it died.
    pub(super) fn launch(
        state: State,
        clock: Clock,
        journal: Journal,
        generate_deadline: Duration,
        doorkeeper: Arc<Doorkeeper>,
    ) -> (Addr<Self>, oneshot::Receiver<Stopped>) {
        let (stopped, stopping) = oneshot::channel();
        let (durable, mut heard) = mpsc::channel(APPENDS_HEARD);
        let actor = Self {
            state,
            clock,
            entropy: Entropy::default(),
            journal,
            durable,
            links: HashMap::new(),
            waiters: HashMap::new(),
            generating: HashMap::new(),
            tally: Tally::default(),
            generate_deadline,
            doorkeeper,
            stopped: Some(stopped),
        };
        let addr = actor.start();
        let to_actor = addr.clone();
        tokio::spawn(async move {
            while let Some((append, result)) = heard.recv().await {
                let told = match result {
                    Err(error) if error.ends_the_journal() => to_actor.send(JournalEnded(error)).await,
                    result => to_actor.send(Happened(Event::Appended { append, result })).await,
                };
                if told.is_err() {
                    break;
                }
            }
        });
        (addr, stopping)
    }

    /// Handles an event, and those that performing its effects leads to.
    fn feed(&mut self, event: Event, ctx: &mut Context<Self>) {
        let _span = tracing::debug_span!("decide").entered();
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            self.tally.happened(&event);
            for effect in self.state.handle(event, self.clock.now_ms()) {
                events.extend(self.perform(effect, ctx));
            }
        }
    }

    /// Performs one effect; returns what that led to at once.
    fn perform(&mut self, effect: Effect, ctx: &mut Context<Self>) -> Option<Event> {
        match effect {
            Effect::Append { append, records } => {
                let durable = self.durable.clone();
                let done = move |result| {
                    if durable.try_send((append, result)).is_err() {
                        tracing::error!(append = append.0, "the actor can't hear that an append ended");
                    }
                };
                self.journal.append(records, Box::new(done));
            }
            Effect::Send { node, message } => {
                let link = self.links.get(&node)?;
                if let Err(mpsc::error::TrySendError::Full(_)) = link.control.try_send(message) {
                    link.connection.close("control messages are not read");
                    let reason = "its control messages are not read".to_owned();
                    return Some(Event::NodeLost { node, reason });
                }
            }
            Effect::Dismiss { node, reason } => {
                if let Some(link) = self.links.remove(&node) {
                    link.connection.close(&reason);
                }
            }
            Effect::Respond { waiter, response } => {
                self.tally.answered(&response);
                if let Some(reply) = self.waiters.remove(&waiter) {
                    // Whoever asked may have left in this moment.
                    let _ = reply.send(response);
                }
            }
            Effect::Generate { node, attempt, generate } => {
                let request = generate.request;
                let connection = self.links.get(&node)?.connection.clone();
                let task = generate_on(connection, generate, attempt, self.generate_deadline, ctx.address());
                self.generating.insert(request, tokio::spawn(task).abort_handle());
            }
            Effect::CancelGenerate { request } => {
                if let Some(task) = self.generating.remove(&request) {
                    task.abort();
                }
            }
            Effect::Ended(ended) => self.tally.ended(&ended),
            Effect::Recall { waiter, run, goal } => {
                let actor = ctx.address();
                let runtime = tokio::runtime::Handle::current();
                self.journal.way_to(run, goal, move |way| {
                    // Fails only when the actor is gone, and with it whoever waits.
                    runtime.spawn(async move { actor.send(Happened(Event::Recalled { waiter, way })).await });
                });
            }
            Effect::Revoked { revocations, waiter } => {
                tokio::spawn(self.doorkeeper.clone().shut_out(revocations, waiter, ctx.address()));
            }
            Effect::FinishRotation => {
                let (doorkeeper, actor) = (self.doorkeeper.clone(), ctx.address());
                tokio::spawn(async move {
                    if let Err(error) = doorkeeper.rotate(true, &actor).await {
                        tracing::error!("the former CA is still trusted: {error}");
                    }
                });
            }
            Effect::Stop => self.stop(Ok(()), ctx),
        }
        None
    }

    fn stop(&mut self, how: Stopped, ctx: &mut Context<Self>) {
        // The writers send what is queued, the order to shut down included, and end.
        self.links.clear();
        self.waiters.clear();
        if let Some(stopped) = self.stopped.take() {
            let _ = stopped.send(how);
        }
        // Whoever still sends finds the mailbox closed.
        ctx.stop();
    }
}

impl Actor for Coordinator {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(MAILBOX);
        ctx.run_interval(Duration::from_millis(TICK_MS), |actor, ctx| actor.feed(Event::Tick, ctx));
    }
}

impl Handler<Ask> for Coordinator {
    type Result = ();

    fn handle(&mut self, Ask { waiter, call, request, reply }: Ask, ctx: &mut Context<Self>) {
        self.waiters.insert(waiter, reply);
        let entropy = self.entropy.next();
        self.feed(Event::Request { waiter, call, request, entropy }, ctx);
    }
}

impl Handler<Gone> for Coordinator {
    type Result = ();

    fn handle(&mut self, Gone { waiter }: Gone, ctx: &mut Context<Self>) {
        self.waiters.remove(&waiter);
        self.feed(Event::RequestGone { waiter }, ctx);
    }
}

impl Handler<Join> for Coordinator {
    type Result = ();

    fn handle(&mut self, Join { node, hello, link }: Join, ctx: &mut Context<Self>) {
        self.links.insert(node, link);
        self.feed(Event::NodeJoined { node, hello }, ctx);
    }
}

impl Handler<Happened> for Coordinator {
    type Result = ();

    fn handle(&mut self, Happened(event): Happened, ctx: &mut Context<Self>) {
        match &event {
            Event::NodeLost { node, .. } => drop(self.links.remove(node)),
            Event::Generated { request, .. } => drop(self.generating.remove(request)),
            _ => {}
        }
        self.feed(event, ctx);
    }
}

impl Handler<Unneeded> for Coordinator {
    type Result = MessageResult<Unneeded>;

    fn handle(&mut self, Unneeded(digests): Unneeded, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.state.unneeded(digests))
    }
}

impl Handler<Count> for Coordinator {
    type Result = MessageResult<Count>;

    fn handle(&mut self, _: Count, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.tally.figures())
    }
}

impl Handler<JournalEnded> for Coordinator {
    type Result = ();

    fn handle(&mut self, JournalEnded(error): JournalEnded, ctx: &mut Context<Self>) {
        self.stop(Err(error), ctx);
    }
}

/// One sample request on a stream of its own.
async fn generate_on(
    connection: Connection,
    generate: Generate,
    attempt: u32,
    deadline: Duration,
    actor: Addr<Coordinator>,
) {
    let request = generate.request;
    let exchange = async {
        let mut stream = connection.open_stream().await.map_err(|e| e.to_string())?;
        let open = encode(&StreamOpen::Generate(generate));
        stream.send.send_frame(&open).await.map_err(|e| e.to_string())?;
        // The sending half stays open: a reset of it tells the replica that nobody waits.
        let frame = stream.recv.recv_frame(MAX_MESSAGE).await.map_err(|e| e.to_string())?;
        let frame = frame.ok_or("the node closed the stream without an answer")?;
        decode::<GenerateReply>("generate reply", &frame, MAX_MESSAGE).map_err(|e| e.to_string())
    };
    let late = || Err(format!("no answer within {} s", deadline.as_secs()));
    let reply = tokio::time::timeout(deadline, exchange).await.unwrap_or_else(|_| late());
    // Fails only when the actor is gone, and with it whoever waits.
    let _ = actor.send(Happened(Event::Generated { request, attempt, reply })).await;
}

/// Milliseconds since the Unix epoch that never go back, whatever is done to the wall clock.
#[derive(Clone)]
pub(super) struct Clock {
    started: Instant,
    started_ms: u64,
}

impl Clock {
    pub(super) fn start() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { started: Instant::now(), started_ms: since_epoch.as_millis() as u64 }
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.started_ms + self.started.elapsed().as_millis() as u64
    }
}

/// Numbers that nobody outside can foresee: a counter under a hash keyed by the system.
#[derive(Default)]
struct Entropy {
    keyed: RandomState,
    count: u64,
}

impl Entropy {
    fn next(&mut self) -> u64 {
        self.count += 1;
        self.keyed.hash_one(self.count)
    }
}
