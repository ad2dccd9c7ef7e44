//! Checks of what clients send, as far as they need no tensor. Each refusal names the field,
//! the bound and the value.

use crate::{
    protocol::{ModelOffer, Operation, Payload},
    types::{CheckpointPath, InvalidInput, LoraConfig, LoraTarget, ModelInput, ModelInputChunk},
};

use super::checkpoints::LoadPath;

/// Largest adapter rank: above it full fine-tuning is cheaper.
const LORA_RANK_MAX: u32 = 1_024;

/// Longest display name of a run, or name of an owner, in bytes.
const DISPLAY_NAME_MAX: usize = 255;

/// Longest life that a checkpoint can be given beside an endless one: ten years.
const TTL_MAX_SECONDS: u64 = 10 * 365 * 24 * 3_600;

/// `min..=max`, for a field that callers know by `field`.
pub(super) fn in_range(field: &str, value: u32, min: u32, max: u32) -> Result<(), InvalidInput> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(InvalidInput::new(field, format!("must be {min} to {max}, got {value}")))
}

/// Whom a session belongs to.
pub(super) fn owner(owner: &str) -> Result<(), InvalidInput> {
    if owner.is_empty() || owner.len() > DISPLAY_NAME_MAX {
        let problem = format!("must be 1 to {DISPLAY_NAME_MAX} bytes, got {}", owner.len());
        return Err(InvalidInput::new("owner", problem));
    }
    Ok(())
}

/// An adapter's configuration, whatever the model.
pub(super) fn lora(lora: &LoraConfig) -> Result<(), InvalidInput> {
    lora.validate().map_err(|e| e.within("lora"))?;
    in_range("lora.rank", lora.rank, 1, LORA_RANK_MAX)
}

/// That an adapter's rank fits the model's dimensions.
pub(super) fn rank(lora: &LoraConfig, offer: &ModelOffer) -> Result<(), InvalidInput> {
    let bounds = LoraTarget::ALL.into_iter().zip(offer.lora_rank_max);
    let adapted = bounds.filter(|(target, _)| lora.targets.contains(target));
    match adapted.min_by_key(|(_, bound)| *bound) {
        Some((target, bound)) if lora.rank > bound => {
            let problem = format!(
                "must be at most {bound}, the smaller dimension of `{}` in {:?}, got {}",
                target.name(),
                offer.name,
                lora.rank
            );
            Err(InvalidInput::new("lora.rank", problem))
        }
        _ => Ok(()),
    }
}

/// A run's display name: as given, or the base model.
pub(super) fn display_name(given: Option<String>, base_model: &str) -> Result<String, InvalidInput> {
    let name = given.unwrap_or_else(|| base_model.to_owned());
    if name.is_empty() || name.len() > DISPLAY_NAME_MAX {
        let problem = format!("must be 1 to {DISPLAY_NAME_MAX} bytes, got {}", name.len());
        return Err(InvalidInput::new("name", problem));
    }
    Ok(name)
}

/// An operation, before it is journaled; leaves what ranks alone can see to them.
pub(super) fn operation(operation: &mut Operation) -> Result<(), InvalidInput> {
    match operation {
        Operation::Init { lora: config } => lora(config),
        Operation::Forward { loss, data } | Operation::ForwardBackward { loss, data } => {
            loss.validate()?;
            payload(data)
        }
        Operation::OptimStep { adam } => adam.validate().map_err(|e| e.within("adam_params")),
        Operation::SaveState { name, ttl_seconds }
        | Operation::SaveWeightsForSampler { name, ttl_seconds, .. } => {
            ttl(*ttl_seconds)?;
            CheckpointPath::validate_name(name)
        }
        Operation::LoadState { path, with_optimizer, source } => {
            // Only the coordinator says which bytes a name means.
            *source = None;
            LoadPath::parse(path, *with_optimizer).map(drop)
        }
    }
}

/// How long a checkpoint is to live.
fn ttl(seconds: Option<u64>) -> Result<(), InvalidInput> {
    match seconds {
        Some(seconds) if !(1..=TTL_MAX_SECONDS).contains(&seconds) => {
            let problem = format!("must be 1 to {TTL_MAX_SECONDS}, or absent to keep it, got {seconds}");
            Err(InvalidInput::new("ttl_seconds", problem))
        }
        _ => Ok(()),
    }
}

fn payload(payload: &Payload) -> Result<(), InvalidInput> {
    use crate::protocol::MAX_INLINE_PAYLOAD;
    match payload {
        Payload::Inline(bytes) if bytes.is_empty() => Err(InvalidInput::new("data", "is empty")),
        Payload::Inline(bytes) if bytes.len() > MAX_INLINE_PAYLOAD => {
            let problem =
                format!("inline payload of {} bytes is over {MAX_INLINE_PAYLOAD}; store a blob", bytes.len());
            Err(InvalidInput::new("data", problem))
        }
        Payload::Inline(_) | Payload::Blob(_) => Ok(()),
    }
}

/// The token ids of a prompt: text only, not empty, shorter than the context.
pub(super) fn prompt(prompt: ModelInput, vocab: u32, context: u32) -> Result<Vec<u32>, InvalidInput> {
    let mut tokens = Vec::new();
    for (i, chunk) in prompt.chunks.into_iter().enumerate() {
        match chunk {
            ModelInputChunk::EncodedText(chunk) => tokens.extend(chunk.tokens),
            ModelInputChunk::Image(_) => {
                let field = format!("prompt.chunks[{i}]");
                return Err(InvalidInput::new(field, "is an image, and this model has no vision"));
            }
        }
    }
    if tokens.is_empty() {
        return Err(InvalidInput::new("prompt", "is empty; at least 1 token is needed"));
    }
    if tokens.len() >= context as usize {
        let problem = format!("must be shorter than the context of {context} tokens, got {}", tokens.len());
        return Err(InvalidInput::new("prompt", problem));
    }
    match tokens.iter().position(|token| *token >= vocab) {
        None => Ok(tokens),
        Some(i) => {
            let problem = format!("token id {} is outside the vocabulary of {vocab}", tokens[i]);
            Err(InvalidInput::new(format!("prompt[{i}]"), problem))
        }
    }
}
