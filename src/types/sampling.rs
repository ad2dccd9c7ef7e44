use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, SeqAccess, Visitor},
};

use super::InvalidInput;

/// Most stop texts or stop tokens of a request: each is looked for after every token.
pub const MAX_STOPS: usize = 64;

/// Longest stop text, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;

/// Most alternatives reported for a position.
pub const MAX_TOPK_LOGPROBS: u32 = 20;

/// Where generation stops, beside the model's own end-of-sequence token.
///
/// In JSON a string, a list of strings, or a list of token ids; an empty list is
/// `Texts([])` and stops nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Stop {
    /// Stops after the token that completes this text.
    Text(String),
    /// Stops after the first of these texts.
    Texts(Vec<String>),
    /// Stops after the first of these token ids, which is kept.
    Tokens(Vec<u32>),
}

impl Stop {
    /// Refuses an empty text (it would stop everything at once), a text longer than
    /// [`MAX_STOP_BYTES`] and more than [`MAX_STOPS`].
    pub fn validate(&self) -> Result<(), InvalidInput> {
        let texts = match self {
            Self::Text(text) => std::slice::from_ref(text),
            Self::Texts(texts) => texts.as_slice(),
            Self::Tokens(_) => &[],
        };
        let count = match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Text(_) | Self::Texts(_) => texts.len(),
        };
        if count > MAX_STOPS {
            return Err(InvalidInput::new("stop", format!("at most {MAX_STOPS} are taken, got {count}")));
        }
        match texts.iter().map(String::len).find(|len| !(1..=MAX_STOP_BYTES).contains(len)) {
            None => Ok(()),
            Some(len) => Err(InvalidInput::new(
                "stop",
                format!("a text must have 1 to {MAX_STOP_BYTES} bytes, got one of {len}"),
            )),
        }
    }
}

/// How tokens are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// Divides the logits; finite and at least 0. 0 takes the most likely token (the lowest id on
    /// a tie).
    pub temperature: f64,
    /// Smallest set of tokens whose probabilities reach this sum; in (0, 1].
    pub top_p: f64,
    /// Only the k most likely tokens, at least 1; -1 (or absent) is off.
    pub top_k: i64,
    /// Most tokens to generate, at least 1; absent: to the end of the context.
    pub max_tokens: Option<u32>,
    /// Same seed, request and weights give the same tokens; absent: a fresh one is drawn.
    pub seed: Option<u64>,
    /// Extra stop conditions.
    pub stop: Option<Stop>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: -1, max_tokens: None, seed: None, stop: None }
    }
}

impl SamplingParams {
    /// Refuses values outside the ranges that the fields state.
    pub fn validate(&self) -> Result<(), InvalidInput> {
        // Comparisons with NaN are false, so it is refused by each of these.
        if !(0.0..f64::INFINITY).contains(&self.temperature) {
            let problem = format!("must be a finite number of at least 0, got {}", self.temperature);
            return Err(InvalidInput::new("temperature", problem));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let problem = format!("must be above 0 and at most 1, got {}", self.top_p);
            return Err(InvalidInput::new("top_p", problem));
        }
        if self.top_k < 1 && self.top_k != -1 {
            let problem = format!("must be at least 1, or -1 for off, got {}", self.top_k);
            return Err(InvalidInput::new("top_k", problem));
        }
        if self.max_tokens == Some(0) {
            return Err(InvalidInput::new("max_tokens", "must be at least 1, got 0"));
        }
        self.stop.as_ref().map_or(Ok(()), Stop::validate)
    }
}

/// What a sample request wants reported beside the tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SampleFlags {
    /// Report each prompt token's log-probability.
    pub prompt_logprobs: bool,
    /// Report this many most likely tokens at each prompt position; 0 to 20.
    pub topk_prompt_logprobs: u32,
}

impl SampleFlags {
    /// Refuses more than [`MAX_TOPK_LOGPROBS`] alternatives.
    pub fn validate(&self) -> Result<(), InvalidInput> {
        match self.topk_prompt_logprobs {
            0..=MAX_TOPK_LOGPROBS => Ok(()),
            k => Err(InvalidInput::new(
                "topk_prompt_logprobs",
                format!("must be 0 to {MAX_TOPK_LOGPROBS}, got {k}"),
            )),
        }
    }
}

// Not derived: an untagged enum says only that nothing matched.
impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;

        impl<'de> Visitor<'de> for StopVisitor {
            type Value = Stop;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of strings, or a list of token ids")
            }

            fn visit_str<E>(self, text: &str) -> Result<Stop, E> {
                Ok(Stop::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Stop, A::Error> {
                let (mut texts, mut tokens) = (Vec::new(), Vec::new());
                while let Some(entry) = list.next_element()? {
                    match entry {
                        Entry::Text(text) => texts.push(text),
                        Entry::Token(token) => tokens.push(token),
                    }
                }
                match (texts.is_empty(), tokens.is_empty()) {
                    (_, true) => Ok(Stop::Texts(texts)),
                    (true, false) => Ok(Stop::Tokens(tokens)),
                    (false, false) => Err(A::Error::custom("stop mixes strings and token ids")),
                }
            }
        }

        deserializer.deserialize_any(StopVisitor)
    }
}

