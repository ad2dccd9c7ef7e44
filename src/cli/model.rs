use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, Subcommand};
use lockstep::{
    model::{PackError, PackFile},
    pull,
    service::{CACHE, DataDirectory},
};

use super::arguments::DATA_DIR;

#[derive(Subcommand)]
pub enum Model {
    /// Fetch a model into the data directory: `smollm2-135m`, or `hf:ORG/NAME`.
    Pull(Pull),
    /// List the models of the data directory, and the packed weights that its nodes share (DATA/cache).
    List(Data),
    /// Read all packed weights and compare them with the digest of what was written.
    Verify(Data),
    /// Remove all packed weights, unfinished ones too: the next start of a node packs them again. Waits for a node that
    /// is packing.
    Clear(Data),
}

#[derive(Args)]
pub struct Pull {
    name: String,
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

#[derive(Args)]
pub struct Data {
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
            Self::List(data) => {
                for source in pull::installed(&data.data_dir) {
                    println!("{}  {}", source.name, source.path.display());
                }
                data.packs().iter().for_each(|pack| println!("{}", line(pack)));
            }
            Self::Verify(data) => {
                let packs = data.packs();
                let damaged = packs.iter().filter(|pack| match pack.verify() {
                    Ok(()) => {
                        println!("{}: as it was written", line(pack));
                        false
                    }
                    Err(PackError::Unfinished) => {
                        println!("{}", line(pack));
                        false
                    }
                    Err(problem) => {
                        println!("{}: {problem}", line(pack));
                        true
                    }
                });
                match damaged.count() {
                    0 => {}
                    damaged => bail!("{damaged} damaged; `lockstep model clear` removes them"),
                }
            }
            Self::Clear(data) => {
                for pack in PackFile::clear(&data.cache())? {
                    println!("removed {}", line(&pack));
                }
            }
        }
        Ok(())
    }
}

impl Data {
    fn packs(&self) -> Vec<PackFile> {
        PackFile::list(&self.cache())
    }

    fn cache(&self) -> PathBuf {
        self.data_dir.join(CACHE)
    }
}

fn line(pack: &PackFile) -> String {
    let mib = pack.bytes as f64 / f64::from(1 << 20);
    match &pack.holds {
        Ok((source, dtype)) => format!("packed, {mib:.0} MiB, {dtype}  {}", source.display()),
        Err(problem) => format!("packed, {mib:.0} MiB  {}: {problem}", pack.path.display()),
    }
}
