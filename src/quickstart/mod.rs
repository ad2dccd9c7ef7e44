//! `lockstep quickstart`: a real model learns to answer a sum, on a local cluster, in minutes.
//!
//! ```text
//!   task    prompts "What is 7 + 6?", their reward, which are held out
//!   run     the loop a user would write: sample, reward, forward_backward, optim_step, publish
//!   report  metrics.jsonl, the table of samples before and after
//!   chart   curve.svg and curve.png
//! ```
//!
//! It is a client like any other: everything goes through [`ServiceClient`](crate::client::ServiceClient).

mod chart;
mod report;
mod run;
mod task;

pub use chart::{ChartError, draw};
pub use report::StepMetrics;
pub use run::{Progress, QuickstartConfig, QuickstartError, Summary, run};
pub use task::{Dealer, Pair, held_out, prompt, reward, training_pairs};
