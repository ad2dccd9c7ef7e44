//! The rows of a model: Lockstep's figure, its share of what the chip can do, and a peer's.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::{Figures, GpuBenchConfig, Peak, percent, work::Work};
use crate::{
    bench::{machine::round, peer},
    gpu::DeviceChoice,
    model::ModelConfig,
};

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GpuRow {
    pub model: String,
    pub work: String,
    pub unit: &'static str,
    pub lockstep: f64,
    /// Percent of the chip's peak: of its operations in training and prefill, of its memory's bandwidth in decoding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent_of_peak: Option<f64>,
    /// Of decoding: percent of the steps that were replayed from a recording.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replayed_percent: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_figure: Option<f64>,
    /// How many times as fast as the peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

/// All of a model.
pub(super) struct Measured {
    pub name: String,
    pub model_config: ModelConfig,
    pub figures: Figures,
    pub peers: Vec<PeerFigure>,
    pub left_out: Vec<String>,
}

/// A peer's figure of the row with this work.
pub(super) struct PeerFigure {
    work: String,
    peer: &'static str,
    figure: f64,
}

fn train_work(config: &GpuBenchConfig) -> String {
    format!("training step {} x {}", config.workload.train.0, config.workload.train.1)
}

fn prefill_work(config: &GpuBenchConfig) -> String {
    format!("prefill {} x {}", config.workload.prefill.0, config.workload.prefill.1)
}

fn decode_work(streams: u32) -> String {
    format!("decode, batch {streams}")
}

impl Measured {
    pub(super) fn rows(&self, config: &GpuBenchConfig, peak: Option<&Peak>) -> Vec<GpuRow> {
        let work = Work::of(&self.model_config, config.dtype);
        let of_operations = |tokens_per_s: f64, operations: f64| {
            peak.map(|peak| percent(tokens_per_s * operations, peak.tflops * 1e12))
        };
        let trained = self.figures.step_tokens_per_s;
        let prefilled = self.figures.prefill_tokens_per_s;
        let mut rows = vec![
            self.row(
                train_work(config),
                "tokens/s",
                trained,
                of_operations(trained, work.trained(config.workload.train.1, config.workload.rank)),
            ),
            self.row(
                prefill_work(config),
                "tokens/s",
                prefilled,
                of_operations(prefilled, work.prefilled(config.workload.prefill.1)),
            ),
        ];
        let decoded = self.figures.decode_tokens_per_s.iter().zip(&self.figures.replayed_percent);
        for (&streams, (decoded, replayed)) in config.workload.decode.iter().zip(decoded) {
            let Some(decoded) = *decoded else { continue };
            // In the middle of what is drawn.
            let positions = f64::from(config.workload.prompt) + f64::from(config.workload.new) / 2.0;
            let bytes = work.decoded_bytes(streams, positions);
            let of_bandwidth =
                peak.map(|peak| percent(decoded / f64::from(streams) * bytes, peak.gb_per_s * 1e9));
            let row = self.row(decode_work(streams), "tokens/s", decoded, of_bandwidth);
            rows.push(GpuRow { replayed_percent: *replayed, ..row });
        }
        rows.push(self.row("publish".into(), "ms", round(self.figures.publish_s * 1e3, 1), None));
        rows.push(self.row("sampler against trainer, at most".into(), "nats", self.figures.parity_max, None));
        rows
    }

    /// What of Lockstep's figures is not there.
    pub(super) fn without_a_figure(&self, config: &GpuBenchConfig) -> Vec<String> {
        let decoded = config.workload.decode.iter().zip(&self.figures.decode_tokens_per_s);
        let absent = decoded.filter(|(_, figure)| figure.is_none());
        let why = "the prompt alone took as long as the whole draw; more --new or --repeats tell them apart";
        absent.map(|(streams, _)| format!("{}, {}: {why}", self.name, decode_work(*streams))).collect()
    }

    fn row(&self, work: String, unit: &'static str, lockstep: f64, percent_of_peak: Option<f64>) -> GpuRow {
        let peer = self.peers.iter().find(|peer| peer.work == work);
        GpuRow {
            model: self.name.clone(),
            work,
            unit,
            lockstep,
            percent_of_peak,
            replayed_percent: None,
            peer: peer.map(|peer| peer.peer),
            peer_figure: peer.map(|peer| peer.figure),
            ratio: peer.map(|peer| round(lockstep / peer.figure, 2)),
        }
    }
}

/// What the peers make of the model, and who is left out and why.
pub(super) fn peers(config: &GpuBenchConfig, name: &str, model: &Path) -> (Vec<PeerFigure>, Vec<String>) {
    let (mut figures, mut left_out) = (Vec::new(), Vec::new());
    let Some(python) = &config.python else { return (figures, left_out) };
    if !model.is_dir() {
        left_out.push(format!("{name}: the peers read directories, no GGUF file"));
        return (figures, left_out);
    }
    let (batch, seq) = config.workload.train;
    let training = format!("--batch {batch} --seq {seq} --rank {}", config.workload.rank);
    let (batch, prompt) = config.workload.prefill;
    let prefill = format!("--batch {batch} --prompt {prompt} --new 1");
    let decoding = |streams: &u32| {
        let arguments =
            format!("--batch {streams} --prompt {} --new {}", config.workload.prompt, config.workload.new);
        (arguments, "/decode_tokens_per_s", decode_work(*streams))
    };
    let drawn = config.workload.decode.iter().map(decoding);
    let drawn = [(prefill, "/prefill_tokens_per_s", prefill_work(config))].into_iter().chain(drawn);
    for (script, who, asked) in [
        (peer::TRAIN, "PEFT", vec![(training, "/step_tokens_per_s", train_work(config))]),
        (peer::GENERATE, "transformers", drawn.collect()),
    ] {
        if let Some(missing) = script.missing(python) {
            left_out.push(missing);
            continue;
        }
        for (arguments, at, work) in asked {
            match ask(config, python, script, model, &arguments) {
                Ok(said) => match said.pointer(at).and_then(Value::as_f64) {
                    Some(figure) => figures.push(PeerFigure { work, peer: who, figure }),
                    None => left_out.push(format!("{name}: {who} said nothing of {at}")),
                },
                Err(why) => left_out.push(format!("{name}, {work}: {why}")),
            }
        }
    }
    (figures, left_out)
}

fn ask(
    config: &GpuBenchConfig,
    python: &Path,
    script: peer::Script,
    model: &Path,
    arguments: &str,
) -> Result<Value, String> {
    let (device, card) = match config.device {
        DeviceChoice::Cuda(ordinal) => ("cuda", Some(ordinal)),
        _ => ("cpu", None),
    };
    let mut all: Vec<String> = arguments.split(' ').map(str::to_owned).collect();
    all.extend(["--model".to_owned(), model.display().to_string()]);
    for (flag, value) in [
        ("--dtype", config.dtype.to_string()),
        ("--device", device.to_owned()),
        ("--threads", config.workload.threads.to_string()),
        ("--repeats", config.workload.repeats.to_string()),
    ] {
        all.extend([flag.to_owned(), value]);
    }
    peer::run_on(card, python, script, &all).map_err(|why| why.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        bench::gpu::{Shape, Workload},
        kernels::WeightDtype,
    };

    fn config() -> GpuBenchConfig {
        GpuBenchConfig {
            program: "lockstep".into(),
            device: DeviceChoice::Cuda(0),
            dtype: WeightDtype::Bf16,
            plain_decoding: false,
            shapes: vec![Shape::Qwen3_8b],
            models: Vec::new(),
            folder: None,
            workload: Workload {
                threads: 1,
                repeats: 1,
                rank: 16,
                train: (8, 1024),
                prefill: (8, 1024),
                decode: vec![1, 256],
                prompt: 64,
                new: 128,
            },
            python: None,
            tflops: None,
            gb_per_s: None,
        }
    }

    /// Figures that a chip without any loss would give are all of its peak.
    #[test]
    fn shares_are_of_what_the_chip_can_do() {
        let (config, peak) = (config(), Peak { tflops: 1000.0, gb_per_s: 4000.0, source: "made up".into() });
        let model_config = Shape::Qwen3_8b.config();
        let work = Work::of(&model_config, WeightDtype::Bf16);
        let decode = |streams: u32| 4e12 / work.decoded_bytes(streams, 128.0) * f64::from(streams);
        let figures = Figures {
            engine: "cuda NVIDIA X".into(),
            step_tokens_per_s: 1e15 / work.trained(1024, 16),
            fwdbwd_tokens_per_s: 0.0,
            prefill_tokens_per_s: 0.5e15 / work.prefilled(1024),
            decode_tokens_per_s: vec![Some(decode(1)), Some(decode(256) / 4.0)],
            replayed_percent: vec![Some(98.5), None],
            publish_s: 0.0125,
            parity_max: 0.001,
        };
        let work = train_work(&config);
        let peers = vec![PeerFigure { work, peer: "PEFT", figure: figures.step_tokens_per_s / 2.0 }];
        let mut measured =
            Measured { name: "qwen3-8b".into(), model_config, figures, peers, left_out: Vec::new() };
        let rows = measured.rows(&config, Some(&peak));
        let shares: Vec<_> = rows.iter().map(|row| row.percent_of_peak).collect();
        assert_eq!(shares, [Some(100.0), Some(50.0), Some(100.0), Some(25.0), None, None]);
        let replayed: Vec<_> = rows.iter().map(|row| row.replayed_percent).collect();
        assert_eq!(replayed, [None, None, Some(98.5), None, None, None]);
        assert_eq!((rows[0].peer, rows[0].ratio), (Some("PEFT"), Some(2.0)));
        assert_eq!((rows[4].lockstep, rows[4].unit, rows[4].ratio), (12.5, "ms", None));
        assert!(measured.rows(&config, None).iter().all(|row| row.percent_of_peak.is_none()));
        assert_eq!(measured.without_a_figure(&config), Vec::<String>::new());

        // It goes through JSON, as from the process that measures.
        measured.figures.decode_tokens_per_s[0] = None;
        let said = serde_json::to_string(&measured.figures).unwrap();
        measured.figures = serde_json::from_str(&said).unwrap();
        let works: Vec<_> = measured.rows(&config, None).into_iter().map(|row| row.work).collect();
        assert_eq!((works.len(), works[2].as_str()), (5, "decode, batch 256"));
        let absent = measured.without_a_figure(&config);
        assert!(absent.len() == 1 && absent[0].starts_with("qwen3-8b, decode, batch 1: "), "{absent:?}");
    }
}
