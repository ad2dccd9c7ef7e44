use super::ModelConfig;

/// Most experts of a layer.
pub(super) const MAX_EXPERTS: usize = 4096;

/// A mixture of experts: a router sends each row to some of many MLPs and adds up what they
/// return, weighted by how likely it found them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// Experts of a layer.
    pub count: usize,
    /// How many of them a row goes to.
    pub per_row: usize,
    /// Width of one expert's MLP.
    pub intermediate_size: usize,
    /// Whether the weights of a row's experts are made to sum to one.
    pub normalises: bool,
    /// Layers that have one MLP of the model's `intermediate_size` all the same, ascending.
    pub dense_layers: Vec<usize>,
}

impl ExpertsConfig {
    /// What can't be: a field, by the names given, and why.
    pub(super) fn problem(&self, names: [&str; 3]) -> Option<(String, String)> {
        let [count, per_row, width] = names;
        let out_of_range = |field: &str, value: usize, most: usize| {
            let problem = format!("is {value}; it must lie between 1 and {most}");
            (value == 0 || value > most).then(|| (field.to_owned(), problem))
        };
        out_of_range(count, self.count, MAX_EXPERTS)
            .or_else(|| out_of_range(per_row, self.per_row, self.count))
            .or_else(|| out_of_range(width, self.intermediate_size, super::MAX_DIMENSION))
    }
}

impl ModelConfig {
    /// The experts of a layer, if it has any.
    pub fn layer_experts(&self, layer: usize) -> Option<&ExpertsConfig> {
        self.experts.as_ref().filter(|experts| experts.dense_layers.binary_search(&layer).is_err())
    }
}
