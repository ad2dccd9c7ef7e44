use std::time::Duration;

use object_store::{
    BackoffConfig, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey},
};

use crate::transport::offer_crypto_provider;

use super::{BucketLocation, StoreError, bucket};

/// For a connection to be made; a server that is further away than this is not there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// For one request with its body: a blob of 340 MB at 10 Mbit/s takes 272 s. Nobody waits longer for
/// a blob than 300.
const REQUEST_DEADLINE: Duration = Duration::from_secs(280);

/// How often a request that failed is sent again.
#[derive(Debug, Clone, Copy)]
pub(super) enum Retries {
    /// While a person waits.
    Few,
    /// Where an operation would have to be done again.
    Many,
}

impl Retries {
    fn config(self) -> RetryConfig {
        let (max_retries, seconds) = match self {
            Self::Few => (2, 5),
            Self::Many => (10, 120),
        };
        let retry_timeout = Duration::from_secs(seconds);
        RetryConfig { max_retries, retry_timeout, backoff: BackoffConfig::default() }
    }
}

/// How buckets are reached: variables whose names begin with `AWS_`, as Amazon's own tools read them.
/// Holds secrets.
pub(super) struct Access(Vec<(String, String)>);

impl Access {
    /// What this process was started with.
    pub fn from_env() -> Self {
        Self::from_variables(std::env::vars_os().filter_map(|(name, value)| {
            // Others are none of ours.
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }))
    }

    pub fn from_variables(variables: impl Iterator<Item = (String, String)>) -> Self {
        Self(variables.filter(|(name, value)| name.starts_with("AWS_") && !value.is_empty()).collect())
    }

    fn value(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// A client of a bucket.
    pub fn connect(&self, location: &BucketLocation, retries: Retries) -> Result<AmazonS3, StoreError> {
        offer_crypto_provider();
        let mut builder = AmazonS3Builder::new();
        for (name, value) in self.defaults().into_iter().chain(self.0.clone()) {
            // There are variables that are no concern of a store.
            if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
                builder = builder.with_config(key, value);
            }
        }
        if self.value("AWS_ACCESS_KEY_ID").is_some() != self.value("AWS_SECRET_ACCESS_KEY").is_some() {
            let problem = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together".to_owned();
            return Err(StoreError::Forbidden { location: location.clone(), problem });
        }
        let built = builder.with_bucket_name(&location.bucket).with_retry(retries.config()).build();
        built.map_err(|error| StoreError::Unreachable {
            location: location.clone(),
            problem: bucket::deepest(&error),
        })
    }

    /// What holds where nothing else is said.
    fn defaults(&self) -> [(String, String); 3] {
        // Whoever names an endpoint without TLS means it.
        let endpoints = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
        let plain =
            endpoints.iter().filter_map(|name| self.value(name)).any(|url| url.starts_with("http://"));
        let seconds = |deadline: Duration| format!("{}s", deadline.as_secs());
        [
            ("AWS_ALLOW_HTTP".into(), plain.to_string()),
            ("AWS_CONNECT_TIMEOUT".into(), seconds(CONNECT_DEADLINE)),
            ("AWS_TIMEOUT".into(), seconds(REQUEST_DEADLINE)),
        ]
    }
}
