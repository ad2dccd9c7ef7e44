//! What a request may take: arithmetic on bytes and positions, and the checks at admission.
//!
//! A prompt of `P` tokens is computed once, all but its last token: those `P - 1` rows are the
//! keys and values that the request's sequences share. Each sequence begins by feeding the last
//! prompt token, and never feeds the last token that it draws, so `N` new tokens add `N`
//! positions of its own:
//!
//! ```text
//!   positions  0 ……………… P-2 │ P-1 ……………… P+N-2
//!              shared       │ the sequence's own (and its copy of the last shared block,
//!                           │ if that one is not full)
//! ```
//!
//! Both are reserved when a sequence begins, as if it ran to its last token; so a sequence that
//! has begun always ends, and nothing is ever preempted.

use crate::{
    protocol::{Generate, MAX_MESSAGE},
    types::InvalidInput,
};

use super::error::SamplerError;

/// A model's figures, known before its weights are loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFacts {
    pub name: String,
    pub aliases: Vec<String>,
    /// Most positions of a sequence.
    pub context: usize,
    pub vocab: usize,
    /// Bytes of keys and values of one position, over all layers.
    pub kv_position_bytes: usize,
    /// Positions that are allocated, and shared between forks, together.
    pub kv_block: usize,
}

/// Bytes of KV cache that a request reserves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Once, with the first sequence, until the last one has ended.
    pub prompt_bytes: usize,
    /// For each sequence, until it has ended.
    pub sequence_bytes: usize,
}

/// Bytes of a generated token in an encoded answer: an id (at most 5) and a log-probability.
const TOKEN_BYTES: usize = 9;

/// New tokens that each sequence of `generate` may draw: `max_tokens`, capped by the context.
pub fn new_tokens(facts: &ModelFacts, generate: &Generate) -> usize {
    let room = facts.context.saturating_sub(generate.prompt.len());
    generate.params.max_tokens.map_or(room, |max| room.min(max as usize))
}

/// The reservation for a prompt and `new_tokens` of each sequence.
pub fn need(facts: &ModelFacts, prompt_tokens: usize, new_tokens: usize) -> Need {
    let shared = prompt_tokens.saturating_sub(1);
    let bytes =
        |positions: usize| positions.next_multiple_of(facts.kv_block).saturating_mul(facts.kv_position_bytes);
    Need { prompt_bytes: bytes(shared), sequence_bytes: bytes(shared % facts.kv_block + new_tokens) }
}

/// Checks everything about a request that needs no weights, and returns what it reserves.
pub fn check(facts: &ModelFacts, generate: &Generate, kv_bytes: usize) -> Result<Need, SamplerError> {
    check_prompt(facts, &generate.prompt)?;
    if generate.num_samples == 0 {
        return Err(InvalidInput::new("num_samples", "must be at least 1, got 0").into());
    }
    generate.params.validate().map_err(|error| error.within("params"))?;
    generate.flags.validate().map_err(|error| error.within("flags"))?;

    let new_tokens = new_tokens(facts, generate);
    let answer_bytes = answer_bytes(generate, new_tokens);
    if answer_bytes > MAX_MESSAGE {
        return Err(SamplerError::AnswerTooLarge { answer_bytes, max_bytes: MAX_MESSAGE });
    }
    let prompt_tokens = generate.prompt.len();
    let need = need(facts, prompt_tokens, new_tokens);
    let need_bytes = need.prompt_bytes.saturating_add(need.sequence_bytes);
    if need_bytes > kv_bytes {
        return Err(SamplerError::NeverFits { prompt_tokens, new_tokens, need_bytes, kv_bytes });
    }
    Ok(need)
}

fn check_prompt(facts: &ModelFacts, prompt: &[u32]) -> Result<(), InvalidInput> {
    let ModelFacts { context, vocab, .. } = *facts;
    if prompt.is_empty() {
        return Err(InvalidInput::new("prompt", "must hold at least one token"));
    }
    if prompt.len() >= context {
        let problem = format!("{} tokens leave no room in the context of {context}", prompt.len());
        return Err(InvalidInput::new("prompt", problem));
    }
    match prompt.iter().position(|&token| token as usize >= vocab) {
        None => Ok(()),
        Some(at) => {
            let problem = format!("token {} is outside the vocabulary of {vocab}", prompt[at]);
            Err(InvalidInput::new(format!("prompt[{at}]"), problem))
        }
    }
}

