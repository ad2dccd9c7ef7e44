//! Whether a run fits the memory of the nodes that could hold it, before it is accepted.
//!
//! What is reckoned with is what nodes have said of their machines and models
//! ([`Footprint`](crate::model::Footprint)); a node that doesn't know its memory holds anything.
//! Nodes on one machine share its memory equally.

use std::collections::BTreeMap;

use crate::{
    model::RunMemory,
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

/// A node's memory and what would be taken of it, in bytes.
struct Share {
    node: String,
    trainers: u32,
    /// Absent: not known.
    memory: Option<u64>,
    weights: u64,
    /// States of the runs that it holds.
    states: u64,
    /// The largest of those runs at work.
    work: u64,
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
        let fits = |tokens: u32, quarters: u64| {
            let need = asked.need(tokens);
            let seats = shares.iter().map(|share| share.seats(need, asked.replicas, quarters));
            seats.sum::<u32>() >= asked.replicas
        };
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
        let need = asked.need(tokens);
        if shares.iter().map(|share| share.seats(need, replicas, 4)).sum::<u32>() >= replicas {
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
        let on_machine = self.nodes.values().filter(|other| other.hello.host == node.hello.host).count();
        let memory = node.hello.memory.map(|memory| {
            let caches = memory.cache_bytes.saturating_mul(u64::from(node.hello.samplers));
            (memory.machine_bytes / on_machine.max(1) as u64).saturating_sub(caches)
        });
        let mut weights = BTreeMap::from([(&offer.name, offer.footprint.weights)]);
        let (mut states, mut work) = (0_u64, 0);
        for run in self.runs.values().filter(|run| Some(run.id) != but) {
            let seats = run.roster().iter().filter(|seat| seat.node == id).count();
            let Some(of_run) = self.models.get(&run.create.base_model).filter(|_| seats > 0) else {
                continue;
            };
            let need = run.memory(of_run);
            weights.insert(&of_run.name, of_run.footprint.weights);
            states = states.saturating_add(need.state.saturating_mul(seats as u64));
            work = work.max(need.work);
        }
        let weights = weights.values().copied().fold(0, u64::saturating_add);
        let trainers = node.hello.trainers;
        Share { node: node.hello.name.clone(), trainers, memory, weights, states, work }
    }
}

impl Run {
    fn memory(&self, offer: &ModelOffer) -> RunMemory {
        let tokens = |given: Option<u32>| u64::from(given.unwrap_or_default());
        let rows = tokens(self.create.micro_batch_tokens).max(tokens(self.create.max_seq_len));
        offer.footprint.run(&self.lora, rows)
    }
}

impl Share {
    /// What is taken if so many of the node's ranks hold the run, too, and all are at work.
    fn need(&self, run: RunMemory, ranks: u32) -> u64 {
        let others = self.work.saturating_mul(u64::from(self.trainers - ranks));
        let ranks = u64::from(ranks);
        let work = run.work.max(self.work).saturating_mul(ranks).saturating_add(others);
        let states = run.state.saturating_mul(ranks).saturating_add(self.states);
        self.weights.saturating_add(states).saturating_add(work)
    }

    /// How many of its ranks may hold the run, if all together fill so many quarters of it.
    fn seats(&self, run: RunMemory, replicas: u32, quarters: u64) -> u32 {
        let most = self.trainers.min(replicas);
        let Some(memory) = self.memory.map(|memory| memory / 4 * quarters) else { return most };
        (1..=most).rev().find(|ranks| self.need(run, *ranks) <= memory).unwrap_or(0)
    }
}

impl Asked<'_> {
    fn need(&self, max_seq_len: u32) -> RunMemory {
        let rows = self.micro_batch_tokens.max(max_seq_len);
        self.offer.footprint.run(self.lora, u64::from(rows))
    }

    /// Whether the run would fit if the nodes recomputed activations.
    fn fits_checkpointed(&self, max_seq_len: u32, shares: &[Share]) -> bool {
        let footprint = self.offer.footprint;
        let rows = u64::from(self.micro_batch_tokens.max(max_seq_len));
        let need = footprint.with_checkpointing().run(self.lora, rows);
        let seats = shares.iter().map(|share| share.seats(need, self.replicas, 4)).sum::<u32>();
        footprint.checkpointed.is_some() && seats >= self.replicas
    }

    fn refusal(&self, field: &str, given: u32, fitting: u32, shares: &[Share]) -> InvalidInput {
        // The node with the most memory says best what is missing.
        let Some(share) = shares.iter().max_by_key(|share| share.memory) else {
            return InvalidInput::new(field, "no node offers this model");
        };
        let run = self.need(given);
        // Ranks are spread over nodes first.
        let ranks = share.trainers.min(self.replicas.div_ceil(shares.len() as u32));
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let mut hint = match fitting {
            0 => "choose a smaller rank, fewer targets or smaller micro-batches".to_owned(),
            fitting => format!("at most {fitting} tokens fit"),
        };
        if self.fits_checkpointed(given, shares) {
            hint.push_str("; all fit if the nodes are started with --activation-checkpointing");
        }
        InvalidInput::new(
            field,
            format!(
                "{given} tokens need {:.3} GiB on node {} (weights {:.3}, runs that it holds {:.3}, this run's \
                 adapter and moments {:.3}, the rest for {} ranks at work), which has {:.3} GiB for them; {hint}",
                gib(share.need(run, ranks)),
                share.node,
                gib(share.weights),
                gib(share.states),
                gib(run.state.saturating_mul(u64::from(ranks))),
                share.trainers,
                gib(share.memory.unwrap_or_default()),
            ),
        )
    }
}
