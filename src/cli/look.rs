use std::path::PathBuf;

use clap::Args;
use lockstep::client::{ConnectTarget, ServiceClient};

use super::up::DATA_DIR;

/// Which service to look at.
#[derive(Args)]
pub struct Look {
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

impl Look {
    pub(super) fn connect(&self) -> anyhow::Result<ServiceClient> {
        Ok(ServiceClient::connect_blocking(ConnectTarget::from(&self.data_dir))?)
    }
}
