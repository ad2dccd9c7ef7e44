//! Where a sequence ends, beside its length: stop tokens and stop texts.

use crate::types::Stop;

/// A request's stop conditions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopRules {
    /// The model's end-of-sequence tokens and the request's own.
    tokens: Vec<u32>,
    texts: Vec<Vec<u8>>,
}

/// What one sequence remembers of its text: the end, which a stop text may have begun in.
#[derive(Debug, Clone, Default)]
pub struct StopScan {
    tail: Vec<u8>,
}

impl StopRules {
    /// The model's end-of-sequence tokens, and what a request with a [valid](Stop::validate)
    /// `stop` adds: none of its texts is empty.
    pub fn new(eos_tokens: &[u32], stop: Option<&Stop>) -> Self {
        let mut rules = Self { tokens: eos_tokens.to_vec(), texts: Vec::new() };
        match stop {
            None => {}
            Some(Stop::Tokens(tokens)) => rules.tokens.extend(tokens),
            Some(Stop::Text(text)) => rules.texts.push(text.clone().into_bytes()),
            Some(Stop::Texts(texts)) => {
                rules.texts.extend(texts.iter().map(|text| text.clone().into_bytes()));
            }
        }
        rules
    }

    /// Whether the sequence ends with `token`, the next after those that `scan` has seen. `bytes`
    /// gives the token's text, asked for only if there are stop texts.
    pub fn ends_with(&self, scan: &mut StopScan, token: u32, bytes: impl FnOnce() -> Vec<u8>) -> bool {
        if self.tokens.contains(&token) {
            return true;
        }
        let Some(longest) = self.texts.iter().map(Vec::len).max() else { return false };
        let tail = &mut scan.tail;
        tail.extend(bytes());
        if self.texts.iter().any(|text| tail.windows(text.len()).any(|window| window == text)) {
            return true;
        }
        // A text that isn't complete can have begun in the last `longest - 1` bytes at most.
        tail.drain(..tail.len().saturating_sub(longest - 1));
        false
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn texts(texts: &[&str]) -> StopRules {
        let texts = texts.iter().map(ToString::to_string).collect();
        StopRules::new(&[2], Some(&Stop::Texts(texts)))
    }

    /// Index of the piece at which the sequence ends.
    fn end(rules: &StopRules, pieces: &[&[u8]]) -> Option<usize> {
        let mut scan = StopScan::default();
        pieces.iter().position(|piece| rules.ends_with(&mut scan, 100, || piece.to_vec()))
    }

    #[test]
    fn end_of_sequence_and_stop_tokens_end_it() {
        let rules = StopRules::new(&[2], Some(&Stop::Tokens(vec![7, 8])));
        let mut scan = StopScan::default();
        let mut ends = |token| rules.ends_with(&mut scan, token, || unreachable!("no stop texts"));
        assert!(ends(2) && ends(7) && ends(8));
        assert!(!ends(9));
    }

    #[test]
    fn a_text_that_spans_tokens_is_found_at_the_token_that_completes_it() {
        let rules = texts(&["</answer>"]);
        assert_eq!(end(&rules, &[b"x </", b"ans", b"wer", b"> tail", b"more"]), Some(3));
        assert_eq!(end(&rules, &[b"x </answer", b"", b">"]), Some(2));
        assert_eq!(end(&rules, &[b"one piece </answer> and on"]), Some(0));
        assert_eq!(end(&rules, &[b"</answer", b"</answer", b"."]), None);
    }

    #[test]
    fn a_character_cut_between_tokens_is_found() {
        let rules = texts(&["é"]);
        assert_eq!(end(&rules, &[&[0xC3], &[0xA9]]), Some(1));
    }

    proptest! {
        #[test]
        fn it_ends_where_the_whole_text_first_contains_a_stop(
            pieces in prop::collection::vec(prop::collection::vec(b'a'..b'd', 0..4), 0..30),
            stops in prop::collection::vec(prop::collection::vec(b'a'..b'd', 1..6), 1..3),
        ) {
            let rules = StopRules { tokens: vec![], texts: stops.clone() };
            let slices: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let slow = (1..=pieces.len()).find(|&count| {
                let text = pieces[..count].concat();
                stops.iter().any(|stop| text.windows(stop.len()).any(|w| w == stop))
            });
            prop_assert_eq!(end(&rules, &slices), slow.map(|count| count - 1));
        }
    }
}
