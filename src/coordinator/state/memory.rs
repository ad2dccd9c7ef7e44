//! Whether a run fits the memory of the nodes that could hold it, before it is accepted.
//!
//! What is reckoned with is what nodes have said of their machines and models
//! ([`Footprint`], [`GpuFootprint`]); a node that doesn't know its memory holds anything.
//! Nodes on one machine share its memory equally, as do nodes on one GPU that GPU's; on a GPU a run must fit both.

use std::collections::BTreeMap;

use crate::{
    model::{Footprint, GpuFootprint, RunMemory},
    protocol::{ModelOffer, NodeId},
    types::{InvalidInput, LoraConfig, RunId},
};

use super::{State, membership::Node, run::Run};

/// Quarters of a node's memory that a run fills at most if it doesn't say how long its sequences
/// are, so that other runs fit beside it.
const UNASKED_QUARTERS: u64 = 3;

/// What a run to be accepted asks of each node that holds it.
pub(super) struct Asked<'a> {
    pub offer: &'a ModelOffer,
    pub lora: &'a LoraConfig,
    pub replicas: u32,
    pub micro_batch_tokens: u32,
    /// Absent: as much of the model's context as fits.
    pub max_seq_len: Option<u32>,
}

/// A node and where a run takes memory of it: of its GPU, if one computes, then of its host.
#[derive(Clone)]
struct Share {
    node: String,
    trainers: u32,
    pools: Vec<Pool>,
}

/// A memory and what is taken of it, in bytes.
#[derive(Clone)]
struct Pool {
    /// What the model that is asked for costs here.
    cost: Cost,
    /// Absent: not known.
    bytes: Option<u64>,
    /// Of the models, on a GPU with the steps of decoding that they hold recorded.
    weights: u64,
    /// States of the runs that the node holds, and on a GPU their links.
    states: u64,
    /// The largest of those runs at work.
    work: u64,
}

/// What a model costs of a host's memory, or of a GPU's.
#[derive(Clone, Copy)]
enum Cost {
    Host(Footprint),
    /// The first counts the adapter's values.
    Gpu(Footprint, GpuFootprint),
}

impl State {
    /// The longest sequence that the run may have: as asked, or what fits. Refused with the
    /// figures if there is not memory for as many ranks as the run is to have.
    pub(super) fn fit(&self, asked: &Asked<'_>) -> Result<u32, InvalidInput> {
        let shares: Vec<Share> = self.shares(asked.offer, None);
        if shares.is_empty() {
            // All that had trainers are away: nobody knows.
            return Ok(asked.max_seq_len.unwrap_or(asked.offer.context));
        }
        let fits = |tokens: u32, quarters: u64| seats(&shares, asked, tokens, quarters) >= asked.replicas;
        // Fewer tokens never need more.
        let most_fitting = |most: u32, quarters: u64| {
            let (mut fitting, mut beyond) = (0, most + 1);
            while fitting + 1 < beyond {
                let middle = fitting + (beyond - fitting) / 2;
                match fits(middle, quarters) {
                    true => fitting = middle,
                    false => beyond = middle,
                }
            }
            fitting
        };
        let least = asked.micro_batch_tokens.min(asked.offer.context);
        if !fits(asked.max_seq_len.unwrap_or(least).min(least), 4) {
            return Err(asked.refusal("micro_batch_tokens", asked.micro_batch_tokens, 0, &shares));
        }
        match asked.max_seq_len {
            None => Ok(most_fitting(asked.offer.context, UNASKED_QUARTERS).max(least)),
            Some(given) if fits(given, 4) => Ok(given),
            Some(given) => Err(asked.refusal("max_seq_len", given, most_fitting(given, 4), &shares)),
        }
    }

    /// Whether a run that goes on with another adapter still fits; refused as a new run would be.
    pub(super) fn fits_adapter(&self, run: &Run, lora: &LoraConfig) -> Result<(), InvalidInput> {
        let create = &run.create;
        let Some(offer) = self.models.get(&create.base_model) else { return Ok(()) };
        let shares = self.shares(offer, Some(run.id));
        let (Some(micro_batch_tokens), false) = (create.micro_batch_tokens, shares.is_empty()) else {
            return Ok(());
        };
        let replicas = (run.roster().len() as u32).max(1);
        let asked = Asked { offer, lora, replicas, micro_batch_tokens, max_seq_len: create.max_seq_len };
        let tokens = create.max_seq_len.unwrap_or(micro_batch_tokens);
        if seats(&shares, &asked, tokens, 4) >= replicas {
            return Ok(());
        }
        Err(asked.refusal("lora.rank", tokens, 0, &shares))
    }

    /// The nodes that could hold ranks of a run on this model, without what `but` takes of them.
    fn shares(&self, offer: &ModelOffer, but: Option<RunId>) -> Vec<Share> {
        let offering = self
            .nodes
            .iter()
            .filter(|(_, node)| node.hello.trainers > 0 && node.offers(&offer.name, offer.digest));
        offering.map(|(id, node)| self.share(*id, node, offer, but)).collect()
    }

