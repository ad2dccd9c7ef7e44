//! The replica's actor: holds replies and weights, performs what the state decides.

use std::{
    collections::HashMap,
    sync::{Arc, mpsc},
};

use actix::{Actor, Addr, AsyncContext, Context, Handler};
use tokio::sync::oneshot;

use crate::{
    model::{Adapter, BaseModel, Library, ModelConfig, ModelSource},
    protocol::GenerateReply,
    types::PolicyId,
};

use super::{
    Activate, ReplicaConfig, ReplicaReport, Retire, Sample, Stage,
    budget::ModelFacts,
    engine::{Engine, EngineOrder},
    job::{Held, Serving},
    schedule::{Capacity, RequestKey},
    slots::MAX_VERIFYING,
    state::{Admission, Effect, Event, MAX_QUEUED, Order, SamplerState},
    threads::{self, FromThread, Load},
};

/// Messages that may wait for the actor: a burst of as many requests as it would queue.
const MAILBOX: usize = MAX_QUEUED;

/// The replica's actor: decides; its compute thread decodes.
pub struct SamplerReplica {
    replica: u32,
    state: SamplerState,
    next_key: u64,
    /// By request, until its answer.
    replies: HashMap<RequestKey, oneshot::Sender<GenerateReply>>,
    models: Vec<ReplicaModel>,
    adapters: HashMap<PolicyId, Arc<Adapter>>,
    /// Capacity 1, and there is one order at a time: never full.
    orders: mpsc::SyncSender<EngineOrder>,
    /// Room for all that the state has loaded at once: never full.
    loads: mpsc::SyncSender<Load>,
    reports: tokio::sync::mpsc::Sender<ReplicaReport>,
    on_death: Arc<dyn Fn(&str) + Send + Sync>,
}

struct ReplicaModel {
    name: String,
    config: Arc<ModelConfig>,
    weights: Option<Arc<BaseModel>>,
}

impl SamplerReplica {
    /// Starts the actor (in the current actix system) and its threads, which end with it.
    ///
    /// `reports` must be drained: a replica whose report finds no room calls `on_death`, because
    /// its coordinator would wait for it for ever.
    ///
    /// # Errors
    ///
    /// If the system refuses a thread.
    pub fn launch(
        config: ReplicaConfig,
        reports: tokio::sync::mpsc::Sender<ReplicaReport>,
    ) -> std::io::Result<Addr<Self>> {
        let ReplicaConfig { index, library, cores, kv_bytes, max_batch, prefill_rows, on_death } = config;
        let offers = library.offers();
        let facts = offers.iter().map(|(source, config, _)| facts(source, config, &library)).collect();
        let capacity = Capacity { max_batch: max_batch.max(1), kv_bytes, prefill_rows: prefill_rows.max(1) };

        let mut context = Context::<Self>::new();
        context.set_mailbox_capacity(MAILBOX);
        let (orders, order_receiver) = mpsc::sync_channel(1);
        threads::spawn_engine(index, Engine::new(cores), order_receiver, context.address())?;
        let (loads, load_receiver) = mpsc::sync_channel(MAX_VERIFYING + offers.len());
        threads::spawn_loader(index, library, load_receiver, context.address())?;

        Ok(context.run(Self {
            replica: index,
            state: SamplerState::new(index, capacity, facts),
            next_key: 0,
            replies: HashMap::new(),
            models: offers.into_iter().map(ReplicaModel::from).collect(),
            adapters: HashMap::new(),
            orders,
            loads,
            reports,
            on_death,
        }))
    }

    fn handle_event(&mut self, event: Event) {
        for effect in self.state.handle(event) {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::LoadModel(model) => {
                let name = self.models[model.0].name.clone();
                self.load(Load::Model { model, name });
            }
            Effect::Verify { policy, model, adapter } => {
                let config = self.models[model.0].config.clone();
                self.load(Load::Adapter { policy, config, bytes: adapter });
            }
            Effect::Forget(policy) => {
                self.adapters.remove(&policy);
            }
            Effect::Report(report) => self.report(report),
            Effect::Answer { key, reply } => {
                if let Some(sender) = self.replies.remove(&key) {
                    // Whoever asked may have gone at this very moment.
                    let _ = sender.send(reply);
                }
            }
            Effect::Step(order) => self.order(order),
            Effect::Die { reason } => {
                tracing::error!(replica = self.replica, reason, "the replica has died");
                (self.on_death)(&format!("replica-{}: {reason}", self.replica));
            }
        }
    }

