//! `forward` and `forward_backward`, shared by the ranks of a run.
//!
//! ```text
//!   data ─prepare─► examples ─cut─► micro-batches ─assign─► this rank's ─► part, partial sums
//!                                                                            │        │
//!                     every rank's parts, in micro-batch order ◄─ all_gather ┘        │
//!                     gradient of the operation ◄──────────────── all_reduce ─────────┘
//! ```
//!
//! Every rank goes into the gather whatever became of its own part, and says there what went
//! wrong: so a rank that fails never keeps the others waiting to the deadline, and all of them
//! report the same failure, that of the lowest rank.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use crate::{
    collective::{CollectiveError, Partial, TreeAccumulator, assign_leaves},
    kernels::Priority,
    model::{
        AdapterRows, Example, GradientKind, MicroBatchOutput, cut_micro_batches, prepare, run_micro_batch,
    },
    protocol::{
        Blame, MAX_INLINE_PAYLOAD, MicroBatchPart, OpToken, OperationResult, Payload, RankPart, decode,
        decode_compressed, encode, encode_compressed,
    },
    types::{Datum, ErrorKind, ForwardBackwardOutput, LossSpec, OperationError},
};

use super::{
    Failure,
    compute::{HeldRun, Tools},
    operation::{Outcome, store},
};

/// Bounds a collective call of which nobody hears any more. A rank waits for its peers for as long as
/// they compute: the coordinator calls the operation off when a peer's node is lost or no rank makes
/// progress, and losing the coordinator calls it off, too.
const COLLECTIVE_DEADLINE: Duration = Duration::from_secs(24 * 3_600);

/// Largest gathered part: the outputs of one rank, uncompressed.
const MAX_PART: usize = 1 << 30;

/// Whether a gradient is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Forward,
    ForwardBackward,
}

/// What one rank computed itself.
struct OwnShare {
    part: RankPart,
    /// Micro-batches of the whole operation.
    leaves: u32,
    partials: Vec<Partial>,
}

/// Computes the operation together with the run's other ranks.
pub(super) fn run(
    run: &mut HeldRun,
    tools: &mut Tools,
    token: OpToken,
    loss: &LossSpec,
    data: &Payload,
    mode: Mode,
) -> Result<Outcome, Failure> {
    let kind = GradientKind::of(loss);
    if mode == Mode::ForwardBackward {
        // All ranks hold the same state, so all refuse, and none waits for another.
        run.state.refuse_other_kind(kind)?;
    }
    let (part, leaves, partials) = match own_share(run, tools, token, loss, data, mode) {
        Ok(OwnShare { part, leaves, partials }) => (part, leaves, partials),
        Err(Failure { error, blame }) => (RankPart::Failed { error, blame }, 0, Vec::new()),
    };
    let deadline = Instant::now() + COLLECTIVE_DEADLINE;
    let gathered = {
        let _span = tracing::debug_span!("gather").entered();
        run.collective.all_gather(token, encode(&part), deadline)?
    };
    let micro_batches = in_order(gathered)?;
    let active = micro_batches.iter().map(|part| part.active).sum();

    let next = match mode {
        Mode::Forward => run.state.clone(),
        Mode::ForwardBackward => {
            let mut gradient = vec![0.0; run.state.layout.len()];
            let span = tracing::debug_span!("all-reduce", parameters = gradient.len()).entered();
            run.collective.all_reduce(token, leaves, partials, &mut gradient, deadline)?;
            drop(span);
            run.state.accumulate(&gradient, active, kind)?
        }
    };

    let output = output(loss, micro_batches);
    if !output.loss.is_finite() {
        let problem = format!("the loss is {}: the numbers of this batch left the finite range", output.loss);
        return Err(OperationError::new(ErrorKind::NotFinite, problem).into());
    }
    let bytes = encode_compressed(&output);
    let payload = match bytes.len() {
        0..=MAX_INLINE_PAYLOAD => Payload::Inline(bytes),
        _ => Payload::Blob(store(run, &*tools.config.blobs, bytes)?),
    };
    Ok(Outcome { next, result: OperationResult::ForwardBackward(payload), saved: None })
}

