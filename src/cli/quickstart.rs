use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use lockstep::{
    pull,
    quickstart::{self, Pair, Progress, QuickstartConfig, StepMetrics, Summary},
    service::{self, DataDirectory, Supervisor},
};

use super::{LogFormat, arguments::DATA_DIR, compute::Compute, up::LocalCluster};

/// The model that is fetched if none is given.
const MODEL: &str = "smollm2-135m";

/// Samples shown before and after.
const SHOWN: usize = 4;

/// Trains a small real model on this machine and shows the curve.
#[derive(Args)]
pub struct Quickstart {
    /// Where metrics.jsonl, adapter/, curve.svg and curve.png go.
    #[arg(long, default_value = "./quickstart-out")]
    out: PathBuf,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[arg(long, default_value_t = 20)]
    steps: u32,
    /// Cores to compute on; by default all of this machine.
    #[arg(long)]
    threads: Option<usize>,
    /// Another model with ChatML prompts, as NAME=PATH.
    #[arg(long = "model", value_name = "NAME=PATH")]
    model: Option<String>,
    #[command(flatten)]
    compute: Compute,
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

impl Quickstart {
    pub fn run(self, log_format: LogFormat) -> anyhow::Result<()> {
        let data = DataDirectory::open(&self.data_dir)?;
        let model = match &self.model {
            Some(model) => model.clone(),
            None => {
                let source = pull::fetch(MODEL, data.path(), &pull::Progress::on_stderr())?;
                format!("{}={}", source.name, source.path.display())
            }
        };
        let name = model.split('=').next().unwrap_or(MODEL).to_owned();
        let cluster = LocalCluster {
            trainers: 2,
            samplers: 1,
            nodes: 1,
            threads: self.threads,
            models: vec![model],
            compute: self.compute,
            data_dir: self.data_dir.clone(),
        };
        let mut config = QuickstartConfig::new(name, self.out.clone());
        (config.seed, config.steps) = (self.seed, self.steps);
        service::run_here("quickstart", async move {
            let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            println!(
                "starting a local cluster: a coordinator, and a node with 2 trainer ranks and 1 sampler replica"
            );
            let mut supervisor = Supervisor::start(cluster.supervisor(listen, true, log_format)?).await?;
            let interrupted = service::shutdown_requested()?;
            let trained = tokio::select! {
                trained = train(data, config) => trained,
                error = supervisor.failed() => Err(error.into()),
                () = interrupted => Err(anyhow::anyhow!("interrupted")),
            };
            supervisor.shutdown().await;
            report(&trained?, &self.out);
            Ok(())
        })
    }
}

async fn train(data: DataDirectory, config: QuickstartConfig) -> anyhow::Result<Summary> {
    let logs = data.logs();
    let client = service::wait_until_joined(data.path(), 1).await?;
    let bar = ProgressBar::new(config.steps.into());
    bar.set_style(ProgressStyle::with_template("{bar:24} {pos:>2}/{len} {elapsed_precise} {msg}")?);
    bar.set_message("asking the untrained model");
    bar.enable_steady_tick(Duration::from_millis(500));
    let mut rewarded = false;
    let summary = quickstart::run(&client, &config, |progress| match progress {
        Progress::Before { reward, replies } => {
            bar.suspend(|| show("before training", reward, replies));
            bar.set_message("first step");
        }
        Progress::Step(metrics) => {
            rewarded |= metrics.reward > 0.0;
            let line = line(metrics, rewarded);
            // A terminal shows the bar; a log gets a line a step.
            if bar.is_hidden() {
                println!("step {:>2}  {line}", metrics.step);
            }
            bar.set_message(line);
            bar.inc(1);
        }
        Progress::After { reward, replies } => {
            bar.finish();
            show("after training", reward, replies);
        }
    });
    summary.await.with_context(|| format!("the parts' logs are in {}", logs.display()))
}

fn line(metrics: &StepMetrics, rewarded: bool) -> String {
    if !rewarded {
        return format!("no right reply yet; {:.0} tokens/s", metrics.tokens_per_s);
    }
    let kl = metrics.kl.map_or("-".into(), |kl| format!("{kl:+.1e}"));
    format!(
        "reward {:.2}  kl {kl}  {:.0} tokens/s  policy version {}",
        metrics.reward, metrics.tokens_per_s, metrics.policy_version
    )
}

fn show(when: &str, reward: f64, replies: &[(Pair, String)]) {
    println!("\n{when}: {:.0}% of held-out sums right", 100.0 * reward);
    let every = (replies.len() / SHOWN).max(1);
    for (pair, reply) in replies.iter().step_by(every).take(SHOWN) {
        println!("  What is {} + {}?  →  {:?}", pair.a, pair.b, reply.trim());
    }
    println!();
}

fn report(summary: &Summary, out: &std::path::Path) {
    println!(
        "held-out reward {:.2} → {:.2} in {} steps and {:.0} s",
        summary.held_out_before,
        summary.held_out_after,
        summary.steps.len(),
        summary.seconds
    );
    println!("in {}: metrics.jsonl, curve.svg, curve.png, adapter/ (PEFT)", out.display());
}
