//! Text to tokens and back, and conversations to prompts.

pub(super) mod byte_level;
mod chat;
mod gguf;

use std::collections::HashMap;

use tokenizers::{DecoderWrapper, Tokenizer};

use self::chat::ChatTemplate;
use super::ModelError;

/// Largest tokenizer.json that is parsed, in bytes; Llama 3's has 17 MB.
const MAX_TOKENIZER_BYTES: usize = 64 << 20;

/// A model's tokenizer and chat template.
pub struct TextCodec {
    tokenizer: Tokenizer,
    json: String,
    /// Added tokens stand for their own text, not for byte-level characters.
    added: HashMap<u32, String>,
    spelling: Spelling,
    template: Option<ChatTemplate>,
    bos: Option<String>,
    eos: Option<String>,
}

/// One message of a conversation.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct ChatMessage {
    pub role: String,
    pub content: String,
}

/// How the vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's alphabet: one printable character a byte.
    ByteLevel,
    /// SentencePiece: `▁` for a blank, `<0x0A>` for a byte that is no character.
    SentencePiece,
}

impl TextCodec {
    /// From the text of a tokenizer.json and an optional chat template (Jinja).
    ///
    /// A template that can't be compiled is no error here, but when it is used: the model
    /// trains all the same.
    pub fn new(tokenizer_json: &str, chat_template: Option<String>) -> Result<Self, ModelError> {
        if tokenizer_json.len() > MAX_TOKENIZER_BYTES {
            let size = tokenizer_json.len();
            return Err(tokenizer_error(format!("{size} bytes; at most {MAX_TOKENIZER_BYTES} are read")));
        }
        let mut tokenizer: Tokenizer = tokenizer_json.parse().map_err(tokenizer_error)?;
        // Whoever saved the file may have left these on; a service never cuts or fills a prompt.
        tokenizer.with_truncation(None).map_err(tokenizer_error)?;
        tokenizer.with_padding(None);
        let spelling = Spelling::of(tokenizer.get_decoder()).ok_or_else(|| {
            tokenizer_error("its decoder is neither ByteLevel nor SentencePiece's (ByteFallback, Metaspace)")
        })?;
        let added = tokenizer.get_added_tokens_decoder();
        Ok(Self {
            added: added.into_iter().map(|(id, token)| (id, token.content)).collect(),
            tokenizer,
            json: tokenizer_json.to_owned(),
            spelling,
            template: chat_template.map(ChatTemplate::new),
            bos: None,
            eos: None,
        })
    }

    /// The same with the texts that a chat template calls `bos_token` and `eos_token`.
    pub fn with_special_tokens(mut self, bos: Option<String>, eos: Option<String>) -> Self {
        (self.bos, self.eos) = (bos, eos);
        self
    }

    /// What a chat template calls `bos_token`.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos.as_deref()
    }

    /// What a chat template calls `eos_token`.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos.as_deref()
    }

    /// Token ids of `text`; special tokens in it are recognised, none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(tokenizer_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `tokens`; special tokens are left out if `skip_special`.
    ///
    /// Bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        // The decoders of this family don't fail; what one might refuse is spelt out byte by byte.
        self.tokenizer.decode(tokens, skip_special).unwrap_or_else(|_| {
            let bytes: Vec<u8> = tokens.iter().flat_map(|&token| self.token_bytes(token)).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }

    /// Raw bytes that a token stands for (byte-level), for stop texts that span tokens. Nothing
    /// for an id outside the vocabulary.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        if let Some(text) = self.added.get(&token) {
            return text.as_bytes().to_vec();
        }
        let Some(piece) = self.tokenizer.id_to_token(token) else { return Vec::new() };
        match self.spelling {
            Spelling::ByteLevel => byte_level::bytes_of(&piece).unwrap_or_else(|| piece.into_bytes()),
            Spelling::SentencePiece => sentence_piece_bytes(&piece),
        }
    }

    /// The id of a token by its exact spelling in the vocabulary, special tokens among them.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The prompt of a conversation by the model's own template.
    pub fn apply_chat_template(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, ModelError> {
        let template = self.template.as_ref().ok_or(ModelError::NoChatTemplate)?;
        template.render(messages, add_generation_prompt, self.bos.as_deref(), self.eos.as_deref())
    }

    /// The chat template's source (Jinja), if the model has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_ref().map(ChatTemplate::source)
    }

    /// The tokenizer.json it was made from.
    pub fn tokenizer_json(&self) -> &str {
        &self.json
    }

    /// Refuses a tokenizer that makes ids which the model has no embedding for.
    pub(super) fn check_vocabulary(&self, vocab_size: usize) -> Result<(), ModelError> {
        let highest = self.tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        if highest as usize >= vocab_size {
            let problem = format!("has the token id {highest}; the model's vocabulary ends at {vocab_size}");
            return Err(tokenizer_error(problem));
        }
        Ok(())
    }
}

impl std::fmt::Debug for TextCodec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let vocabulary = self.tokenizer.get_vocab_size(true);
        f.debug_struct("TextCodec").field("vocabulary", &vocabulary).finish_non_exhaustive()
    }
}

