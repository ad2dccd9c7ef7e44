mod crash;
mod model;
mod opening;
mod queue;
mod recovery;
mod refusals;
mod way;

use std::{collections::BTreeMap, path::Path, sync::mpsc};

use crate::{
    protocol::{
        BlobRef, CreateRun, Epoch, LoadSource, Operation, OperationKey, OperationResult, OperationSeq,
        Payload, SavedFile,
    },
    types::{
        AdamParams, Checkpoint, CheckpointId, CheckpointTarget, Digest, ErrorKind, LoraConfig, LoraTarget,
        LossFn, LossSpec, OperationError, OptimStepResponse, PolicyId, RunId, SaveWeightsResponse, SessionId,
    },
};

use super::*;

/// Appends and waits for the disk.
fn write(journal: &Journal, records: Vec<Record>) -> Result<(), JournalError> {
    let (answer, answered) = mpsc::channel();
    journal.append(records, Box::new(move |outcome| answer.send(outcome).unwrap()));
    answered.recv().unwrap()
}

/// What is in the directory, with the journal closed again.
fn recover(directory: &Path) -> Recovered {
    let (journal, recovered) = Journal::open(directory).unwrap();
    journal.close();
    recovered
}

/// The blobs of [`blob`] that rows name, by digest.
fn named(directory: &Path) -> Vec<BlobRef> {
    let (journal, _) = Journal::open(directory).unwrap();
    let mut all: Vec<BlobRef> = (0..=u8::MAX).map(blob).collect();
    let (answer, answered) = mpsc::channel();
    let digests = all.iter().map(|blob| blob.digest).collect();
    journal.unnamed(digests, move |unnamed| answer.send(unnamed).unwrap());
    let unnamed = answered.recv().unwrap().unwrap();
    journal.close();
    all.retain(|blob| !unnamed.contains(&blob.digest));
    all.sort_by_key(|blob| blob.digest);
    all
}

fn by_digest(numbers: impl IntoIterator<Item = u8>) -> Vec<BlobRef> {
    let mut blobs: Vec<BlobRef> = numbers.into_iter().map(blob).collect();
    blobs.sort_by_key(|blob| blob.digest);
    blobs
}

fn blob(n: u8) -> BlobRef {
    BlobRef { digest: Digest::of(&[n]), size: u64::from(n) }
}

/// Of some sessions.
fn owner(session: u64) -> Option<String> {
    session.is_multiple_of(2).then(|| format!("owner {session}"))
}

fn session(n: u64) -> Record {
    Record::Session { session: SessionId(n), owner: owner(n), created_at_ms: 1_700_000_000_000 }
}

fn create(session: u64) -> CreateRun {
    CreateRun {
        session: SessionId(session),
        base_model: "org/model".into(),
        lora: LoraConfig { rank: 8, alpha: 32.0, seed: u64::MAX, targets: vec![LoraTarget::QProj] },
        replicas: Some(2),
        max_seq_len: None,
        micro_batch_tokens: Some(1024),
        name: Some("a run".into()),
    }
}

fn run(n: u64) -> Record {
    Record::Run {
        run: RunId(n),
        create: create(1),
        model_digest: Digest::of(b"model"),
        key: None,
        created_at_ms: 5,
    }
}

fn operation(run: u64, seq: u64, key: u8, operation: Operation) -> Record {
    Record::Operation {
        run: RunId(run),
        seq: OperationSeq(seq),
        key: OperationKey([key; 16]),
        incarnation: 1,
        operation,
    }
}

fn step() -> Operation {
    Operation::OptimStep { adam: AdamParams::default() }
}

fn forward_backward(data: Payload) -> Operation {
    let loss = LossSpec {
        loss_fn: LossFn::CrossEntropy,
        config: BTreeMap::from([("beta".into(), 0.05)]),
        skip_token_normalization: false,
        top_k_logprobs: 3,
    };
    Operation::ForwardBackward { loss, data }
}

fn done(run: u64, seq: u64, result: OperationResult) -> Record {
    let outcome = Outcome::Done { result, state: Digest::of(b"state"), step: seq };
    Record::Outcome { run: RunId(run), seq: OperationSeq(seq), outcome }
}

fn stepped() -> OperationResult {
    OperationResult::OptimStep(OptimStepResponse { metrics: BTreeMap::from([("step".into(), 1.0)]) })
}

fn failed(run: u64, seq: u64) -> Record {
    let error = OperationError::new(ErrorKind::NotFinite, "the loss is not finite");
    Record::Outcome { run: RunId(run), seq: OperationSeq(seq), outcome: Outcome::Failed { error } }
}

fn snapshot(run: u64, seq: u64, n: u8) -> Record {
    Record::Snapshot { run: RunId(run), seq: OperationSeq(seq), snapshot: blob(n), standing: standing(seq) }
}

fn standing(seq: u64) -> Standing {
    Standing { incarnation: 2, step: seq, lora: LoraConfig::new(4, seq) }
}

fn policy(run: u64, step: u64) -> PolicyId {
    PolicyId { run: RunId(run), incarnation: 1, step, digest: Digest::of(&step.to_le_bytes()) }
}

fn slot(run: u64, step: u64, n: u8) -> Record {
    Record::Slot { policy: policy(run, step), base_model: "org/model".into(), adapter: blob(n) }
}

fn checkpoint(id: u64, run: u64, target: CheckpointTarget, name: &str) -> Checkpoint {
    Checkpoint {
        id: CheckpointId(id),
        run_id: RunId(run),
        checkpoint_id: name.into(),
        checkpoint_type: "lora".into(),
        target,
        created_at_ms: 7,
        base_model: "org/model".into(),
        lora_rank: 8,
        lora_alpha: 32.0,
        expires_at_ms: None,
        step: 1,
        size_bytes: 3,
        path: format!("bt://loops:run-{run}/weights/{name}"),
    }
}

fn saved(id: u64, run: u64, target: CheckpointTarget, name: &str, blobs: &[u8]) -> Record {
    let files = blobs.iter().map(|n| SavedFile { name: format!("file-{n}"), blob: blob(*n) }).collect();
    let policy = (target == CheckpointTarget::Sampler).then(|| policy(run, 1));
    let published = target == CheckpointTarget::Sampler && id.is_multiple_of(2);
    let checkpoint = checkpoint(id, run, target, name);
    Record::Checkpoint(SavedCheckpoint { checkpoint, files, policy, published })
}
