//! A sample as an OpenAI-like completion, which is what the client reads.

use bytes::Bytes;
use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::types::{SampleResult, SampledSequence, StopReason};

use super::super::refusal::Refused;

/// An answer, written.
#[derive(Debug, Clone)]
pub struct Completion {
    pub json: Bytes,
    pub policy_version: u64,
}

#[derive(Serialize)]
struct Body<'a> {
    object: &'static str,
    choices: Vec<Choice<'a>>,
    usage: Usage,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'static str,
    token_ids: Vec<u32>,
    logprobs: Logprobs,
    finish_reason: &'static str,
    prompt_token_ids: &'a [u32],
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<PromptLogprobs<'a>>>>,
}

#[derive(Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

/// At one position: the k most likely tokens in descending order, then the actual one if it is
/// not among them. The client keeps this order, so it is no sorted map.
struct PromptLogprobs<'a> {
    alternatives: &'a [(u32, f32)],
    actual: (u32, f32),
}

#[derive(Serialize)]
struct Scored {
    logprob: f32,
    /// Place among all tokens, from 1; not known outside the most likely ones.
    rank: Option<usize>,
    decoded_token: &'static str,
}

impl Completion {
    /// The answer to a prompt of `prompt`.
    pub fn of(prompt: &[u32], result: SampleResult) -> Result<Self, Refused> {
        let completion_tokens = result.sequences.iter().map(|sequence| sequence.tokens.len()).sum();
        let mut scores = prompt_scores(prompt, &result);
        let choices = result.sequences.iter().enumerate();
        // The client takes the scores of the first choice that has some.
        let choices = choices.map(|(index, sequence)| Choice::of(index, prompt, sequence, scores.take()));
        let body = Body {
            object: "text_completion",
            choices: choices.collect(),
            usage: Usage {
                prompt_tokens: prompt.len(),
                completion_tokens,
                total_tokens: prompt.len() + completion_tokens,
            },
        };
        let json = serde_json::to_vec(&body).map_err(|e| Refused::fault(format!("a sample as JSON: {e}")))?;
        Ok(Self { json: json.into(), policy_version: result.policy_version })
    }
}

impl<'a> Choice<'a> {
    /// The client takes a completion that begins with the prompt's tokens for an echo of the prompt
    /// and drops that many. So where a model really repeats its prompt, a copy goes before it.
    fn of(
        index: usize,
        prompt: &'a [u32],
        sequence: &SampledSequence,
        prompt_logprobs: Option<Vec<Option<PromptLogprobs<'a>>>>,
    ) -> Self {
        let repeats = !prompt.is_empty() && sequence.tokens.starts_with(prompt);
        let copy = if repeats { prompt } else { &[] };
        let token_ids = [copy, &sequence.tokens].concat();
        let logprobs = sequence.logprobs.iter().flatten().copied().map(Some);
        Self {
            index,
            text: "",
            logprobs: Logprobs {
                tokens: token_ids.iter().map(|token| format!("token_id:{token}")).collect(),
                token_logprobs: copy.iter().map(|_| None).chain(logprobs).collect(),
            },
            token_ids,
            finish_reason: match sequence.stop_reason {
                StopReason::Stop => "stop",
                StopReason::Length => "length",
            },
            prompt_token_ids: prompt,
            prompt_logprobs,
        }
    }
}

fn prompt_scores<'a>(prompt: &[u32], result: &'a SampleResult) -> Option<Vec<Option<PromptLogprobs<'a>>>> {
    let actual = result.prompt_logprobs.as_ref()?.iter().zip(prompt).enumerate();
    let alternatives =
        |i: usize| result.topk_prompt_logprobs.as_ref().and_then(|rows| rows.get(i)?.as_deref());
    let scores = actual.map(|(i, (logprob, token))| {
        let actual = (*token, (*logprob)?);
        Some(PromptLogprobs { alternatives: alternatives(i).unwrap_or_default(), actual })
    });
    Some(scores.collect())
}

impl Serialize for PromptLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let scored = |logprob, rank| Scored { logprob, rank, decoded_token: "" };
        let mut map = serializer.serialize_map(None)?;
        for (i, (token, logprob)) in self.alternatives.iter().enumerate() {
            map.serialize_entry(&token.to_string(), &scored(*logprob, Some(i + 1)))?;
        }
        let (token, logprob) = self.actual;
        if self.alternatives.iter().all(|(other, _)| *other != token) {
            map.serialize_entry(&token.to_string(), &scored(logprob, None))?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn sequence(tokens: &[u32]) -> SampledSequence {
        let logprobs = Some(vec![-0.5; tokens.len()]);
        SampledSequence { tokens: tokens.to_vec(), logprobs, stop_reason: StopReason::Length }
    }

    fn written(prompt: &[u32], result: SampleResult) -> Value {
        serde_json::from_slice(&Completion::of(prompt, result).unwrap().json).unwrap()
    }

    fn result(sequences: Vec<SampledSequence>) -> SampleResult {
        SampleResult { sequences, policy_version: 3, prompt_logprobs: None, topk_prompt_logprobs: None }
    }

    #[test]
    fn a_completion_that_repeats_its_prompt_gets_a_copy_for_the_client_to_drop() {
        let body = written(&[7, 8], result(vec![sequence(&[7, 8, 9]), sequence(&[7, 9])]));
        let first = &body["choices"][0];
        assert_eq!(first["token_ids"], json!([7, 8, 7, 8, 9]));
        assert_eq!(first["logprobs"]["token_logprobs"], json!([null, null, -0.5, -0.5, -0.5]));
        assert_eq!(first["logprobs"]["tokens"][4], "token_id:9");
        assert_eq!(body["choices"][1]["token_ids"], json!([7, 9]));
        assert_eq!(body["usage"]["total_tokens"], 7);
        assert!(first.get("prompt_logprobs").is_none(), "nobody asked for them");
    }

    #[test]
    fn the_most_likely_tokens_come_first_and_the_actual_one_is_there() {
        let mut scored = result(vec![sequence(&[1]), sequence(&[2])]);
        scored.prompt_logprobs = Some(vec![None, Some(-4.0), Some(-0.25)]);
        scored.topk_prompt_logprobs =
            Some(vec![None, Some(vec![(90, -0.5), (10, -1.5)]), Some(vec![(6, -0.25), (5, -2.5)])]);
        let text = String::from_utf8(Completion::of(&[4, 5, 6], scored).unwrap().json.to_vec()).unwrap();
        let places =
            ["\"90\":", "\"10\":", "\"5\":{\"logprob\":-4.0,\"rank\":null"].map(|part| text.find(part));
        assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{text}");
        let body: Value = serde_json::from_str(&text).unwrap();
        let rows = &body["choices"][0]["prompt_logprobs"];
        assert_eq!((rows[0].clone(), rows[2].as_object().unwrap().len()), (Value::Null, 2));
        assert_eq!(rows[2]["6"], json!({ "logprob": -0.25, "rank": 1, "decoded_token": "" }));
        assert!(body["choices"][1].get("prompt_logprobs").is_none(), "once is enough");
    }
}
