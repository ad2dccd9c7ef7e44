/// The architectures that Lockstep computes.
///
/// All are decoders with RMSNorm before attention and MLP, rotary embedding, grouped queries
/// and SwiGLU; what sets them apart is asked of the family, so that no part of the decoder
/// compares names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3 and what took their form, SmolLM2 among them.
    Llama,
    /// Qwen2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen3: queries and keys are normed head by head before they turn.
    Qwen3,
    /// Qwen3's mixture of experts.
    Qwen3Moe,
}

impl Family {
    pub(super) const ALL: [Self; 4] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Qwen3Moe];

    /// Whether q, k and v add a bias.
    pub fn has_qkv_bias(self) -> bool {
        self == Self::Qwen2
    }

    /// Whether each head of q and k passes an RMSNorm of its own before the rotary embedding.
    pub fn has_qk_norm(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Qwen3Moe)
    }

    /// Whether a router sends each row to some of many MLPs.
    pub fn has_experts(self) -> bool {
        self == Self::Qwen3Moe
    }

    /// `model_type` of a config.json.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3_moe",
        }
    }

    /// What `architectures` of a config.json calls the language model.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Qwen3Moe => "Qwen3MoeForCausalLM",
        }
    }

    /// `general.architecture` of a GGUF file, which is the prefix of its keys too.
    pub fn gguf_architecture(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
        }
    }

    /// The family that a format calls `name`.
    pub(super) fn of(name: &str, called: fn(Self) -> &'static str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| called(*family) == name)
    }

    /// All names that a format has for them, for messages.
    pub(super) fn names(called: fn(Self) -> &'static str) -> String {
        Self::ALL.map(|family| format!("{:?}", called(family))).join(", ")
    }
}
