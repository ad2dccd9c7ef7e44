use std::ops::Range;

use crate::{
    model::ModelConfig,
    types::{InvalidInput, LoraConfig, LoraTarget},
};

use super::AdapterError;

/// Where each LoRA matrix stands in one flat vector of f32.
///
/// Order: layer by layer, within a layer by [`LoraTarget`], within a target by expert where the
/// layer has several, the head last; A (`[rank, in]`) before B (`[out, rank]`), row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraLayout {
    pub config: LoraConfig,
    pub entries: Vec<LoraEntry>,
    /// Where the entries of each block's targets begin, and the end of the last.
    starts: Vec<usize>,
    len: usize,
}

/// One adapted linear layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraEntry {
    /// Which block's; [`LoraEntry::HEAD`]: none's, the head's.
    pub layer: usize,
    pub target: LoraTarget,
    /// Which expert's, if the layer's MLP is a mixture of experts.
    pub expert: Option<usize>,
    pub in_features: usize,
    pub out_features: usize,
    pub a: Range<usize>,
    pub b: Range<usize>,
}

impl LoraLayout {
    /// The layout of `config` on a model; refuses what [`LoraConfig::validate`] refuses, ranks
    /// above the smallest dimension of an adapted layer, and one of gate and up without the other
    /// on a mixture of experts, because transformers holds an expert's two as one.
    pub fn new(model: &ModelConfig, config: &LoraConfig) -> Result<Self, InvalidInput> {
        config.validate()?;
        let has = |target| config.targets.contains(&target);
        if model.experts.is_some() && has(LoraTarget::GateProj) != has(LoraTarget::UpProj) {
            let problem = "must name both of `gate_proj` and `up_proj` or neither on a mixture of experts";
            return Err(InvalidInput::new("targets", problem));
        }
        let rank = config.rank as usize;
        let mut layout = Self::empty(config);
        let shape = |layer: usize, target: LoraTarget| {
            let (in_features, out_features) = model.linear_shape(layer, target);
            let bound = in_features.min(out_features);
            if rank > bound {
                let name = target.name();
                let problem = format!(
                    "must be at most {bound}, the smaller dimension of this model's `{name}`, got {rank}"
                );
                return Err(InvalidInput::new("rank", problem));
            }
            Ok((in_features, out_features))
        };
        for layer in 0..model.num_layers {
            for target in layout.of_block().to_vec() {
                let (in_features, out_features) = shape(layer, target)?;
                let experts = model.layer_experts(layer).filter(|_| target.parent() == Some("mlp"));
                let experts = experts.map_or(vec![None], |experts| (0..experts.count).map(Some).collect());
                for expert in experts {
                    layout.push(Module { layer, target, expert }, in_features, out_features);
                }
                layout.starts.push(layout.entries.len());
            }
        }
        if has(LoraTarget::LmHead) {
            let (in_features, out_features) = shape(0, LoraTarget::LmHead)?;
            layout.push(Module::HEAD, in_features, out_features);
        }
        Ok(layout)
    }

    /// The layout that the matrices of a file have, whatever model they are for; `shape` is that
    /// of a tensor. Refuses shapes that don't belong together.
    pub(super) fn of_tensors(
        config: &LoraConfig,
        shape: impl Fn(&str) -> Result<Vec<usize>, AdapterError>,
    ) -> Result<Self, AdapterError> {
        config.validate()?;
        let is_held = |module: Module| shape(&module.tensor_names()[0]).is_ok();
        let mut layout = Self::empty(config);
        let mut layer = 0;
        loop {
            let modules = |target| Module::held(layer, target, is_held);
            let targets = layout.of_block().to_vec();
            let is_over = targets.iter().all(|target| modules(*target).is_empty());
            if is_over && (layer > 0 || targets.is_empty()) {
                if config.targets.contains(&LoraTarget::LmHead) {
                    layout.push_shaped(Module::HEAD, &shape)?;
                }
                return Ok(layout);
            }
            for target in targets {
                let held = modules(target);
                if held.is_empty() {
                    let [name, _] = Module { layer, target, expert: None }.tensor_names();
                    return Err(AdapterError::MissingTensor { name });
                }
                for module in held {
                    layout.push_shaped(module, &shape)?;
                }
                layout.starts.push(layout.entries.len());
            }
            layer += 1;
        }
    }

    /// A layout of which only the length is known.
    pub(in crate::model) fn of_length(config: &LoraConfig, len: usize) -> Result<Self, InvalidInput> {
        config.validate()?;
        Ok(Self { len, ..Self::empty(config) })
    }

