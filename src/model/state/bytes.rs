use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    model::{
        AdapterError, LoraLayout, ModelConfig,
        lora::bytes::{Reader, Tensor, write},
    },
    types::{Digest, Hasher, LoraConfig},
};

use super::{GradientKind, TrainState};

/// Version of [`TrainState::to_bytes`] and of the header that [`digest`] covers.
const VERSION: u32 = 1;

/// Everything of a state that is no vector.
#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    lora: LoraConfig,
    step: u64,
    moment_steps: u64,
    tokens: u64,
    kind: Option<GradientKind>,
}

/// The metadata of a state file.
#[derive(Serialize, Deserialize)]
struct Metadata {
    #[serde(flatten)]
    header: Header,
    /// [`digest`] of the state.
    digest: Digest,
}

impl Header {
    fn of(state: &TrainState) -> Self {
        Self {
            version: VERSION,
            lora: state.layout.config.clone(),
            step: state.step,
            moment_steps: state.moment_steps,
            tokens: state.tokens,
            kind: state.kind,
        }
    }
}

/// SHA-256 over the header as JSON and the digests of the vectors, in a fixed order. The JSON
/// of a struct is canonical: fields in order, numbers in their shortest form.
pub(super) fn digest(state: &TrainState) -> Digest {
    // A struct of numbers, strings and lists always has a JSON form.
    let header = serde_json::to_vec(&Header::of(state)).expect("a header is plain data");
    let mut hasher = Hasher::default();
    hasher.update(b"lockstep train state 1\0");
    hasher.update(&(header.len() as u64).to_le_bytes());
    hasher.update(&header);
    for vector in [&state.weights, &state.m, &state.v].into_iter().chain(&state.gradient) {
        hasher.update(&vector.digest().0);
    }
    hasher.finish()
}