    fn share(&self, id: NodeId, node: &Node, offer: &ModelOffer, but: Option<RunId>) -> Share {
        // Nodes may compute the same model in other places, or keep less of it.
        let own = node.hello.models.iter().find(|own| own.name == offer.name).unwrap_or(offer);
        let samplers = u64::from(node.hello.samplers);
        let less_caches = |bytes: u64, nodes: usize, cache_bytes: u64| {
            (bytes / nodes.max(1) as u64).saturating_sub(cache_bytes.saturating_mul(samplers))
        };
        let mut pools = Vec::new();
        if let (Some(gpu), Some(memory)) = (own.gpu_footprint, &node.hello.gpu_memory) {
            let shares = |other: &&Node| {
                let theirs = other.hello.gpu_memory.as_ref();
                other.hello.host == node.hello.host && theirs.is_some_and(|theirs| theirs.gpu == memory.gpu)
            };
            let on_gpu = self.nodes.values().filter(shares).count();
            let bytes = less_caches(memory.bytes, on_gpu, memory.cache_bytes);
            pools.push(self.pool(id, node, own, Cost::Gpu(own.footprint, gpu), Some(bytes), but));
        }
        let on_machine = self.nodes.values().filter(|other| other.hello.host == node.hello.host).count();
        let memory = node.hello.memory;
        let bytes = memory.map(|memory| less_caches(memory.machine_bytes, on_machine, memory.cache_bytes));
        pools.push(self.pool(id, node, own, Cost::Host(own.footprint), bytes, but));
        Share { node: node.hello.name.clone(), trainers: node.hello.trainers, pools }
    }

    fn pool(
        &self,
        id: NodeId,
        node: &Node,
        offer: &ModelOffer,
        cost: Cost,
        bytes: Option<u64>,
        but: Option<RunId>,
    ) -> Pool {
        let mut weights = BTreeMap::from([(&offer.name, cost.weights())]);
        let (mut states, mut work) = (0_u64, 0);
        for run in self.runs.values().filter(|run| Some(run.id) != but) {
            let seats = run.roster().iter().filter(|seat| seat.node == id).count();
            let of_run = node.hello.models.iter().find(|own| own.name == run.create.base_model);
            let Some(of_run) = of_run.filter(|_| seats > 0) else { continue };
            let Some(cost) = cost.of_another(of_run) else { continue };
            let need = cost.run(&run.lora, run.rows(), run.roster().len() as u64);
            weights.insert(&of_run.name, cost.weights());
            states = states.saturating_add(held(need, seats as u64));
            work = work.max(need.work);
        }
        let weights = weights.values().copied().fold(0, u64::saturating_add);
        Pool { cost, bytes, weights, states, work }
    }
}

/// What so many ranks of a run on one node hold as long as the run lives. Two on one GPU add up through the host: no link.
fn held(run: RunMemory, ranks: u64) -> u64 {
    run.state.saturating_mul(ranks).saturating_add(if ranks == 1 { run.link } else { 0 })
}

/// How many ranks of the run may be seated, if those of a node fill so many quarters of it.
fn seats(shares: &[Share], asked: &Asked<'_>, tokens: u32, quarters: u64) -> u32 {
    let of = |share: &Share| share.seats(asked.lora, asked.rows(tokens), asked.replicas, quarters);
    shares.iter().map(of).sum()
}

impl Run {
    fn rows(&self) -> u64 {
        let tokens = |given: Option<u32>| u64::from(given.unwrap_or_default());
        tokens(self.create.micro_batch_tokens).max(tokens(self.create.max_seq_len))
    }
}

impl Cost {
    fn weights(&self) -> u64 {
        match self {
            Self::Host(footprint) => footprint.weights,
            Self::Gpu(_, footprint) => footprint.model(),
        }
    }

    /// Of one of so many ranks.
    fn run(&self, lora: &LoraConfig, rows: u64, ranks: u64) -> RunMemory {
        match self {
            Self::Host(footprint) => footprint.run(lora, rows),
            Self::Gpu(host, footprint) => footprint.run(lora, host.values(lora), rows, ranks),
        }
    }

    /// That of another model, in the same memory.
    fn of_another(&self, offer: &ModelOffer) -> Option<Self> {
        match self {
            Self::Host(_) => Some(Self::Host(offer.footprint)),
            Self::Gpu(..) => offer.gpu_footprint.map(|gpu| Self::Gpu(offer.footprint, gpu)),
        }
    }

    /// With activation checkpointing, if it is not so already.
    fn checkpointed(self) -> Option<Self> {
        match self {
            Self::Host(footprint) => {
                footprint.checkpointed.map(|_| Self::Host(footprint.with_checkpointing()))
            }
            Self::Gpu(host, gpu) => gpu.checkpointed.map(|_| Self::Gpu(host, gpu.with_checkpointing())),
        }
    }
}