    fn empty(config: &LoraConfig) -> Self {
        Self { config: config.clone(), entries: Vec::new(), starts: vec![0], len: 0 }
    }

    /// Adds a module with the widths that its tensors have.
    fn push_shaped(
        &mut self,
        module: Module,
        shape: impl Fn(&str) -> Result<Vec<usize>, AdapterError>,
    ) -> Result<(), AdapterError> {
        let rank = self.config.rank as usize;
        let [name_a, name_b] = module.tensor_names();
        let (a, b) = (shape(&name_a)?, shape(&name_b)?);
        match (&a[..], &b[..]) {
            (&[rows, in_features], &[out_features, columns]) if rows == rank && columns == rank => {
                self.push(module, in_features, out_features);
                Ok(())
            }
            (&[rows, _], &[out_features, ..]) if rows == rank => {
                Err(AdapterError::Shape { name: name_b, expected: vec![out_features, rank], found: b })
            }
            _ => {
                let expected = vec![rank, a.last().copied().unwrap_or(0)];
                Err(AdapterError::Shape { name: name_a, expected, found: a })
            }
        }
    }

    fn push(&mut self, Module { layer, target, expert }: Module, in_features: usize, out_features: usize) {
        let rank = self.config.rank as usize;
        let a = self.len..self.len + rank * in_features;
        let b = a.end..a.end + out_features * rank;
        self.len = b.end;
        self.entries.push(LoraEntry { layer, target, expert, in_features, out_features, a, b });
    }

    /// Number of f32 values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is adapted: only a model without layers has such a layout.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Those of the targets that each block has: all but the head, which stands last.
    fn of_block(&self) -> &[LoraTarget] {
        match self.config.targets.split_last() {
            Some((LoraTarget::LmHead, of_block)) => of_block,
            _ => &self.config.targets,
        }
    }

    /// The head's entry, if it carries an adapter.
    pub fn head(&self) -> Option<&LoraEntry> {
        self.entries.last().filter(|entry| entry.target == LoraTarget::LmHead)
    }

    /// The entries of a block's target, if it carries adapters: one, or one an expert.
    pub fn entries_of(&self, layer: usize, target: LoraTarget) -> &[LoraEntry] {
        // The targets are sorted.
        let of_block = self.of_block();
        let Ok(column) = of_block.binary_search(&target) else { return &[] };
        let place = layer * of_block.len() + column;
        match self.starts.get(place..place + 2) {
            Some(bounds) => &self.entries[bounds[0]..bounds[1]],
            None => &[],
        }
    }

    /// `alpha / rank`.
    pub fn scale(&self) -> f32 {
        self.config.alpha / self.config.rank as f32
    }
}

impl ModelConfig {
    /// Largest rank that [`LoraLayout::new`] takes on each of [`LoraTarget::ALL`]: the smallest
    /// dimension of its linear layers.
    pub fn lora_rank_max(&self) -> [u32; 8] {
        LoraTarget::ALL.map(|target| {
            let bounds = (0..self.num_layers).map(|layer| {
                let (in_features, out_features) = self.linear_shape(layer, target);
                in_features.min(out_features)
            });
            bounds.min().map_or(0, |bound| u32::try_from(bound).unwrap_or(u32::MAX))
        })
    }

    /// `(in_features, out_features)` of a linear layer of a block, or of each of its experts', or of the head.
    pub fn linear_shape(&self, layer: usize, target: LoraTarget) -> (usize, usize) {
        let queries = self.num_heads * self.head_dim;
        let keys = self.num_kv_heads * self.head_dim;
        let wide = self.layer_experts(layer).map_or(self.intermediate_size, |e| e.intermediate_size);
        match target {
            LoraTarget::QProj => (self.hidden_size, queries),
            LoraTarget::KProj | LoraTarget::VProj => (self.hidden_size, keys),
            LoraTarget::OProj => (queries, self.hidden_size),
            LoraTarget::GateProj | LoraTarget::UpProj => (self.hidden_size, wide),
            LoraTarget::DownProj => (wide, self.hidden_size),
            LoraTarget::LmHead => (self.hidden_size, self.vocab_size),
        }
    }
}

impl LoraEntry {
    /// In the place of the block's number: above all of them.
    pub const HEAD: usize = usize::MAX;

    /// Name of the adapted linear layer in a Hugging Face model: `model.layers.3.self_attn.q_proj`
    /// or `model.layers.3.mlp.experts.17.up_proj`.
    pub fn module_name(&self) -> String {
        self.module().name()
    }

    /// Names of A and B in a PEFT adapter file.
    pub fn tensor_names(&self) -> [String; 2] {
        self.module().tensor_names()
    }

