use serde::{Deserialize, Deserializer, Serialize, de::Error};

use super::InvalidInput;

/// A linear layer that can carry an adapter, by its PEFT name: seven of each decoder block, and the
/// head.
///
/// The order of the variants is the order of the tensors in an adapter's flat layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraTarget {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
    /// The projection of the last hidden state onto the vocabulary, of which a model has one.
    LmHead,
}

impl LoraTarget {
    /// Those of a decoder block, in order: what an adapter covers by default.
    pub const OF_BLOCK: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// Every target, in order.
    pub const ALL: [Self; 8] = [
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
        Self::LmHead,
    ];

    /// The module's name in PEFT and on the wire: `q_proj`, ….
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
            Self::LmHead => "lm_head",
        }
    }

    /// The module of a decoder block that holds it, `self_attn` or `mlp`; none holds the head.
    pub fn parent(self) -> Option<&'static str> {
        match self {
            Self::QProj | Self::KProj | Self::VProj | Self::OProj => Some("self_attn"),
            Self::GateProj | Self::UpProj | Self::DownProj => Some("mlp"),
            Self::LmHead => None,
        }
    }
}

/// How a run's adapter is made.
///
/// An adapted layer computes `y = W x + (alpha / rank) · B (A x)`; A starts uniform in
/// `±1/sqrt(in)`, B at zero, so a fresh adapter equals the base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "LoraJson")]
pub struct LoraConfig {
    /// Rows of A and columns of B; at least 1.
    pub rank: u32,
    /// Numerator of the scale; 32 by default.
    pub alpha: f32,
    /// Seed of A's initialisation; 0 by default.
    pub seed: u64,
    /// Which layers carry an adapter; sorted, no duplicates, not empty. All of a block by default.
    pub targets: Vec<LoraTarget>,
}

/// The JSON of a [`LoraConfig`], and what must not be asked for in it.
#[derive(Deserialize)]
struct LoraJson {
    rank: u32,
    #[serde(default = "default_alpha")]
    alpha: f32,
    #[serde(default)]
    seed: u64,
    #[serde(default = "default_targets")]
    targets: Vec<LoraTarget>,
    #[serde(default, rename = "dropout", alias = "lora_dropout")]
    _dropout: NoDropout,
}

impl From<LoraJson> for LoraConfig {
    fn from(LoraJson { rank, alpha, seed, targets, _dropout }: LoraJson) -> Self {
        Self { rank, alpha, seed, targets }
    }
}

/// A dropout of 0, or none at all: any other is refused, because it would not be computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NoDropout;

impl<'de> Deserialize<'de> for NoDropout {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Option::<f64>::deserialize(deserializer)? {
            Some(dropout) if dropout != 0.0 => {
                Err(D::Error::custom(format!("a dropout of {dropout} is not supported; it must be 0")))
            }
            _ => Ok(Self),
        }
    }
}

impl LoraConfig {
    /// Alpha when the caller names none.
    pub const DEFAULT_ALPHA: f32 = 32.0;

    /// An adapter of `rank` on the default targets, with the default alpha.
    pub fn new(rank: u32, seed: u64) -> Self {
        Self { rank, alpha: Self::DEFAULT_ALPHA, seed, targets: default_targets() }
    }

    /// Refuses what no model could carry: rank 0, an alpha that is not a positive number,
    /// targets that are empty, repeated or out of order. Bounds that depend on the model are
    /// checked by `LoraLayout::new`.
    pub fn validate(&self) -> Result<(), InvalidInput> {
        if self.rank == 0 {
            return Err(InvalidInput::new("rank", "must be at least 1, got 0"));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return Err(InvalidInput::new(
                "alpha",
                format!("must be a finite number above 0, got {}", self.alpha),
            ));
        }
        if self.targets.is_empty() {
            return Err(InvalidInput::new("targets", "must name at least one layer, got none"));
        }
        if let Some(pair) = self.targets.windows(2).find(|pair| pair[0] >= pair[1]) {
            let problem = if pair[0] == pair[1] {
                format!("names `{}` twice", pair[0].name())
            } else {
                format!("must be in order: `{}` stands before `{}`", pair[0].name(), pair[1].name())
            };
            return Err(InvalidInput::new("targets", problem));
        }
        Ok(())
    }
}

fn default_alpha() -> f32 {
    LoraConfig::DEFAULT_ALPHA
}

fn default_targets() -> Vec<LoraTarget> {
    LoraTarget::OF_BLOCK.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut LoraConfig)) -> String {
        let mut config = LoraConfig::new(8, 1);
        change(&mut config);
        config.validate().unwrap_err().to_string()
    }

    #[test]
    fn accepts_the_defaults() {
        LoraConfig::new(8, 1).validate().unwrap();
    }

    #[test]
    fn refuses_rank_zero() {
        assert_eq!(refused(|config| config.rank = 0), "`rank`: must be at least 1, got 0");
    }

    #[test]
    fn refuses_an_alpha_that_is_no_positive_number() {
        for alpha in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(refused(|config| config.alpha = alpha).starts_with("`alpha`:"), "{alpha}");
        }
    }

    #[test]
    fn refuses_empty_targets() {
        assert!(refused(|config| config.targets.clear()).starts_with("`targets`: must name"));
    }

    #[test]
    fn refuses_repeated_targets() {
        let problem = refused(|config| config.targets = vec![LoraTarget::QProj, LoraTarget::QProj]);
        assert_eq!(problem, "`targets`: names `q_proj` twice");
    }

    #[test]
    fn refuses_targets_out_of_order() {
        let problem = refused(|config| config.targets = vec![LoraTarget::UpProj, LoraTarget::QProj]);
        assert_eq!(problem, "`targets`: must be in order: `up_proj` stands before `q_proj`");
    }

    #[test]
    fn absent_fields_take_their_defaults() {
        let config: LoraConfig = serde_json::from_str(r#"{"rank": 8}"#).unwrap();
        assert_eq!(config, LoraConfig::new(8, 0));
    }

    #[test]
    fn refuses_a_dropout_by_its_name() {
        for json in [r#"{"rank": 8, "dropout": 0.05}"#, r#"{"rank": 8, "lora_dropout": 0.05}"#] {
            let error = serde_json::from_str::<LoraConfig>(json).unwrap_err().to_string();
            assert!(error.starts_with("a dropout of 0.05 is not supported; it must be 0"), "{error}");
        }
        for json in [r#"{"rank": 8, "dropout": 0}"#, r#"{"rank": 8, "lora_dropout": null}"#] {
            assert_eq!(serde_json::from_str::<LoraConfig>(json).unwrap(), LoraConfig::new(8, 0));
        }
    }

    #[test]
    fn target_names_are_their_json() {
        for target in LoraTarget::ALL {
            assert_eq!(serde_json::to_string(&target).unwrap(), format!("\"{}\"", target.name()));
        }
    }
}