    fn load(&mut self, load: Load) {
        if self.loads.try_send(load).is_err() {
            // The thread is gone; the actor has been, or will be, told by its guard.
            tracing::error!(replica = self.replica, "the loader takes no work");
        }
    }

    fn report(&mut self, report: ReplicaReport) {
        use tokio::sync::mpsc::error::TrySendError;
        match self.reports.try_send(report) {
            Ok(()) => {}
            Err(TrySendError::Full(report)) => {
                (self.on_death)(&format!("replica-{}: nobody takes its {report:?}", self.replica));
            }
            // The node is shutting down.
            Err(TrySendError::Closed(_)) => {}
        }
    }

    fn order(&mut self, order: Order) {
        let Order { drop, admit, step } = order;
        let with_weights = |admission| {
            let serving = self.serving(&admission);
            (admission, serving)
        };
        let admit = admit.into_iter().map(with_weights).collect();
        let order = EngineOrder { drop, admit, step };
        if self.orders.try_send(order).is_err() {
            tracing::error!(replica = self.replica, "the compute thread takes no orders");
        }
    }

    /// The weights of an admitted request.
    fn serving(&self, admission: &Admission) -> Serving {
        // The state admits only requests of loaded models, and forgets no policy that is pinned.
        let model = self.models[admission.model.0].weights.clone().expect("the model is loaded");
        let adapter = admission.generate.policy.map(|policy| Held {
            policy,
            adapter: self.adapters.get(&policy).expect("the policy is held").clone(),
        });
        Serving { model, adapter }
    }

    /// Requests whose askers have gone leave before the next order is made.
    fn cancel_abandoned(&mut self) {
        let abandoned = self.replies.extract_if(|_, reply| reply.is_closed());
        let mut keys: Vec<RequestKey> = abandoned.map(|(key, _)| key).collect();
        keys.sort_unstable();
        for key in keys {
            self.handle_event(Event::Cancelled(key));
        }
    }
}

impl Actor for SamplerReplica {
    type Context = Context<Self>;
}

impl Handler<Sample> for SamplerReplica {
    type Result = ();

    fn handle(&mut self, Sample { generate, reply }: Sample, _: &mut Self::Context) {
        let key = RequestKey(self.next_key);
        self.next_key += 1;
        self.replies.insert(key, reply);
        self.handle_event(Event::Sample { key, generate });
    }
}

impl Handler<Stage> for SamplerReplica {
    type Result = ();

    fn handle(&mut self, message: Stage, _: &mut Self::Context) {
        let Stage { policy, base_model, adapter } = message;
        self.handle_event(Event::Stage { policy, base_model, adapter });
    }
}

impl Handler<Activate> for SamplerReplica {
    type Result = ();

    fn handle(&mut self, Activate { policy }: Activate, _: &mut Self::Context) {
        self.handle_event(Event::Activate(policy));
    }
}

impl Handler<Retire> for SamplerReplica {
    type Result = ();

    fn handle(&mut self, Retire { policy }: Retire, _: &mut Self::Context) {
        self.handle_event(Event::Retire(policy));
    }
}

impl Handler<FromThread> for SamplerReplica {
    type Result = ();

    fn handle(&mut self, message: FromThread, _: &mut Self::Context) {
        self.cancel_abandoned();
        let event = match message {
            FromThread::StepDone(report) => Event::StepDone(report),
            FromThread::ModelLoaded { model, outcome } => {
                let outcome = outcome.map(|weights| self.models[model.0].weights = Some(weights));
                Event::ModelLoaded { model, outcome }
            }
            FromThread::Verified { policy, outcome } => {
                let outcome = outcome.map(|adapter| drop(self.adapters.insert(policy, adapter)));
                Event::Verified { policy, outcome }
            }
            FromThread::Died { reason } => Event::Died { reason },
        };
        self.handle_event(event);
    }
}

impl Drop for SamplerReplica {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.on_death)(&format!("the actor of replica-{} has panicked", self.replica));
        }
    }
}

impl From<(ModelSource, ModelConfig, crate::types::Digest)> for ReplicaModel {
    fn from((source, config, _): (ModelSource, ModelConfig, crate::types::Digest)) -> Self {
        Self { name: source.name, config: Arc::new(config), weights: None }
    }
}

fn facts(source: &ModelSource, config: &ModelConfig, library: &Library) -> ModelFacts {
    let (kv_position_bytes, kv_block) = library.cache_shape(config);
    ModelFacts {
        name: source.name.clone(),
        aliases: source.aliases.clone(),
        context: config.max_position_embeddings,
        vocab: config.vocab_size,
        kv_position_bytes,
        kv_block,
    }
}
