use super::ModelError;

/// A model's tokenizer and chat template.
pub struct TextCodec {}

/// One message of a conversation.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct ChatMessage {
    pub role: String,
    pub content: String,
}

impl TextCodec {
    /// From the text of a tokenizer.json and an optional chat template (Jinja).
    pub fn new(tokenizer_json: &str, chat_template: Option<String>) -> Result<Self, ModelError> {
        let _ = (tokenizer_json, chat_template);
        todo!()
    }

    /// Token ids of `text`; special tokens in it are recognised, none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let _ = text;
        todo!()
    }

    /// Text of `tokens`; special tokens are left out if `skip_special`.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        let _ = (tokens, skip_special);
        todo!()
    }

    /// Raw bytes that a token stands for (byte-level), for stop texts that span tokens.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        let _ = token;
        todo!()
    }

    /// The prompt of a conversation by the model's own template.
    pub fn apply_chat_template(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, ModelError> {
        let _ = (messages, add_generation_prompt);
        todo!()
    }

    /// The tokenizer.json it was made from.
    pub fn tokenizer_json(&self) -> &str {
        todo!()
    }
}