/// An upper bound on the encoded answer, so that no generation is lost for its size.
fn answer_bytes(generate: &Generate, new_tokens: usize) -> usize {
    let per_position = usize::from(generate.flags.prompt_logprobs) * TOKEN_BYTES
        + generate.flags.topk_prompt_logprobs as usize * TOKEN_BYTES;
    (generate.num_samples as usize)
        .saturating_mul(new_tokens.saturating_mul(TOKEN_BYTES).saturating_add(32))
        .saturating_add(generate.prompt.len().saturating_mul(per_position))
}

#[cfg(test)]
pub(super) mod tests {
    use crate::{
        protocol::RequestId,
        types::{ErrorKind, SampleFlags, SamplingParams, Stop},
    };

    use super::*;

    pub fn facts() -> ModelFacts {
        ModelFacts {
            name: "tiny".into(),
            aliases: vec!["small".into()],
            context: 64,
            vocab: 100,
            kv_position_bytes: 10,
            kv_block: 8,
        }
    }

    pub fn generate(prompt_tokens: usize, num_samples: u32, max_tokens: u32) -> Generate {
        Generate {
            request: RequestId(0),
            base_model: "tiny".into(),
            policy: None,
            prompt: vec![1; prompt_tokens],
            num_samples,
            params: SamplingParams { max_tokens: Some(max_tokens), ..SamplingParams::default() },
            seed: 0,
            flags: SampleFlags::default(),
        }
    }

    #[test]
    fn a_reservation_covers_whole_blocks_of_every_position_that_is_fed() {
        let facts = facts();
        // 16 shared positions are two full blocks; 3 new tokens feed 3 more.
        assert_eq!(need(&facts, 17, 3), Need { prompt_bytes: 160, sequence_bytes: 80 });
        // 17 shared: a fork copies the third block's one position and adds 8, so it needs two.
        assert_eq!(need(&facts, 18, 8), Need { prompt_bytes: 240, sequence_bytes: 160 });
        assert_eq!(need(&facts, 1, 1), Need { prompt_bytes: 0, sequence_bytes: 80 });
    }

    #[test]
    fn new_tokens_end_with_the_context() {
        let mut request = generate(60, 1, 10);
        assert_eq!(new_tokens(&facts(), &request), 4);
        request.params.max_tokens = Some(3);
        assert_eq!(new_tokens(&facts(), &request), 3);
        request.params.max_tokens = None;
        assert_eq!(new_tokens(&facts(), &request), 4);
    }

    #[test]
    fn a_request_that_never_fits_is_refused_with_the_figures() {
        let error = check(&facts(), &generate(17, 1, 20), 300).expect_err("400 bytes are needed");
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        let text = error.to_string();
        for figure in ["17", "20", "400", "300"] {
            assert!(text.contains(figure), "{text}");
        }
        assert!(check(&facts(), &generate(17, 1, 20), 400).is_ok());
    }

    #[test]
    fn an_answer_above_a_message_is_refused() {
        let facts = ModelFacts { context: 1 << 20, ..facts() };
        let error = check(&facts, &generate(8, 1000, 10_000), usize::MAX).expect_err("90 MB");
        assert!(matches!(error, SamplerError::AnswerTooLarge { .. }), "{error}");
    }

    #[test]
    fn each_value_out_of_range_is_refused_by_its_field() {
        let field = |change: fn(&mut Generate)| {
            let mut request = generate(3, 1, 4);
            change(&mut request);
            match check(&facts(), &request, usize::MAX) {
                Err(SamplerError::Invalid(invalid)) => invalid.field,
                other => panic!("expected an invalid field, got {other:?}"),
            }
        };
        assert_eq!(field(|g| g.prompt.clear()), "prompt");
        assert_eq!(field(|g| g.prompt = vec![1; 64]), "prompt");
        assert_eq!(field(|g| g.prompt[2] = 100), "prompt[2]");
        assert_eq!(field(|g| g.num_samples = 0), "num_samples");
        assert_eq!(field(|g| g.flags.topk_prompt_logprobs = 21), "flags.topk_prompt_logprobs");
        assert_eq!(field(|g| g.params.top_p = 2.0), "params.top_p");
        assert_eq!(field(|g| g.params.stop = Some(Stop::Text(String::new()))), "params.stop");
    }
}
