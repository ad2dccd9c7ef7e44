use std::ops::Range;

use crate::{
    model::ModelConfig,
    types::{InvalidInput, LoraConfig, LoraTarget},
};

/// Where each LoRA matrix stands in one flat vector of f32.
///
/// Order: layer by layer, within a layer by [`LoraTarget`], A (`[rank, in]`) before B
/// (`[out, rank]`), row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraLayout {
    pub config: LoraConfig,
    pub entries: Vec<LoraEntry>,
    len: usize,
}

/// One adapted linear layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraEntry {
    pub layer: usize,
    pub target: LoraTarget,
    pub in_features: usize,
    pub out_features: usize,
    pub a: Range<usize>,
    pub b: Range<usize>,
}

impl LoraLayout {
    /// The layout of `config` on a model; refuses what [`LoraConfig::validate`] refuses, and
    /// ranks above the smallest dimension of an adapted layer.
    pub fn new(model: &ModelConfig, config: &LoraConfig) -> Result<Self, InvalidInput> {
        config.validate()?;
        let rank = config.rank as usize;
        let mut entries = Vec::with_capacity(model.num_layers * config.targets.len());
        let mut len = 0;
        for layer in 0..model.num_layers {
            for &target in &config.targets {
                let (in_features, out_features) = model.linear_shape(target);
                let bound = in_features.min(out_features);
                if rank > bound {
                    return Err(InvalidInput::new(
                        "rank",
                        format!(
                            "must be at most {bound}, the smaller dimension of this model's `{}`, got {rank}",
                            target.name()
                        ),
                    ));
                }
                let a = len..len + rank * in_features;
                let b = a.end..a.end + out_features * rank;
                len = b.end;
                entries.push(LoraEntry { layer, target, in_features, out_features, a, b });
            }
        }
        Ok(Self { config: config.clone(), entries, len })
    }

    /// Number of f32 values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is adapted: only a model without layers has such a layout.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The entry of a layer's target, if it carries an adapter.
    pub fn entry(&self, layer: usize, target: LoraTarget) -> Option<&LoraEntry> {
        // Entries are a dense grid of layers by targets, and the targets are sorted.
        let column = self.config.targets.binary_search(&target).ok()?;
        self.entries.get(layer * self.config.targets.len() + column)
    }

    /// `alpha / rank`.
    pub fn scale(&self) -> f32 {
        self.config.alpha / self.config.rank as f32
    }
}

impl ModelConfig {
    /// `(in_features, out_features)` of a block's linear layer.
    pub fn linear_shape(&self, target: LoraTarget) -> (usize, usize) {
        let queries = self.num_heads * self.head_dim;
        let keys = self.num_kv_heads * self.head_dim;
        match target {
            LoraTarget::QProj => (self.hidden_size, queries),
            LoraTarget::KProj | LoraTarget::VProj => (self.hidden_size, keys),
            LoraTarget::OProj => (queries, self.hidden_size),
            LoraTarget::GateProj | LoraTarget::UpProj => (self.hidden_size, self.intermediate_size),
            LoraTarget::DownProj => (self.intermediate_size, self.hidden_size),
        }
    }
}

impl LoraEntry {
    /// Name of the adapted linear layer in a Hugging Face model:
    /// `model.layers.3.self_attn.q_proj`.
    pub fn module_name(&self) -> String {
        format!("model.layers.{}.{}.{}", self.layer, self.target.parent(), self.target.name())
    }

    /// Names of A and B in a PEFT adapter file.
    pub fn tensor_names(&self) -> [String; 2] {
        let module = self.module_name();
        ["lora_A", "lora_B"].map(|matrix| format!("base_model.model.{module}.{matrix}.weight"))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::{Family, RopeScaling};

    /// Two layers, 4 query heads over 2 key/value heads of width 4.
    pub(crate) fn tiny_model() -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            vocab_size: 32,
            hidden_size: 12,
            intermediate_size: 20,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 4,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            rms_norm_eps: 1e-5,
            max_position_embeddings: 64,
            tie_word_embeddings: true,
            eos_token_ids: vec![0],
        }
    }

    #[test]
    fn entries_tile_the_vector_in_order() {
        let layout = LoraLayout::new(&tiny_model(), &LoraConfig::new(3, 0)).unwrap();
        let mut end = 0;
        for entry in &layout.entries {
            assert_eq!(entry.a.start, end);
            assert_eq!(entry.a.len(), 3 * entry.in_features);
            assert_eq!(entry.b.start, entry.a.end);
            assert_eq!(entry.b.len(), 3 * entry.out_features);
            end = entry.b.end;
        }
        assert_eq!(layout.len(), end);
        assert_eq!(layout.entries.len(), 14);
    }

    #[test]
    fn entry_finds_what_is_adapted_and_nothing_else() {
        let mut config = LoraConfig::new(2, 0);
        config.targets = vec![LoraTarget::KProj, LoraTarget::DownProj];
        let layout = LoraLayout::new(&tiny_model(), &config).unwrap();
        for entry in &layout.entries {
            assert_eq!(layout.entry(entry.layer, entry.target), Some(entry));
        }
        assert_eq!(layout.entry(0, LoraTarget::QProj), None);
        assert_eq!(layout.entry(2, LoraTarget::KProj), None);
    }

    #[test]
    fn shapes_follow_grouped_query_attention() {
        let layout = LoraLayout::new(&tiny_model(), &LoraConfig::new(2, 0)).unwrap();
        let shape = |target| {
            let entry = layout.entry(1, target).unwrap();
            (entry.in_features, entry.out_features)
        };
        assert_eq!(shape(LoraTarget::QProj), (12, 16));
        assert_eq!(shape(LoraTarget::VProj), (12, 8));
        assert_eq!(shape(LoraTarget::OProj), (16, 12));
        assert_eq!(shape(LoraTarget::UpProj), (12, 20));
        assert_eq!(shape(LoraTarget::DownProj), (20, 12));
    }

    #[test]
    fn scale_is_alpha_over_rank() {
        let layout = LoraLayout::new(&tiny_model(), &LoraConfig::new(8, 0)).unwrap();
        assert_eq!(layout.scale(), 4.0);
    }

    #[test]
    fn refuses_a_rank_above_the_smallest_dimension() {
        LoraLayout::new(&tiny_model(), &LoraConfig::new(8, 0)).unwrap();
        let error = LoraLayout::new(&tiny_model(), &LoraConfig::new(9, 0)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`rank`: must be at most 8, the smaller dimension of this model's `k_proj`, got 9"
        );
    }

    #[test]
    fn refuses_rank_zero() {
        assert_eq!(LoraLayout::new(&tiny_model(), &LoraConfig::new(0, 0)).unwrap_err().field, "rank");
    }
}