fn own_share(
    run: &HeldRun,
    tools: &mut Tools,
    token: OpToken,
    loss: &LossSpec,
    data: &Payload,
    mode: Mode,
) -> Result<OwnShare, Failure> {
    let data = fetch(tools, data)?;
    let examples = prepare(&run.model.config, run.spec.max_seq_len as usize, loss, &data)
        .map_err(OperationError::from)?;
    let micro_batches = cut_micro_batches(&examples, run.spec.micro_batch_tokens as usize);
    let costs: Vec<u64> = micro_batches.iter().map(|range| tokens(&examples[range.clone()])).collect();
    let world_size = run.collective.world_size();
    let mine = assign_leaves(&costs, world_size)[run.rank.0 as usize].clone();

    let parameters = run.state.layout.len();
    let mut sums = TreeAccumulator::new(mine.start, parameters);
    let mut computed = Vec::with_capacity(mine.len());
    tools.progress.stands_at(token, 0, mine.len() as u32);
    for range in &micro_batches[as_usize(&mine)] {
        if run.abort.is_thrown() {
            return Err(Failure::environment(ErrorKind::Unavailable, format!("{token} was called off")));
        }
        let mut gradient = (mode == Mode::ForwardBackward).then(|| vec![0.0; parameters]);
        let rows = AdapterRows { layout: &run.state.layout, values: &run.state.weights };
        let lease = {
            let _span = tracing::debug_span!("wait for cores").entered();
            tools.config.cores.lease(run.cores, Priority::Training)
        };
        let span = tracing::debug_span!("micro-batch", tokens = tokens(&examples[range.clone()])).entered();
        computed.push(run_micro_batch(
            &run.model,
            rows,
            loss,
            &examples[range.clone()],
            gradient.as_deref_mut(),
            &mut tools.workspace,
            lease.team(),
        )?);
        drop((span, lease));
        tools.progress.stands_at(token, computed.len() as u32, mine.len() as u32);
        if let Some(gradient) = gradient {
            sums.push(gradient);
        }
    }
    let leaves = micro_batches.len() as u32;
    let part = RankPart::Computed {
        first: mine.start,
        micro_batches: computed.into_iter().map(MicroBatchPart::from).collect(),
    };
    Ok(OwnShare { part, leaves, partials: sums.finish(leaves) })
}

fn fetch(tools: &Tools, data: &Payload) -> Result<Vec<Datum>, Failure> {
    let fetched;
    let bytes = match data {
        Payload::Inline(bytes) => bytes.as_slice(),
        Payload::Blob(blob) => {
            fetched = tools.config.blobs.get(*blob)?;
            &fetched
        }
    };
    // The coordinator took these bytes as canonical, so the fault is not the caller's; but every
    // rank finds it, and would find it again.
    decode_compressed("data of an operation", bytes).map_err(|e| Failure {
        error: OperationError::new(ErrorKind::Internal, e.to_string()),
        blame: Blame::Operation,
    })
}

/// Every micro-batch's part in micro-batch order, or the failure of the lowest rank that failed.
fn in_order(gathered: Vec<Vec<u8>>) -> Result<Vec<MicroBatchPart>, Failure> {
    let mut parts = Vec::with_capacity(gathered.len());
    for (rank, bytes) in gathered.iter().enumerate() {
        match decode("part of a rank", bytes, MAX_PART) {
            Ok(RankPart::Computed { first, micro_batches }) => parts.push((first, micro_batches)),
            Ok(RankPart::Failed { error, blame }) => return Err(Failure { error, blame }),
            Err(e) => {
                return Err(Failure::environment(ErrorKind::Internal, format!("from rank {rank}: {e}")));
            }
        }
    }
    // A rank without micro-batches stands anywhere: it adds nothing.
    parts.sort_by_key(|(first, _)| *first);
    Ok(parts.into_iter().flat_map(|(_, micro_batches)| micro_batches).collect())
}

/// The result, from parts that are merged in micro-batch order whoever computed them.
fn output(loss: &LossSpec, micro_batches: Vec<MicroBatchPart>) -> ForwardBackwardOutput {
    let mut whole = MicroBatchOutput::default();
    for part in micro_batches {
        whole.merge(part.into());
    }
    whole.finish(loss)
}

fn tokens(examples: &[Example]) -> u64 {
    examples.iter().map(|example| example.tokens() as u64).sum()
}

fn as_usize(range: &Range<u32>) -> Range<usize> {
    range.start as usize..range.end as usize
}

impl From<MicroBatchOutput> for MicroBatchPart {
    fn from(output: MicroBatchOutput) -> Self {
        let MicroBatchOutput { loss_sum, active, outputs, sums, maxima } = output;
        Self { loss_sum, active, sums, maxima, outputs }
    }
}

impl From<MicroBatchPart> for MicroBatchOutput {
    fn from(part: MicroBatchPart) -> Self {
        let MicroBatchPart { loss_sum, active, sums, maxima, outputs } = part;
        Self { loss_sum, active, outputs, sums, maxima }
    }
}

impl From<CollectiveError> for Failure {
    fn from(error: CollectiveError) -> Self {
        let kind = match &error {
            CollectiveError::Deadline { .. } => ErrorKind::DeadlineExceeded,
            _ => ErrorKind::Unavailable,
        };
        let blame = error.missing().map_or(Blame::Environment, Blame::Peer);
        Self { error: OperationError::new(kind, error.to_string()), blame }
    }
}
