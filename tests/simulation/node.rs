//! A node as the coordinator sees it: ranks and replicas behind one ordered stream.

use std::collections::{BTreeMap, BTreeSet};

use lockstep::{
    journal::Outcome,
    protocol::{
        Blame, CoordinatorMessage, Epoch, Generate, GenerateReply, Generation, ModelOffer, NodeHello, NodeId,
        NodeMessage, Numerics, OpToken, Operation, OperationSeq, PROTOCOL_VERSION, RankIndex,
    },
    types::{Digest, ErrorKind, OperationError, PolicyId, RunId, SampleResult, SampledSequence, StopReason},
};

use super::{blobs::Blobs, dice::Dice, journal::ModelJournal, rank::Weights};

pub const MODEL: &str = "org/tiny";
pub const CONTEXT: u32 = 64;
pub const VOCAB: u32 = 100;

pub struct ModelNode {
    pub name: String,
    pub trainers: u32,
    pub samplers: u32,
    /// Connected under this number.
    pub id: Option<NodeId>,
    /// Reads nothing and says nothing.
    pub hung: bool,
    /// Reaches the coordinator and no other node.
    pub cut_off: bool,
    ranks: BTreeMap<(RunId, RankIndex), ModelRank>,
    fences: BTreeMap<RunId, (Epoch, Generation)>,
    staged: BTreeSet<PolicyId>,
    active: BTreeSet<PolicyId>,
}

struct ModelRank {
    generation: Generation,
    /// A rank of its set on another node.
    other: Option<RankIndex>,
    seq: OperationSeq,
    state: Weights,
    pending: Option<Pending>,
}

struct Pending {
    token: OpToken,
    on_commit: Option<Weights>,
    on_discard: Option<Weights>,
}

impl ModelNode {
    pub fn new(name: String, trainers: u32, samplers: u32) -> Self {
        Self {
            name,
            trainers,
            samplers,
            id: None,
            hung: false,
            cut_off: false,
            ranks: BTreeMap::new(),
            fences: BTreeMap::new(),
            staged: BTreeSet::new(),
            active: BTreeSet::new(),
        }
    }

    /// A process that has just started: nothing survives in it.
    pub fn restart(&mut self) {
        *self = Self::new(self.name.clone(), self.trainers, self.samplers);
    }

    pub fn hello(&self) -> NodeHello {
        NodeHello {
            protocol_version: PROTOCOL_VERSION,
            name: self.name.clone(),
            pid: 1,
            trainers: self.trainers,
            samplers: self.samplers,
            models: vec![ModelOffer {
                name: MODEL.to_owned(),
                aliases: vec!["tiny".to_owned()],
                digest: Digest::of(b"tiny"),
                context: CONTEXT,
                vocab: VOCAB,
                tokenizer: Digest::of(b"tokenizer"),
                tokenizer_size: 9,
                footprint: lockstep::model::tiny::config()
                    .footprint(&lockstep::model::ComputeOptions::default()),
                gpu_footprint: None,
                lora_rank_max: [64; 8],
            }],
            numerics: Numerics {
                build: "1".into(),
                kernels: "avx2".into(),
                dtype: "f32".into(),
                reduction: "deterministic".into(),
            },
            address: format!("memory:{}", self.name),
            host: self.name.clone(),
            memory: None,
            gpu_memory: None,
        }
    }

