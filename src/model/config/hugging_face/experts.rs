//! The experts of a `qwen3_moe` config.json.

use serde_json::Value;

use super::{Fields, brief};
use crate::model::{
    ModelError,
    config::{ExpertsConfig, MAX_LAYERS},
};

/// The field's name on hubs and, second, in what transformers 5 writes.
const COUNT: [&str; 2] = ["num_experts", "num_local_experts"];
const PER_ROW: &str = "num_experts_per_tok";
const WIDTH: &str = "moe_intermediate_size";
const DENSE_LAYERS: &str = "mlp_only_layers";
const SPARSE_STEP: &str = "decoder_sparse_step";

pub(super) fn read(fields: &Fields) -> Result<ExpertsConfig, ModelError> {
    let count_name = if fields.get(COUNT[0]).is_none() { COUNT[1] } else { COUNT[0] };
    let experts = ExpertsConfig {
        count: match fields.optional_size(count_name)? {
            Some(count) => count,
            None => return Err(ModelError::invalid_field(fields.path, COUNT[0], "is missing")),
        },
        per_row: fields.size(PER_ROW)?,
        intermediate_size: fields.size(WIDTH)?,
        normalises: fields.optional_bool("norm_topk_prob")?.unwrap_or(false),
        dense_layers: dense_layers(fields)?,
    };
    match experts.problem([count_name, PER_ROW, WIDTH]) {
        None => Ok(experts),
        Some((field, problem)) => Err(ModelError::invalid_field(fields.path, field, problem)),
    }
}

/// Layers that `mlp_only_layers` names, and those that `decoder_sparse_step` leaves out.
fn dense_layers(fields: &Fields) -> Result<Vec<usize>, ModelError> {
    let layers = fields.size("num_hidden_layers")?;
    let step = fields.optional_size(SPARSE_STEP)?.unwrap_or(1);
    if step == 0 {
        return Err(ModelError::invalid_field(fields.path, SPARSE_STEP, "is 0; it must be above 0"));
    }
    let named = match fields.get(DENSE_LAYERS) {
        None => Vec::new(),
        Some(value) => {
            let index = |value: &Value| value.as_u64().and_then(|layer| usize::try_from(layer).ok());
            let list = value.as_array().and_then(|list| list.iter().map(index).collect::<Option<Vec<_>>>());
            list.ok_or_else(|| {
                let problem = format!("is {}, no list of layers", brief(value));
                ModelError::invalid_field(fields.path, DENSE_LAYERS, problem)
            })?
        }
    };
    // A number of layers beyond any model's is refused later, by its own name.
    let is_dense = |layer: &usize| named.contains(layer) || !(layer + 1).is_multiple_of(step);
    Ok((0..layers.min(MAX_LAYERS)).filter(is_dense).collect())
}
