//! The rotary embedding of a config.json.
//!
//! Older files have `rope_theta` and a table `rope_scaling`, newer ones the table
//! `rope_parameters` with everything in it; where they contradict each other, transformers'
//! `convert_rope_params_to_dict` decides, as here.

use serde_json::{Map, Value};

use super::{Fields, brief};
use crate::model::{ModelError, RopeScaling};

/// Base and scaling of the frequencies. `max_positions` is the context's length, which Llama
/// 3's scaling falls back to.
pub(super) fn read(fields: &Fields, max_positions: usize) -> Result<(f32, RopeScaling), ModelError> {
    let theta = fields.optional_number("rope_theta")?;
    let Some(table) = table(fields)? else {
        return Ok((theta.unwrap_or(DEFAULT_THETA) as f32, RopeScaling::None));
    };
    let theta = table.optional_number("rope_theta")?.or(theta);
    let scaling = table.scaling(max_positions)?;
    if let Some((key, problem)) = scaling.problem() {
        return Err(table.invalid(key, problem));
    }
    Ok((theta.unwrap_or(DEFAULT_THETA) as f32, scaling))
}

const DEFAULT_THETA: f64 = 10_000.0;

/// The table that counts: `rope_scaling` unless it is empty.
fn table<'a>(fields: &'a Fields<'a>) -> Result<Option<Table<'a>>, ModelError> {
    for name in ["rope_scaling", "rope_parameters"] {
        let Some(value) = fields.get(name) else { continue };
        let Some(map) = value.as_object() else {
            let problem = format!("is {}, no table", brief(value));
            return Err(ModelError::invalid_field(fields.path, name, problem));
        };
        if !map.is_empty() {
            return Ok(Some(Table { fields, name, map }));
        }
    }
    Ok(None)
}

/// One of the two tables. Errors call its entries `rope_scaling.factor`.
struct Table<'a> {
    fields: &'a Fields<'a>,
    name: &'static str,
    map: &'a Map<String, Value>,
}

impl Table<'_> {
    fn scaling(&self, max_positions: usize) -> Result<RopeScaling, ModelError> {
        let kind = ["rope_type", "type"].iter().find_map(|key| Some((*key, self.get(key)?)));
        let Some((key, kind)) = kind else {
            self.refuse_others(&[], "unscaled rotary embedding")?;
            return Ok(RopeScaling::None);
        };
        match kind.as_str() {
            Some("default") => {
                self.refuse_others(&[], "unscaled rotary embedding")?;
                Ok(RopeScaling::None)
            }
            Some("linear") => {
                self.refuse_others(&["factor"], "a factor for linear scaling")?;
                Ok(RopeScaling::Linear { factor: self.number("factor")? })
            }
            Some("llama3") => {
                let entries =
                    ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"];
                self.refuse_others(&entries, "the four numbers of Llama 3's scaling")?;
                Ok(RopeScaling::Llama3 {
                    factor: self.number(entries[0])?,
                    low_freq_factor: self.number(entries[1])?,
                    high_freq_factor: self.number(entries[2])?,
                    original_positions: self.original_positions(entries[3], max_positions)?,
                })
            }
            _ => {
                let name = format!("{}.{key}", self.name);
                Err(self.fields.unsupported(&name, kind, "\"default\", \"linear\" and \"llama3\""))
            }
        }
    }

    /// Outside the table first, as transformers looks for it.
    fn original_positions(&self, key: &str, max_positions: usize) -> Result<u32, ModelError> {
        let outside = self.fields.optional_size(key)?;
        let inside = || match self.get(key) {
            None => Ok(max_positions),
            Some(value) => {
                let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
                size.ok_or_else(|| self.invalid(key, format!("is {}, not a whole number", brief(value))))
            }
        };
        let positions = outside.map_or_else(inside, Ok)?;
        u32::try_from(positions).map_err(|_| self.invalid(key, format!("is {positions}, beyond any context")))
    }

    /// Refuses entries that aren't `known` and would change the frequencies.
    fn refuse_others(&self, known: &[&str], supported: &str) -> Result<(), ModelError> {
        for (key, value) in self.map {
            let is_known = match key.as_str() {
                "rope_type" | "type" | "rope_theta" => true,
                "partial_rotary_factor" => value.as_f64() == Some(1.0),
                key => known.contains(&key),
            };
            if !is_known && !value.is_null() {
                return Err(self.fields.unsupported(&format!("{}.{key}", self.name), value, supported));
            }
        }
        Ok(())
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn number(&self, key: &str) -> Result<f32, ModelError> {
        let number = self.optional_number(key)?;
        number.map(|number| number as f32).ok_or_else(|| self.invalid(key, "is missing".to_owned()))
    }

    fn optional_number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || self.invalid(key, format!("is {}, not a number", brief(value)));
        value.as_f64().map(Some).ok_or_else(wrong)
    }

    fn invalid(&self, key: &str, problem: String) -> ModelError {
        ModelError::invalid_field(self.fields.path, format!("{}.{key}", self.name), problem)
    }
}