    /// What it answers to one message, in order.
    pub fn hear(
        &mut self,
        message: CoordinatorMessage,
        blobs: &mut Blobs,
        journal: &ModelJournal,
        dice: &mut Dice,
    ) -> Vec<NodeMessage> {
        match message {
            CoordinatorMessage::Welcome { node, .. } => {
                assert_eq!(Some(node), self.id);
                Vec::new()
            }
            CoordinatorMessage::FormRanks { spec, epoch, generation, roster, restore } => {
                let run = spec.run;
                let fence = self.fences.insert(run, (epoch, generation));
                assert!(fence < Some((epoch, generation)), "{run}: generation {} again", generation.0);
                self.ranks.retain(|(other, _), _| *other != run);
                let missed = roster.iter().find(|seat| self.cut_off && Some(seat.node) != self.id);
                if let Some(missed) = missed {
                    let (error, blame) = (unavailable(), Blame::Peer(missed.rank));
                    return vec![NodeMessage::RanksFailed { run, generation, error, blame }];
                }
                if dice.fails(2) {
                    let (error, blame) = (unavailable(), Blame::Environment);
                    return vec![NodeMessage::RanksFailed { run, generation, error, blame }];
                }
                let state = restore.map_or_else(Weights::fresh, |blob| blobs.get(blob).clone());
                let mine = roster.iter().filter(|seat| Some(seat.node) == self.id);
                let elsewhere = roster.iter().find(|seat| Some(seat.node) != self.id);
                let other = elsewhere.map(|seat| seat.rank);
                for seat in mine {
                    assert!(seat.slot < self.trainers, "{run}: a seat that this node doesn't have");
                    let rank = ModelRank {
                        generation,
                        other,
                        seq: OperationSeq(0),
                        state: state.clone(),
                        pending: None,
                    };
                    self.ranks.insert((run, seat.rank), rank);
                }
                vec![NodeMessage::RanksReady { run, generation }]
            }
            CoordinatorMessage::ReleaseRanks { run, generation } => {
                self.ranks.retain(|(other, _), rank| *other != run || rank.generation > generation);
                Vec::new()
            }
            CoordinatorMessage::Execute { token, operation } => self.execute(token, &operation, blobs, dice),
            CoordinatorMessage::Commit { token } => {
                let outcome = journal.outcome(token.run, token.seq);
                let Some(Outcome::Done { state, .. }) = outcome else {
                    panic!("{token} is committed, and its outcome is not durable")
                };
                for rank in self.ranks_of(token) {
                    let pending = rank.pending.take().filter(|pending| pending.token == token);
                    let next = pending.and_then(|pending| pending.on_commit);
                    rank.state = next.unwrap_or_else(|| panic!("{token} is committed, and not prepared"));
                    assert_eq!(rank.state.digest(), *state, "{token} is committed with another state");
                }
                Vec::new()
            }
            CoordinatorMessage::Discard { token } => {
                for rank in self.ranks_of(token) {
                    let pending = rank.pending.take().filter(|pending| pending.token == token);
                    if let Some(next) = pending.and_then(|pending| pending.on_discard) {
                        rank.state = next;
                    }
                }
                Vec::new()
            }
            CoordinatorMessage::TakeSnapshot { token } => match self.ranks.get(&(token.run, RankIndex(0))) {
                Some(rank) if rank.generation == token.generation && !dice.fails(5) => {
                    vec![NodeMessage::SnapshotTaken { token, snapshot: blobs.put(rank.state.clone()) }]
                }
                _ => vec![NodeMessage::SnapshotFailed { token, error: unavailable() }],
            },
            CoordinatorMessage::Stage { policy, adapter, .. } => {
                assert_eq!(blobs.get(adapter).weights, policy.digest, "{policy} has another's bytes");
                if dice.fails(4) {
                    return vec![NodeMessage::StageFailed { policy, error: unavailable() }];
                }
                self.staged.insert(policy);
                vec![NodeMessage::Staged { policy }]
            }
            CoordinatorMessage::Activate { policy } => {
                assert!(self.staged.contains(&policy), "{policy} is activated, and not staged");
                self.active.insert(policy);
                vec![NodeMessage::Activated { policy }]
            }
            CoordinatorMessage::Retire { policy } => {
                self.staged.remove(&policy);
                self.active.remove(&policy);
                Vec::new()
            }
            CoordinatorMessage::Ping { nonce } => vec![NodeMessage::Pong { nonce }],
            CoordinatorMessage::Shutdown | CoordinatorMessage::Revoked { .. } => Vec::new(),
        }
    }

    fn ranks_of(&mut self, token: OpToken) -> impl Iterator<Item = &mut ModelRank> {
        let ranks = self.ranks.iter_mut().filter(move |((run, _), _)| *run == token.run);
        ranks.map(|(_, rank)| rank).filter(move |rank| rank.generation == token.generation)
    }

    fn execute(
        &mut self,
        token: OpToken,
        operation: &Operation,
        blobs: &mut Blobs,
        dice: &mut Dice,
    ) -> Vec<NodeMessage> {
        let mut answers = Vec::new();
        for ((run, index), rank) in &mut self.ranks {
            if *run != token.run || rank.generation != token.generation {
                continue;
            }
            assert!(rank.seq < token.seq, "{token} after operation {}", rank.seq.0);
            assert!(rank.pending.is_none(), "{token} while another is pending");
            rank.seq = token.seq;
            let rank_index = *index;
            let missed = rank.other.filter(|_| self.cut_off).map(Blame::Peer);
            if let Some(blame) = missed.or_else(|| dice.fails(1).then_some(Blame::Environment)) {
                let error = unavailable();
                answers.push(NodeMessage::OperationFailed { token, rank: rank_index, error, blame });
                continue;
            }
            match rank.state.compute(*run, operation, blobs) {
                Ok(computed) => {
                    let state = computed.next.digest();
                    answers.push(NodeMessage::Prepared {
                        token,
                        rank: rank_index,
                        state,
                        result: computed.result,
                        saved: computed.saved,
                        step: computed.next.step,
                    });
                    rank.pending = Some(Pending { token, on_commit: Some(computed.next), on_discard: None });
                }
                Err(error) => {
                    let after = Some(rank.state.after_failure(operation, &error));
                    rank.pending = Some(Pending { token, on_commit: None, on_discard: after });
                    let blame = Blame::Operation;
                    answers.push(NodeMessage::OperationFailed { token, rank: rank_index, error, blame });
                }
            }
        }
        answers
    }

    /// Tokens that depend on seed and weights alone, as a replica's do.
    pub fn generate(&self, generate: &Generate) -> GenerateReply {
        if let Some(policy) = generate.policy {
            assert!(
                self.active.contains(&policy),
                "{policy} is asked of {}, which doesn't serve it",
                self.name
            );
        }
        let digest = generate.policy.map_or(Digest::of(b"base"), |policy| policy.digest);
        let mixed = Digest::of(&[&digest.0[..], &generate.seed.to_le_bytes()].concat());
        let sequence = SampledSequence {
            tokens: mixed.0.iter().map(|byte| u32::from(*byte) % VOCAB).collect(),
            logprobs: None,
            stop_reason: StopReason::Length,
        };
        GenerateReply::Done(SampleResult {
            sequences: vec![sequence; generate.num_samples as usize],
            policy_version: generate.policy.map_or(0, |policy| policy.step),
            prompt_logprobs: None,
            topk_prompt_logprobs: None,
        })
    }
}

fn unavailable() -> OperationError {
    OperationError::new(ErrorKind::Unavailable, "bad luck")
}