impl Spelling {
    fn of(decoder: Option<&DecoderWrapper>) -> Option<Self> {
        match decoder? {
            DecoderWrapper::ByteLevel(_) => Some(Self::ByteLevel),
            DecoderWrapper::Metaspace(_) | DecoderWrapper::ByteFallback(_) => Some(Self::SentencePiece),
            DecoderWrapper::Sequence(parts) => {
                parts.get_decoders().iter().find_map(|part| Self::of(Some(part)))
            }
            _ => None,
        }
    }
}

fn sentence_piece_bytes(piece: &str) -> Vec<u8> {
    let hex = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    match hex.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => piece.replace('▁', " ").into_bytes(),
    }
}

fn tokenizer_error(problem: impl ToString) -> ModelError {
    ModelError::Tokenizer { problem: problem.to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn byte_level() -> Value {
        let text = tiny_json();
        serde_json::from_str(&text).unwrap()
    }

    fn tiny_json() -> String {
        crate::model::tiny::tokenizer_json().to_string()
    }

    /// Llama 2's kind: blanks as `▁`, bytes as `<0xNN>`.
    fn sentence_piece() -> TextCodec {
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [{
                "id": 1, "content": "</s>", "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false,
            }],
            "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
            "pre_tokenizer": null, "post_processor": null,
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
                { "type": "ByteFallback" }, { "type": "Fuse" },
            ] },
            "model": {
                "type": "BPE", "unk_token": "<unk>", "byte_fallback": true,
                "vocab": { "<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "▁a": 4, "<0xF0>": 5, "<0x9F>": 6, "<0x8E>": 7, "<0x89>": 8 },
                "merges": [["▁", "a"]],
            },
        });
        TextCodec::new(&json.to_string(), None).unwrap()
    }

    #[test]
    fn encodes_special_tokens_but_adds_none() {
        let mut json = byte_level();
        // Options that whoever saved the file may have left on.
        json["truncation"] =
            json!({ "max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right" });
        json["padding"] = json!({
            "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        });
        json["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<|endoftext|>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<|endoftext|>": { "id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"] } },
        });
        let text = TextCodec::new(&json.to_string(), None).unwrap();
        assert_eq!(text.encode("abc<|im_end|>").unwrap(), [100, 101, 102, 2]);
        assert_eq!(text.encode("").unwrap(), [0; 0]);
        assert_eq!(text.decode(&[100, 2, 101, 9999], false), "a<|im_end|>b");
        assert_eq!(text.decode(&[100, 2, 101], true), "ab");
        assert_eq!(text.token_id("<|im_end|>"), Some(2));
    }

    #[test]
    fn spells_tokens_in_bytes() {
        let text = TextCodec::new(&tiny_json(), None).unwrap();
        for byte in 0..=255 {
            assert_eq!(text.token_bytes(3 + u32::from(byte)), [byte]);
        }
        assert_eq!(text.token_bytes(2), b"<|im_end|>");
        assert_eq!(text.token_bytes(259), b"");
        // A character cut in two is shown as such, and whole as itself.
        let ids = text.encode("é").unwrap();
        assert_eq!(text.decode(&ids, false), "é");
        assert_eq!(text.decode(&ids[..1], false), "\u{fffd}");
    }

    #[test]
    fn added_tokens_stand_for_their_own_text() {
        let mut json = byte_level();
        // "Ã" is a character of the byte alphabet, for 0xC3; the added token means the letter.
        json["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": 259, "content": "Ã b", "special": false, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false,
        }));
        let text = TextCodec::new(&json.to_string(), None).unwrap();
        assert_eq!(text.encode("Ã b").unwrap(), [259]);
        assert_eq!(text.token_bytes(259), "Ã b".as_bytes());
        assert_eq!(text.decode(&[259], true), "Ã b");
    }

    #[test]
    fn spells_sentence_pieces_in_bytes() {
        let text = sentence_piece();
        assert_eq!(text.encode("a a🎉").unwrap(), [3, 4, 5, 6, 7, 8]);
        assert_eq!(text.decode(&[3, 4, 5, 6, 7, 8], false), "a a🎉");
        assert_eq!(text.token_bytes(4), b" a");
        assert_eq!(text.token_bytes(5), [0xF0]);
        assert_eq!(text.token_bytes(1), b"</s>");
    }

    #[test]
    fn refuses_what_is_no_tokenizer() {
        for json in ["", "{}", "[]", "{\"model\": {\"type\": \"BPE\"}}"] {
            assert!(matches!(TextCodec::new(json, None), Err(ModelError::Tokenizer { .. })), "{json}");
        }
        let mut json = byte_level();
        json["decoder"] = json!({ "type": "WordPiece", "prefix": "##", "cleanup": true });
        let error = TextCodec::new(&json.to_string(), None).unwrap_err();
        assert!(error.to_string().contains("neither ByteLevel nor"), "{error}");
        let long = " ".repeat(MAX_TOKENIZER_BYTES + 1);
        assert!(TextCodec::new(&long, None).unwrap_err().to_string().contains("are read"));
    }

    #[test]
    fn a_model_without_a_template_says_so() {
        let text = TextCodec::new(&tiny_json(), None).unwrap();
        assert_eq!(text.apply_chat_template(&[], true), Err(ModelError::NoChatTemplate));
        let broken = TextCodec::new(&tiny_json(), Some("{% for %}".to_owned())).unwrap();
        assert!(matches!(broken.apply_chat_template(&[], true), Err(ModelError::ChatTemplate { .. })));
        assert_eq!(broken.encode("a").unwrap(), [100], "it trains all the same");
    }
}
