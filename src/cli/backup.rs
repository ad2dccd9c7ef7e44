use std::path::PathBuf;

use clap::Args;
use lockstep::service::{DataDirectory, back_up, run_here};

use super::arguments::DATA_DIR;

#[derive(Args)]
pub struct Backup {
    /// A new directory: the journal, the blobs that it names, the cluster's CA and keys. Keep it as you keep
    /// keys. A coordinator is started on it as on any data directory.
    path: PathBuf,
    /// Of the running coordinator, on its machine.
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

impl Backup {
    pub fn run(self) -> anyhow::Result<()> {
        let data = DataDirectory::open(&self.data_dir)?;
        let done = run_here("backup", async move { back_up(&data, &self.path).await })?;
        println!(
            "{} blobs and a journal of {} KiB, {:.1} MiB in all, in {:.1} s",
            done.blobs,
            done.journal_bytes >> 10,
            done.bytes as f64 / f64::from(1 << 20),
            done.took.as_secs_f64()
        );
        Ok(())
    }
}
