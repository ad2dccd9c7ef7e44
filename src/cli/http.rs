use std::net::SocketAddr;

use clap::Args;
use lockstep::gateway::GatewayConfig;

/// How HTTP is served.
#[derive(Args)]
pub struct Http {
    /// Where HTTP is served; port 0 is any.
    #[arg(long = "http", default_value = "127.0.0.1:8000", env = "LOCKSTEP_HTTP")]
    pub address: SocketAddr,
    /// Serve HTTP without keys on an address that others reach.
    #[arg(long)]
    insecure: bool,
    /// Where clients reach the HTTP server, if not under the host that their requests name.
    #[arg(long, value_name = "URL", env = "LOCKSTEP_PUBLIC_URL")]
    public_url: Option<String>,
}

impl Http {
    pub fn config(self) -> GatewayConfig {
        GatewayConfig { insecure: self.insecure, public_url: self.public_url, presign_key: None }
    }
}
