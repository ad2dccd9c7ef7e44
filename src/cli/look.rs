use std::path::PathBuf;

use clap::Args;
use lockstep::{
    client::{ConnectTarget, ServiceClient},
    join::{Ledger, TokenInfo},
    transport::unix_now,
};

use super::arguments::DATA_DIR;

/// Which service to look at.
#[derive(Args)]
pub struct Look {
    #[arg(long, global = true, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

impl Look {
    pub(super) fn connect(&self) -> anyhow::Result<ServiceClient> {
        Ok(ServiceClient::connect_blocking(ConnectTarget::from(&self.data_dir))?)
    }

    /// Names the tokens with which a process of this name can still come in.
    pub(super) fn warn_of_tokens(&self, name: &str) {
        // Without a ledger there are no tokens.
        let tokens = Ledger::open(&self.data_dir).and_then(|ledger| ledger.list()).unwrap_or_default();
        let good = |token: &TokenInfo| {
            token.uses_left != Some(0) && token.expires_at.is_none_or(|at| at > unix_now())
        };
        for token in
            tokens.iter().filter(|token| good(token) && token.names.iter().any(|known| known == name))
        {
            println!(
                "token {} has let {name} in and is still good: lockstep token revoke {}",
                token.id, token.id
            );
        }
    }
}
