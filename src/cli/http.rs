use std::{net::SocketAddr, path::PathBuf};

use anyhow::Context;
use clap::Args;
use lockstep::{
    gateway::{ApiKeys, GatewayConfig, Limits},
    transport::HttpsIdentity,
};

/// How HTTP is served.
#[derive(Args)]
pub struct Http {
    /// Where HTTP is served; port 0 is any.
    #[arg(long = "http", default_value = "127.0.0.1:8000", env = "LOCKSTEP_HTTP")]
    pub address: SocketAddr,
    /// Serve HTTPS with this certificate: a PEM file, those that vouch for it behind it.
    #[arg(long, value_name = "FILE", requires = "tls_key", env = "LOCKSTEP_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key: a PEM file.
    #[arg(long, value_name = "FILE", requires = "tls_cert", env = "LOCKSTEP_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// Serve HTTP without keys on an address that others reach.
    #[arg(long)]
    insecure: bool,
    /// File with a line `NAME KEY [LIMIT=VALUE …]` for each who may use HTTP; each has runs of their own.
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_API_KEYS")]
    api_keys: Option<PathBuf>,
    /// What each key may use at once, unless its line says otherwise (without keys, everybody together):
    /// runs=N,queued=N,disk=SIZE,bodies=SIZE, where `queued` are operations, `disk` is of checkpoints and none
    /// lifts a limit. By default a key has runs=256,queued=4096,disk=64GiB,bodies=128MiB.
    #[arg(long, value_name = "LIMIT=VALUE,…", env = "LOCKSTEP_LIMITS")]
    limits: Option<Limits>,
    /// Where clients reach the HTTP server, if not under the host that their requests name.
    #[arg(long, value_name = "URL", env = "LOCKSTEP_PUBLIC_URL")]
    public_url: Option<String>,
}

impl Http {
    pub fn config(self) -> anyhow::Result<GatewayConfig> {
        let of_a_key = self.limits.clone().unwrap_or_default();
        let api_keys = self.api_keys.as_deref().map(|file| ApiKeys::read(file, &of_a_key)).transpose()?;
        let https = match (&self.tls_cert, &self.tls_key) {
            (Some(certificate), Some(key)) => Some(HttpsIdentity::read(certificate, key).context("HTTPS")?),
            _ => None,
        };
        Ok(GatewayConfig {
            https,
            insecure: self.insecure,
            api_keys,
            limits: self.limits,
            public_url: self.public_url,
            presign_key: None,
        })
    }
}