/// One entry of a list of stops.
enum Entry {
    Text(String),
    Token(u32),
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntryVisitor;

        impl Visitor<'_> for EntryVisitor {
            type Value = Entry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a token id")
            }

            fn visit_str<E>(self, text: &str) -> Result<Entry, E> {
                Ok(Entry::Text(text.to_owned()))
            }

            fn visit_u64<E: Error>(self, token: u64) -> Result<Entry, E> {
                u32::try_from(token)
                    .map(Entry::Token)
                    .map_err(|_| E::custom(format!("stop token {token} is over the limit of {}", u32::MAX)))
            }
        }

        deserializer.deserialize_any(EntryVisitor)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(change: impl FnOnce(&mut SamplingParams)) -> String {
        let mut params = SamplingParams::default();
        change(&mut params);
        params.validate().unwrap_err().field
    }

    fn stop(value: serde_json::Value) -> Stop {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_defaults_and_the_bounds_are_accepted() {
        SamplingParams::default().validate().unwrap();
        let bounds = SamplingParams {
            temperature: 0.0,
            top_p: f64::MIN_POSITIVE,
            top_k: 1,
            max_tokens: Some(1),
            seed: Some(0),
            stop: Some(Stop::Texts(vec!["x".repeat(MAX_STOP_BYTES); MAX_STOPS])),
        };
        bounds.validate().unwrap();
        SampleFlags { prompt_logprobs: true, topk_prompt_logprobs: 20 }.validate().unwrap();
    }

    #[test]
    fn a_negative_or_non_finite_temperature_is_refused() {
        for temperature in [-0.1, f64::NAN, f64::INFINITY] {
            assert_eq!(refused(|params| params.temperature = temperature), "temperature");
        }
    }

    #[test]
    fn top_p_outside_zero_to_one_is_refused() {
        for top_p in [0.0, -0.5, 1.01, f64::NAN] {
            assert_eq!(refused(|params| params.top_p = top_p), "top_p");
        }
    }

    #[test]
    fn top_k_of_zero_or_below_minus_one_is_refused() {
        for top_k in [0, -2] {
            assert_eq!(refused(|params| params.top_k = top_k), "top_k");
        }
    }

    #[test]
    fn max_tokens_of_zero_is_refused() {
        assert_eq!(refused(|params| params.max_tokens = Some(0)), "max_tokens");
    }

    #[test]
    fn an_empty_stop_text_is_refused() {
        assert_eq!(refused(|params| params.stop = Some(Stop::Text(String::new()))), "stop");
        assert_eq!(refused(|params| params.stop = Some(Stop::Texts(vec!["a".into(), "".into()]))), "stop");
    }

    #[test]
    fn a_stop_text_over_the_limit_is_refused() {
        let long = "x".repeat(MAX_STOP_BYTES + 1);
        assert_eq!(refused(|params| params.stop = Some(Stop::Text(long))), "stop");
    }

    #[test]
    fn more_stops_than_the_limit_are_refused() {
        assert_eq!(refused(|params| params.stop = Some(Stop::Tokens(vec![1; MAX_STOPS + 1]))), "stop");
        let texts = vec!["a".to_owned(); MAX_STOPS + 1];
        assert_eq!(refused(|params| params.stop = Some(Stop::Texts(texts))), "stop");
    }

    #[test]
    fn more_alternatives_than_the_limit_are_refused() {
        let flags = SampleFlags { prompt_logprobs: false, topk_prompt_logprobs: 21 };
        assert_eq!(flags.validate().unwrap_err().field, "topk_prompt_logprobs");
    }

    #[test]
    fn stops_are_read_in_each_form() {
        assert_eq!(stop(json!("END")), Stop::Text("END".into()));
        assert_eq!(stop(json!(["a", "b"])), Stop::Texts(vec!["a".into(), "b".into()]));
        assert_eq!(stop(json!([1, 2])), Stop::Tokens(vec![1, 2]));
        assert_eq!(stop(json!([])), Stop::Texts(vec![]));
        Stop::Texts(vec![]).validate().unwrap();
    }

    #[test]
    fn stops_are_written_as_they_are_read() {
        for value in [json!("END"), json!(["a"]), json!([7]), json!([])] {
            assert_eq!(serde_json::to_value(stop(value.clone())).unwrap(), value);
        }
    }

    #[test]
    fn stops_of_two_kinds_or_another_one_are_refused() {
        for value in
            [json!(["a", 1]), json!([1, "a"]), json!([-1]), json!([1.5]), json!(7), json!([4294967296u64])]
        {
            let message = serde_json::from_value::<Stop>(value).unwrap_err().to_string();
            assert!(message.contains("stop") || message.contains("token id"), "{message}");
        }
    }

    #[test]
    fn absent_fields_take_the_defaults() {
        let params: SamplingParams = serde_json::from_value(json!({"max_tokens": 5})).unwrap();
        assert_eq!(params, SamplingParams { max_tokens: Some(5), ..SamplingParams::default() });
    }
}