    fn module(&self) -> Module {
        Module { layer: self.layer, target: self.target, expert: self.expert }
    }
}

/// A linear layer that may carry an adapter, by its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Module {
    layer: usize,
    target: LoraTarget,
    expert: Option<usize>,
}

impl Module {
    pub(super) const HEAD: Self = Self { layer: LoraEntry::HEAD, target: LoraTarget::LmHead, expert: None };

    /// The modules of a layer's target that a file holds: one, or one an expert.
    pub(super) fn held(layer: usize, target: LoraTarget, is_held: impl Fn(Self) -> bool) -> Vec<Self> {
        let dense = Self { layer, target, expert: None };
        if is_held(dense) {
            return vec![dense];
        }
        let experts = (0..).map(|expert| Self { expert: Some(expert), ..dense });
        experts.take_while(|module| is_held(*module)).collect()
    }

    fn name(self) -> String {
        let (layer, name) = (self.layer, self.target.name());
        match (self.target.parent(), self.expert) {
            (None, _) => name.to_owned(),
            (Some(parent), None) => format!("model.layers.{layer}.{parent}.{name}"),
            (Some(parent), Some(expert)) => format!("model.layers.{layer}.{parent}.experts.{expert}.{name}"),
        }
    }

    /// Names of A and B in a PEFT adapter file.
    pub(super) fn tensor_names(self) -> [String; 2] {
        let module = self.name();
        ["lora_A", "lora_B"].map(|matrix| format!("base_model.model.{module}.{matrix}.weight"))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::{ExpertsConfig, Family, RopeScaling};

    /// Two layers, 4 query heads over 2 key/value heads of width 4.
    pub(crate) fn tiny_model() -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            vocab_size: 32,
            hidden_size: 12,
            intermediate_size: 20,
            experts: None,
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
            assert_eq!(layout.entries_of(entry.layer, entry.target), std::slice::from_ref(entry));
        }
        assert_eq!(layout.entries_of(0, LoraTarget::QProj), []);
        assert_eq!(layout.entries_of(2, LoraTarget::KProj), []);
    }

    #[test]
    fn shapes_follow_grouped_query_attention() {
        let layout = LoraLayout::new(&tiny_model(), &LoraConfig::new(2, 0)).unwrap();
        let shape = |target| {
            let entry = &layout.entries_of(1, target)[0];
            (entry.in_features, entry.out_features)
        };
        assert_eq!(shape(LoraTarget::QProj), (12, 16));
        assert_eq!(shape(LoraTarget::VProj), (12, 8));
        assert_eq!(shape(LoraTarget::OProj), (16, 12));
        assert_eq!(shape(LoraTarget::UpProj), (12, 20));
        assert_eq!(shape(LoraTarget::DownProj), (20, 12));
    }

    fn mixture() -> ModelConfig {
        let experts = ExpertsConfig {
            count: 3,
            per_row: 2,
            intermediate_size: 6,
            normalises: true,
            dense_layers: vec![0],
        };
        ModelConfig { family: Family::Qwen3Moe, experts: Some(experts), ..tiny_model() }
    }

    #[test]
    fn each_expert_has_adapters_of_its_own() {
        let mut config = LoraConfig::new(2, 0);
        config.targets = vec![LoraTarget::QProj, LoraTarget::GateProj, LoraTarget::UpProj];
        let layout = LoraLayout::new(&mixture(), &config).unwrap();
        let names: Vec<String> = layout.entries.iter().map(LoraEntry::module_name).collect();
        let expected = [
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.mlp.gate_proj",
            "model.layers.0.mlp.up_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.experts.0.gate_proj",
            "model.layers.1.mlp.experts.1.gate_proj",
            "model.layers.1.mlp.experts.2.gate_proj",
            "model.layers.1.mlp.experts.0.up_proj",
            "model.layers.1.mlp.experts.1.up_proj",
            "model.layers.1.mlp.experts.2.up_proj",
        ];
        assert_eq!(names, expected);
        let up = layout.entries_of(1, LoraTarget::UpProj);
        assert_eq!(up.iter().map(|entry| entry.expert).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
        assert_eq!(up[2].out_features, 6);
        assert_eq!(layout.entries_of(0, LoraTarget::UpProj)[0].out_features, 20);
    }

    #[test]
    fn refuses_one_of_an_experts_gate_and_up() {
        let mut config = LoraConfig::new(2, 0);
        config.targets = vec![LoraTarget::UpProj, LoraTarget::DownProj];
        LoraLayout::new(&tiny_model(), &config).unwrap();
        assert_eq!(LoraLayout::new(&mixture(), &config).unwrap_err().field, "targets");
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