impl TrainState {
    /// Canonical bytes: a safetensors file with the flat float32 vectors `weights`, `m`, `v`
    /// and, if anything is accumulated, `gradient`, each `[layout.len()]`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let named = [("weights", &self.weights), ("m", &self.m), ("v", &self.v)];
        let tensors = named.into_iter().chain(self.gradient.iter().map(|gradient| ("gradient", gradient)));
        let tensors = tensors
            .map(|(name, vector)| (name.to_owned(), Tensor { shape: vec![vector.len()], values: vector }))
            .collect();
        write(tensors, &Metadata { header: Header::of(self), digest: self.digest() })
    }

    /// Reads [`TrainState::to_bytes`], checking lengths against the model, values, counts and
    /// the digest.
    pub fn from_bytes(model: &ModelConfig, bytes: &[u8]) -> Result<Self, AdapterError> {
        let reader = Reader::new(bytes)?;
        let Metadata { header, digest: expected } = reader.metadata(VERSION)?;
        let layout = LoraLayout::new(model, &header.lora)?;
        Self::read(&reader, layout, header, expected)
    }

    /// Checks what can be checked of [`TrainState::to_bytes`] without its model: everything but
    /// that the lengths are the model's. Returns the adapter's configuration and the step.
    pub fn check_bytes(bytes: &[u8]) -> Result<(LoraConfig, u64), AdapterError> {
        let reader = Reader::new(bytes)?;
        let Metadata { header, digest: expected } = reader.metadata(VERSION)?;
        let len = reader.shape("weights")?.iter().product();
        let layout = LoraLayout::of_length(&header.lora, len)?;
        let state = Self::read(&reader, layout, header, expected)?;
        Ok((state.layout.config.clone(), state.step))
    }

    fn read(
        reader: &Reader<'_>,
        layout: LoraLayout,
        header: Header,
        expected: Digest,
    ) -> Result<Self, AdapterError> {
        let shape = [layout.len()];
        let finite = |name| {
            let mut values = Vec::with_capacity(layout.len());
            reader.read_finite(name, &shape, &mut values).map(|()| values)
        };
        let (weights, m, v) = (finite("weights")?, finite("m")?, finite("v")?);
        let gradient = if reader.has("gradient") {
            // May hold infinities: it is the next optim_step that refuses them.
            let mut values = Vec::with_capacity(layout.len());
            reader.read("gradient", &shape, &mut values)?;
            Some(values)
        } else {
            None
        };
        reader.refuse_unknown(|name| ["weights", "m", "v", "gradient"].contains(&name))?;
        if gradient.is_some() != header.kind.is_some() {
            return Err(AdapterError::Inconsistent("a gradient and its kind go together"));
        }
        if header.tokens > 0 && matches!(header.kind, Some(GradientKind::Sum) | None) {
            return Err(AdapterError::Inconsistent("only gradients for a mean count tokens or pairs"));
        }
        if header.moment_steps > header.step {
            return Err(AdapterError::Inconsistent("the moments have seen more steps than the weights"));
        }
        if v.iter().any(|value| *value < 0.0) {
            return Err(AdapterError::Inconsistent("a second moment is negative"));
        }
        let state = Self {
            layout: Arc::new(layout),
            weights: weights.into(),
            m: m.into(),
            v: v.into(),
            moment_steps: header.moment_steps,
            gradient: gradient.map(Into::into),
            tokens: header.tokens,
            kind: header.kind,
            step: header.step,
        };
        let found = state.digest();
        if found != expected {
            return Err(AdapterError::Altered { expected, found });
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{fresh, gradient},
        *,
    };
    use crate::{model::lora::layout::tests::tiny_model, types::AdamParams};

    /// A state in the middle of things: moments, a gradient, counts.
    fn busy() -> TrainState {
        let state = fresh();
        let state = state.accumulate(&gradient(&state, 1), 3, GradientKind::TokenMean).unwrap();
        let (state, _) = state.optim_step(&AdamParams::default()).unwrap();
        state.accumulate(&gradient(&state, 2), 5, GradientKind::TokenMean).unwrap()
    }

    fn read(state: &TrainState) -> Result<TrainState, AdapterError> {
        TrainState::from_bytes(&tiny_model(), &state.to_bytes())
    }

    #[test]
    fn bytes_round_trip_and_are_deterministic() {
        for state in [fresh(), busy()] {
            let back = read(&state).unwrap();
            assert_eq!(back, state);
            assert_eq!(back.digest(), state.digest());
            assert!(back.to_bytes() == state.to_bytes());
        }
    }

    #[test]
    fn a_restored_state_goes_on_to_the_same_bits() {
        let state = busy();
        let (on, _) = state.optim_step(&AdamParams::default()).unwrap();
        let (restored, _) = read(&state).unwrap().optim_step(&AdamParams::default()).unwrap();
        assert_eq!(restored.digest(), on.digest());
    }

    #[test]
    fn digest_covers_every_part() {
        let state = busy();
        let mut others = vec![state.without_gradient()];
        let flip = |vector: &crate::model::ParamVector| {
            let mut values = vector.to_vec();
            values[1] = -values[1] - 1.0;
            crate::model::ParamVector::from(values)
        };
        others.push(TrainState { weights: flip(&state.weights), ..state.clone() });
        others.push(TrainState { m: flip(&state.m), ..state.clone() });
        others.push(TrainState { v: flip(&state.v), ..state.clone() });
        others.push(TrainState { gradient: state.gradient.as_ref().map(flip), ..state.clone() });
        others.push(TrainState { moment_steps: 9, ..state.clone() });
        others.push(TrainState { tokens: 9, ..state.clone() });
        others.push(TrainState { step: 9, ..state.clone() });
        others.push(TrainState { kind: Some(GradientKind::Sum), ..state.clone() });
        for (i, other) in others.iter().enumerate() {
            assert_ne!(other.digest(), state.digest(), "variation {i}");
        }
    }

    #[test]
    fn an_infinite_gradient_survives_the_round_trip() {
        let state = fresh();
        let (gradient, kind) = (vec![f32::INFINITY; state.layout.len()], Some(GradientKind::TokenMean));
        let state = TrainState { gradient: Some(gradient.into()), tokens: 1, kind, ..state };
        assert_eq!(read(&state).unwrap(), state);
    }

    #[test]
    fn refuses_a_truncated_file() {
        let bytes = busy().to_bytes();
        for end in [0, 5, 200, bytes.len() - 4] {
            let error = TrainState::from_bytes(&tiny_model(), &bytes[..end]).unwrap_err();
            assert!(matches!(error, AdapterError::File(_)), "{end}");
        }
    }

    #[test]
    fn refuses_an_altered_value() {
        let mut bytes = busy().to_bytes();
        let last = bytes.len() - 4;
        bytes[last] ^= 1;
        let error = TrainState::from_bytes(&tiny_model(), &bytes).unwrap_err();
        assert!(matches!(error, AdapterError::Altered { .. }), "{error}");
    }

    #[test]
    fn without_its_model_a_file_is_checked_as_strictly() {
        let bytes = busy().to_bytes();
        assert_eq!(TrainState::check_bytes(&bytes).unwrap(), (busy().layout.config.clone(), 1));
        let mut altered = bytes.clone();
        *altered.last_mut().unwrap() ^= 1;
        assert!(matches!(TrainState::check_bytes(&altered), Err(AdapterError::Altered { .. })));
        assert!(matches!(TrainState::check_bytes(&bytes[..bytes.len() - 4]), Err(AdapterError::File(_))));
    }

    #[test]
    fn refuses_an_adapter_file() {
        let error = TrainState::from_bytes(&tiny_model(), &busy().adapter().to_bytes()).unwrap_err();
        assert!(matches!(error, AdapterError::Metadata(_)), "{error}");
    }

    #[test]
    fn refuses_the_lengths_of_another_model() {
        let other = ModelConfig { num_layers: 1, ..tiny_model() };
        let error = TrainState::from_bytes(&other, &busy().to_bytes()).unwrap_err();
        assert!(matches!(error, AdapterError::Shape { .. }), "{error}");
    }

    #[test]
    fn refuses_weights_and_moments_that_are_no_numbers() {
        let state = busy();
        let nan: crate::model::ParamVector = vec![f32::NAN; state.layout.len()].into();
        let poisoned = [
            TrainState { weights: nan.clone(), ..state.clone() },
            TrainState { m: nan.clone(), ..state.clone() },
            TrainState { v: nan, ..state.clone() },
        ];
        for state in poisoned {
            assert!(matches!(read(&state), Err(AdapterError::NotFinite { index: 0, .. })));
        }
    }

    #[test]
    fn refuses_counts_that_contradict_each_other() {
        let state = busy();
        let contradictions = [
            TrainState { kind: None, tokens: 0, ..state.clone() },
            TrainState { gradient: None, ..state.clone() },
            TrainState { kind: Some(GradientKind::Sum), ..state.clone() },
            TrainState { moment_steps: 2, ..state.clone() },
            TrainState { v: vec![-1.0; state.layout.len()].into(), ..state.clone() },
        ];
        for (i, state) in contradictions.iter().enumerate() {
            assert!(matches!(read(state), Err(AdapterError::Inconsistent(_))), "{i}");
        }
    }
}
