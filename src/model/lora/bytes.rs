/// Bytes that are no adapter for this model.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error("{0}")]
    Placeholder(String),
}
