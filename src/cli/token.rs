use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use lockstep::{
    join::{Ledger, Terms},
    transport::{ClusterCa, Role, unix_now},
};

use super::arguments::{DATA_DIR, span};

/// What lets processes on other machines into the cluster of a data directory. Works whether its
/// coordinator runs or not.
#[derive(Subcommand)]
pub enum Token {
    /// Print a fresh token.
    Create(Create),
    /// List the tokens, without their secrets.
    List(Place),
    /// Forget a token; those that it let in stay.
    Revoke {
        id: String,
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Args)]
pub struct Place {
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

#[derive(Args)]
pub struct Create {
    /// What its holders become.
    #[arg(long, default_value = "node", value_parser = ["node", "gateway", "client"])]
    role: String,
    /// How often it is taken. A node that keeps its data directory needs it once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
    /// Any number of times: for launchers that start the same node anew with an empty disk.
    #[arg(long, conflicts_with = "uses")]
    unlimited: bool,
    /// How long it is good for: a number and s, m, h or d; `ever` is until it is revoked.
    #[arg(long, default_value = "24h")]
    valid: String,
    #[command(flatten)]
    place: Place,
}

impl Token {
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Create(create) => create.run(),
            Self::List(place) => place.list(),
            Self::Revoke { id, place } => Ok(Ledger::open(&place.data_dir)?.revoke(&id)?),
        }
    }
}

impl Create {
    fn run(self) -> anyhow::Result<()> {
        let role = Role::parse(&self.role).context("--role")?;
        let expires_at = match self.valid.as_str() {
            "ever" => None,
            text => Some(unix_now() + span(text).context("--valid")?.as_secs()),
        };
        let terms = Terms { role, uses: (!self.unlimited).then_some(self.uses), expires_at };
        let ca = ClusterCa::open_or_create(&self.place.data_dir)?.fingerprint();
        println!("{}", Ledger::open(&self.place.data_dir)?.create(terms, ca)?);
        Ok(())
    }
}

impl Place {
    fn list(self) -> anyhow::Result<()> {
        let now = unix_now();
        for token in Ledger::open(&self.data_dir)?.list()? {
            let uses =
                token.uses_left.map_or("any number of uses".into(), |left| format!("{left} uses left"));
            let until = match token.expires_at {
                None => "until it is revoked".to_owned(),
                Some(at) if at <= now => "expired".to_owned(),
                Some(at) => format!("for {} more minutes", (at - now).div_ceil(60)),
            };
            println!("{}  {}  {uses}  {until}  let in: {}", token.id, token.role, token.names.join(", "));
        }
        Ok(())
    }
}
