//! A training state small enough to think about: digests in place of tensors.

use lockstep::{
    journal::Outcome,
    protocol::{
        ADAPTER_FILE, BlobRef, Operation, OperationResult, Payload, STATE_FILE, Saved, SavedFile, encode,
    },
    types::{
        CheckpointTarget, Digest, ErrorKind, InitTrainerServerResponse, LoadWeightsResponse, OperationError,
        OptimStepResponse, RunId, SaveWeightsForSamplerResponse, SaveWeightsResponse,
    },
};

use super::blobs::Blobs;

/// A batch that every rank refuses.
pub const BAD_BATCH: u8 = 0xBA;
/// A batch whose gradient is not finite: the next `optim_step` fails and clears it.
pub const INFINITE_BATCH: u8 = 0x1F;

/// Each operation folds itself into the digests, so that a repeated, lost or misplaced one
/// shows in every later state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weights {
    pub weights: Digest,
    pub gradient: Option<Digest>,
    pub infinite: bool,
    pub step: u64,
}

/// What an operation makes of a state.
pub struct Computed {
    /// After a commit.
    pub next: Weights,
    pub result: OperationResult,
    pub saved: Option<Saved>,
}

impl Weights {
    pub fn fresh() -> Self {
        Self { weights: Digest::of(b"fresh"), gradient: None, infinite: false, step: 0 }
    }

    pub fn digest(&self) -> Digest {
        fold(&[&self.weights.0, &self.gradient.map_or([0; 32], |g| g.0), &self.step.to_le_bytes()])
    }

    fn without_gradient(&self) -> Self {
        Self { gradient: None, infinite: false, ..self.clone() }
    }

    /// Blobs are stored on the way.
    pub fn compute(
        &self,
        run: RunId,
        operation: &Operation,
        blobs: &mut Blobs,
    ) -> Result<Computed, OperationError> {
        let computed = |next, result, saved| Ok(Computed { next, result, saved });
        match operation {
            Operation::Init { lora } => {
                let weights = fold(&[b"init", &encode(lora)]);
                let next = Self { weights, ..Self::fresh() };
                let response = InitTrainerServerResponse { step: 0, lora_rank: lora.rank };
                computed(next, OperationResult::Init(response), None)
            }
            Operation::Forward { data, .. } | Operation::ForwardBackward { data, .. } => {
                let batch = batch(data);
                if batch[0] == BAD_BATCH {
                    return Err(OperationError::new(ErrorKind::InvalidInput, "a bad batch"));
                }
                let mut next = self.clone();
                if matches!(operation, Operation::ForwardBackward { .. }) {
                    next.gradient = Some(fold(&[&self.gradient.map_or([0; 32], |g| g.0), batch]));
                    next.infinite |= batch[0] == INFINITE_BATCH;
                }
                let output = Payload::Inline(fold(&[&self.weights.0, batch]).0.to_vec());
                computed(next, OperationResult::ForwardBackward(output), None)
            }
            Operation::OptimStep { .. } if self.infinite => {
                Err(OperationError::new(ErrorKind::NotFinite, "the gradient is not finite"))
            }
            Operation::OptimStep { adam } => {
                let gradient = self.gradient.map_or([0; 32], |g| g.0);
                let weights = fold(&[&self.weights.0, &gradient, &encode(adam)]);
                let next = Self { weights, step: self.step + 1, ..self.without_gradient() };
                let response = OptimStepResponse { metrics: [("step".into(), next.step as f64)].into() };
                computed(next, OperationResult::OptimStep(response), None)
            }
            Operation::SaveState { name, .. } => {
                let saved = self.without_gradient();
                let blob = blobs.put(saved.clone());
                let path = format!("bt://loops:{run}/weights/{name}");
                let result = OperationResult::SaveState(SaveWeightsResponse { path });
                computed(self.clone(), result, Some(file(STATE_FILE, blob, saved.digest())))
            }
            Operation::SaveWeightsForSampler { name, .. } => {
                let adapter = Self { step: 0, ..self.without_gradient() };
                let blob = blobs.put(adapter);
                let path = format!("bt://loops:{run}/sampler_weights/{name}");
                let response = SaveWeightsForSamplerResponse { path, version: self.step };
                let result = OperationResult::SaveWeightsForSampler(response);
                computed(self.clone(), result, Some(file(ADAPTER_FILE, blob, self.weights)))
            }
            Operation::LoadState { with_optimizer, source, .. } => {
                let source = source.expect("the coordinator resolves every load");
                let mut next = blobs.get(source.blob).clone();
                if source.target == CheckpointTarget::Sampler || !with_optimizer {
                    next.step = 0;
                }
                let response = LoadWeightsResponse { step: next.step };
                computed(next, OperationResult::LoadState(response), None)
            }
        }
    }

    /// The state after a failure.
    pub fn after_failure(&self, operation: &Operation, error: &OperationError) -> Self {
        match (operation, error.kind) {
            (Operation::OptimStep { .. }, ErrorKind::NotFinite) => self.without_gradient(),
            _ => self.clone(),
        }
    }

    /// The state after a journaled outcome, computed from the journal alone: what any rank at
    /// any time must agree with.
    pub fn follow(&mut self, run: RunId, operation: &Operation, outcome: &Outcome, blobs: &mut Blobs) {
        match outcome {
            Outcome::Done { result, state, step } => {
                let again = self.compute(run, operation, blobs).expect("a journaled success fails");
                assert_eq!(again.next.digest(), *state, "{run}: {operation:?} left another state");
                assert_eq!(again.next.step, *step, "{run}: {operation:?} left another step");
                assert_eq!(again.result, *result, "{run}: {operation:?} returned something else");
                *self = again.next;
            }
            Outcome::Failed { error } => *self = self.after_failure(operation, error),
        }
    }
}

fn file(name: &str, blob: BlobRef, digest: Digest) -> Saved {
    Saved { digest, files: vec![SavedFile { name: name.to_owned(), blob }] }
}

fn batch(data: &Payload) -> &[u8] {
    match data {
        Payload::Inline(bytes) => bytes,
        Payload::Blob(_) => panic!("the simulated clients send inline payloads"),
    }
}

fn fold(parts: &[&[u8]]) -> Digest {
    Digest::of(&parts.concat())
}
