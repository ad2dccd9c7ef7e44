//! The passes of sampling, wherever the model is: on the CPU (`decoder/`) or on a GPU (`device/`).

use std::sync::Arc;

use super::{
    AdapterRows, BaseModel, Batch, BatchSequence, HeadRequest, HeadScores, KvCache, Place, Workspace,
    decoder::{forward, head_logits, head_logprobs},
    device::{self, DeviceAdapter, DeviceCache, DeviceModel, DeviceSequence},
    draw::{self, Decoding, DrawBuffers, DrawKey, Drawn, NotFinite, Wanted},
};
use crate::{
    gpu::{Array, GpuError},
    kernels::{Team, log_sum_exp},
};

/// Keys and values of one sequence's past positions, where its model is.
pub enum SequenceCache {
    Cpu(KvCache),
    Gpu(DeviceCache),
}

/// One sequence's new rows: they follow those in its cache, and are appended to it.
pub struct SequenceRows<'a> {
    /// At least one.
    pub tokens: &'a [u32],
    pub cache: &'a mut SequenceCache,
    /// Absent: the base model.
    pub adapter: Option<AdapterRows<'a>>,
}

/// A row that a token is drawn from.
#[derive(Clone, Copy)]
pub struct DrawRow<'a> {
    /// Of the hidden states.
    pub row: usize,
    /// The adapter that computed it; absent: the base model.
    pub adapter: Option<AdapterRows<'a>>,
    pub decoding: Decoding,
    pub key: DrawKey,
}

/// The final hidden states of a batch, where its model is.
pub enum HiddenStates {
    /// `[rows, hidden]`
    Cpu(Vec<f32>),
    Gpu(Array),
}

impl SequenceCache {
    /// An empty cache.
    pub fn new(model: &BaseModel) -> Self {
        match &model.place {
            Place::Cpu(_) => Self::Cpu(KvCache::new(&model.config)),
            Place::Gpu(_) => Self::Gpu(DeviceCache::default()),
        }
    }

    /// Another sequence with the same past.
    pub fn fork(&self) -> Self {
        match self {
            Self::Cpu(cache) => Self::Cpu(cache.fork()),
            Self::Gpu(cache) => Self::Gpu(cache.fork()),
        }
    }
}

/// Runs the decoder over sequences with caches. On a GPU, takes a turn; an error there leaves the caches of
/// these sequences of no use.
///
/// # Panics
///
/// If a cache was made for a model in another place.
pub fn extend(
    model: &BaseModel,
    sequences: Vec<SequenceRows<'_>>,
    workspace: &mut Workspace,
    team: &Team,
) -> Result<HiddenStates, GpuError> {
    match &model.place {
        Place::Cpu(_) => {
            let sequences = sequences.into_iter().map(|SequenceRows { tokens, cache, adapter }| {
                let SequenceCache::Cpu(cache) = cache else { unreachable!("a cache of a GPU") };
                BatchSequence { tokens, kv_cache: Some(cache), adapter }
            });
            let mut batch = Batch { sequences: sequences.collect() };
            Ok(HiddenStates::Cpu(forward(model, &mut batch, None, workspace, team)))
        }
        Place::Gpu(device) => {
            let _turn = device.gpu().turn();
            let sequences = sequences.into_iter().map(|SequenceRows { tokens, cache, adapter }| {
                let SequenceCache::Gpu(cache) = cache else { unreachable!("a cache of a CPU") };
                Ok(DeviceSequence { tokens, cache: Some(cache), adapter: on_device(device, adapter)? })
            });
            let mut sequences = sequences.collect::<Result<Vec<_>, GpuError>>()?;
            Ok(HiddenStates::Gpu(device::forward(device, &mut sequences, None)?))
        }
    }
}

/// Draws one token from each of the rows, where the model is; a GPU leaves rows with `top_k` or `top_p` to the
/// host. Log-probabilities have the bits that [`logprobs_of`] gives for the same logits.
///
/// # Panics
///
/// If the hidden states are those of a model in another place.
pub fn draw_rows(
    model: &BaseModel,
    hidden: &HiddenStates,
    rows: &[DrawRow<'_>],
    buffers: &mut DrawBuffers,
    workspace: &mut Workspace,
    team: &Team,
) -> Result<Vec<Result<Drawn, NotFinite>>, GpuError> {
    let DrawBuffers { logits_sv, kept } = buffers;
    let wanted = |row: &DrawRow<'_>| Wanted { decoding: row.decoding, uniform: row.key.uniform() };
    let wanted: Vec<Wanted> = rows.iter().map(wanted).collect();
    match (&model.place, hidden) {
        (Place::Cpu(_), HiddenStates::Cpu(hidden)) => {
            let rows: Vec<_> = rows.iter().map(|row| (row.row, row.adapter)).collect();
            head_logits(model, hidden, &rows, logits_sv, workspace, team);
            Ok(draw::draw_rows(logits_sv, &wanted, |_, logits_v| log_sum_exp(logits_v), kept, team))
        }
        (Place::Gpu(device), HiddenStates::Gpu(hidden)) => {
            let (mut drawn, left) = {
                let _turn = device.gpu().turn();
                let rows = rows.iter().map(|row| Ok((row.row, on_device(device, row.adapter)?)));
                let rows = rows.collect::<Result<Vec<_>, GpuError>>()?;
                device::draw_rows(device, hidden, &rows, &wanted, logits_sv)?
            };
            // Others may use the GPU meanwhile.
            let wanted: Vec<Wanted> = left.rows.iter().map(|row| wanted[*row]).collect();
            let on_host = draw::draw_rows(logits_sv, &wanted, |row, _| left.lse[row], kept, team);
            left.rows.iter().zip(on_host).for_each(|(row, result)| drawn[*row] = result);
            Ok(drawn)
        }
        _ => unreachable!("hidden states of a model in another place"),
    }
}

/// Log-probabilities of chosen targets, of rows that `adapter` computed.
pub fn logprobs_of(
    model: &BaseModel,
    adapter: Option<AdapterRows<'_>>,
    hidden: &HiddenStates,
    request: HeadRequest<'_>,
    workspace: &mut Workspace,
    team: &Team,
) -> Result<HeadScores, GpuError> {
    match (&model.place, hidden) {
        (Place::Cpu(_), HiddenStates::Cpu(hidden)) => {
            Ok(head_logprobs(model, adapter, hidden, request, None, workspace, team))
        }
        (Place::Gpu(device), HiddenStates::Gpu(hidden)) => {
            let _turn = device.gpu().turn();
            device::head_logprobs(device, on_device(device, adapter)?.as_deref(), hidden, request, None)
        }
        _ => unreachable!("hidden states of a model in another place"),
    }
}

fn on_device(
    device: &DeviceModel,
    adapter: Option<AdapterRows<'_>>,
) -> Result<Option<Arc<DeviceAdapter>>, GpuError> {
    adapter.map(|adapter| device.adapter(adapter)).transpose()
}