impl Pool {
    /// What is taken if so many of the node's `trainers` ranks hold the run, too, and all are at work; on a GPU they take
    /// turns.
    fn need(&self, run: RunMemory, ranks: u32, trainers: u32) -> u64 {
        let largest = run.work.max(self.work);
        let work = match self.cost {
            Cost::Gpu(..) => largest,
            Cost::Host(_) => {
                let others = self.work.saturating_mul(u64::from(trainers - ranks));
                largest.saturating_mul(u64::from(ranks)).saturating_add(others)
            }
        };
        let states = held(run, u64::from(ranks)).saturating_add(self.states);
        self.weights.saturating_add(states).saturating_add(work)
    }

    fn holds(&self, run: RunMemory, ranks: u32, trainers: u32, quarters: u64) -> bool {
        self.bytes.is_none_or(|bytes| self.need(run, ranks, trainers) <= bytes / 4 * quarters)
    }
}

impl Share {
    /// How many of its ranks may hold the run, if all together fill so many quarters of it.
    fn seats(&self, lora: &LoraConfig, rows: u64, replicas: u32, quarters: u64) -> u32 {
        let needs: Vec<RunMemory> =
            self.pools.iter().map(|pool| pool.cost.run(lora, rows, u64::from(replicas))).collect();
        let hold = |ranks: &u32| {
            let mut pools = self.pools.iter().zip(&needs);
            pools.all(|(pool, need)| pool.holds(*need, *ranks, self.trainers, quarters))
        };
        (1..=self.trainers.min(replicas)).rev().find(hold).unwrap_or(0)
    }

    /// The same if its node recomputed activations.
    fn checkpointed(&self) -> Self {
        let pools = self.pools.iter().map(|pool| {
            let cost = pool.cost.checkpointed().unwrap_or(pool.cost);
            Pool { cost, ..pool.clone() }
        });
        Self { pools: pools.collect(), ..self.clone() }
    }
}

impl Asked<'_> {
    fn rows(&self, max_seq_len: u32) -> u64 {
        u64::from(self.micro_batch_tokens.max(max_seq_len))
    }

    /// Whether the run would fit if the nodes recomputed activations, and it is not that they do.
    fn fits_checkpointed(&self, max_seq_len: u32, shares: &[Share]) -> bool {
        let pools = || shares.iter().flat_map(|share| &share.pools);
        let recomputed: Vec<Share> = shares.iter().map(Share::checkpointed).collect();
        pools().any(|pool| pool.cost.checkpointed().is_some())
            && seats(&recomputed, self, max_seq_len, 4) >= self.replicas
    }

    fn refusal(&self, field: &str, given: u32, fitting: u32, shares: &[Share]) -> InvalidInput {
        // The node with the most memory says best what is missing.
        let Some(share) = shares.iter().max_by_key(|share| share.pools.first().and_then(|pool| pool.bytes))
        else {
            return InvalidInput::new(field, "no node offers this model");
        };
        // Ranks are spread over nodes first.
        let ranks = share.trainers.min(self.replicas.div_ceil(shares.len() as u32));
        let need = |pool: &Pool| pool.cost.run(self.lora, self.rows(given), u64::from(self.replicas));
        let short = |pool: &&Pool| !pool.holds(need(pool), ranks, share.trainers, 4);
        let Some(pool) = share.pools.iter().find(short).or(share.pools.first()) else {
            return InvalidInput::new(field, "no node offers this model");
        };
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let mut hint = match fitting {
            0 => "choose a smaller rank, fewer targets or smaller micro-batches".to_owned(),
            fitting => format!("at most {fitting} tokens fit"),
        };
        if self.fits_checkpointed(given, shares) {
            hint.push_str("; all fit if the nodes are started with --activation-checkpointing");
        }
        let (whose, moments, at_work) = match pool.cost {
            Cost::Host(_) => ("", " and moments", format!("{} ranks at work", share.trainers)),
            Cost::Gpu(..) => {
                let link = if ranks == 1 && need(pool).link > 0 { " and sums over NCCL" } else { "" };
                (" of the GPU's memory", link, "the micro-batch at work".to_owned())
            }
        };
        let run = need(pool);
        InvalidInput::new(
            field,
            format!(
                "{given} tokens need {:.3} GiB{whose} on node {} (weights {:.3}, runs that it holds {:.3}, this run's \
                 adapter{moments} {:.3}, the rest for {at_work}), which has {:.3} GiB for them; {hint}",
                gib(pool.need(run, ranks, share.trainers)),
                share.node,
                gib(pool.weights),
                gib(pool.states),
                gib(held(run, u64::from(ranks))),
                gib(pool.bytes.unwrap_or_default()),
            ),
        )
    }
}
