use std::path::PathBuf;

use clap::{Args, Subcommand};
use lockstep::{pull, service::DataDirectory};

use super::up::DATA_DIR;

#[derive(Subcommand)]
pub enum Model {
    /// Fetch a model into the data directory: `smollm2-135m`, or `hf:ORG/NAME`.
    Pull(Pull),
    /// List the models of the data directory.
    List(List),
}

#[derive(Args)]
pub struct Pull {
    name: String,
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

#[derive(Args)]
pub struct List {
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

impl Model {
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Pull(pull) => {
                let data = DataDirectory::open(pull.data_dir)?;
                let source = pull::fetch(&pull.name, data.path(), &pull::Progress::on_stderr())?;
                println!("{} is at {}", source.name, source.path.display());
            }
            Self::List(list) => {
                for source in pull::installed(&list.data_dir) {
                    println!("{}  {}", source.name, source.path.display());
                }
            }
        }
        Ok(())
    }
}
