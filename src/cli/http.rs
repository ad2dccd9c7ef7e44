use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use lockstep::gateway::{ApiKeys, GatewayConfig};

/// How HTTP is served.
#[derive(Args)]
pub struct Http {
    /// Where HTTP is served; port 0 is any.
    #[arg(long = "http", default_value = "127.0.0.1:8000", env = "LOCKSTEP_HTTP")]
    pub address: SocketAddr,
    /// Serve HTTP without keys on an address that others reach.
    #[arg(long)]
    insecure: bool,
    /// File with a line `NAME KEY` for each who may use HTTP; each has runs of their own.
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_API_KEYS")]
    api_keys: Option<PathBuf>,
    /// Where clients reach the HTTP server, if not under the host that their requests name.
    #[arg(long, value_name = "URL", env = "LOCKSTEP_PUBLIC_URL")]
    public_url: Option<String>,
}

impl Http {
    pub fn config(self) -> anyhow::Result<GatewayConfig> {
        let api_keys = self.api_keys.as_deref().map(ApiKeys::read).transpose()?;
        Ok(GatewayConfig {
            insecure: self.insecure,
            api_keys,
            public_url: self.public_url,
            presign_key: None,
        })
    }
}
