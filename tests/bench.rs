//! `lockstep bench`, run as a user runs it: the smallest sizes, since a figure is no test.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::{Command, ExitStatus},
};

use lockstep::{kernels, model::tiny};
use serde_json::Value;

/// The one line of JSON that a benchmark prints when all goes well.
fn bench(arguments: &[&str]) -> Value {
    let (done, said) = bench_said(arguments);
    assert!(done.success(), "{said}");
    said
}

/// And how it ends.
fn bench_said(arguments: &[&str]) -> (ExitStatus, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .arg("bench")
        .args(arguments)
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 1, "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    (output.status, serde_json::from_str(lines[0]).expect("a line of JSON"))
}

fn positive(value: &Value) -> bool {
    value.as_f64().is_some_and(|value| value > 0.0)
}

#[test]
fn allreduce_measures_real_processes_over_both_carriers() {
    let said = bench(&["allreduce", "--mb", "1,3", "--processes", "2,3", "--repeats", "2", "--json"]);
    let results = said["results"].as_array().expect("rows");
    let rows: Vec<_> = results
        .iter()
        .map(|row| {
            (
                row["processes"].as_u64().unwrap(),
                row["carrier"].as_str().unwrap(),
                row["megabytes"].as_u64().unwrap(),
            )
        })
        .collect();
    let (memory, quic) = ("shared_memory", "quic");
    let of = |n| [(n, memory, 1), (n, memory, 3), (n, quic, 1), (n, quic, 3)];
    assert_eq!(rows, [of(2), of(3)].concat());
    for row in results {
        assert!(
            ["seconds", "moved_mb_per_s", "cpu_s_per_gb"].iter().all(|key| positive(&row[*key])),
            "{row}"
        );
        assert!(row["seconds_min"].as_f64() <= row["seconds"].as_f64(), "{row}");
    }
    assert!(
        positive(&said["memcpy"]["one_thread_gb_per_s"]) && positive(&said["quinn_bulk"]["cpu_s_per_gb"])
    );
    assert!(said["machine"]["cores"].as_u64() > Some(0), "{said}");
}

/// A model of a few kilobytes, and the arguments that name it.
fn tiny_model() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    tiny::write(directory.path(), &tiny::config(), 7).expect("a model directory");
    let model = format!("--model={}", directory.path().display());
    (directory, model)
}

#[test]
fn the_engine_is_measured_under_the_peers_keys() {
    let (_directory, model) = tiny_model();
    let common = [model.as_str(), "--threads=1", "--repeats=2", "--json"];
    let run = |own: &[&str]| bench(&[own, &common].concat());

    let said = run(&["train", "--batch", "3", "--seq", "16", "--rank", "2", "--dtype", "bf16"]);
    let keys = ["fwd_tokens_per_s", "fwdbwd_tokens_per_s", "step_tokens_per_s", "peak_rss_mib"];
    assert!(keys.iter().all(|key| positive(&said[*key])), "{said}");
    assert_eq!((&said["dtype"], &said["rank"]), (&"bf16".into(), &2.into()));
    // Not the name of its bits, which it has with others.
    assert_eq!(said["machine"]["kernels"], kernels::path());

    let said = run(&["decode", "--batch", "2", "--prompt", "8", "--new", "40"]);
    let keys = ["prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_mib"];
    assert!(keys.iter().all(|key| positive(&said[*key])), "{said}");

    let said = run(&["prefill", "--batch", "2", "--prompt", "8"]);
    assert!(positive(&said["prefill_tokens_per_s"]) && said.get("decode_tokens_per_s").is_none(), "{said}");

    let said = run(&["parity", "--batch", "2", "--prompt", "8", "--new", "8", "--rank", "2"]);
    assert!(said["tokens"].as_u64() > Some(2) && said["policy_version"] == 3, "{said}");
    // What README promises.
    assert!(said["gap_max_abs"].as_f64() < Some(1e-4), "{said}");
}

/// The emulation stands in for the GPU: what is measured of it means nothing, that it is measured and shared out does.
#[test]
fn a_gpu_is_measured_from_random_weights() {
    let models = tempfile::tempdir().expect("a temporary directory");
    let models = format!("--models-dir={}", models.path().display());
    let sizes = "--shape tiny --train 2x16 --prefill 2x8 --decode 1,3 --prompt 8 --new 32 --rank 2";
    let common = ["gpu", "--device", "emulated", "--repeats", "1", "--threads", "1", "--json", &models];
    let run = |more: &[&str]| {
        let sizes: Vec<&str> = sizes.split(' ').collect();
        bench(&[&common[..], &sizes, more].concat())
    };
    let said = run(&["--peak-tflops", "1", "--peak-gb-per-s", "10"]);
    let rows = said["rows"].as_array().expect("rows");
    let works: Vec<_> = rows.iter().map(|row| row["work"].as_str().unwrap()).collect();
    let expected = ["training step 2 x 16", "prefill 2 x 8", "decode, batch 1", "decode, batch 3", "publish"];
    assert_eq!(works[..5], expected);
    for row in &rows[..4] {
        assert!(positive(&row["lockstep"]) && row["percent_of_peak"].is_f64(), "{row}");
        assert_eq!((&row["model"], &row["unit"]), (&"tiny".into(), &"tokens/s".into()));
    }
    for row in &rows[2..4] {
        assert!(row["replayed_percent"].as_f64() > Some(50.0), "steps that come again are replayed: {row}");
    }
    assert!(positive(&rows[4]["lockstep"]) && rows[4].get("percent_of_peak").is_none(), "{said}");
    // What README promises.
    assert!(rows[5]["lockstep"].as_f64() < Some(1e-4), "{said}");
    assert_eq!(said["machine"]["kernels"], "emulated");
    assert_eq!(said["left_out"], serde_json::json!(["all-reduce: no GPU computes"]));

    assert_eq!(said["failed"], serde_json::json!([]));

    // The model is there now, and of no chip anything is known. One that fails takes no figures of the others with it, and
    // does not pass for one that was measured.
    let sizes: Vec<&str> = sizes.split(' ').collect();
    let more = ["--dtype", "f32", "--plain-decoding", "--model", "/nowhere"];
    let (done, said) = bench_said(&[&common[..], &sizes, &more].concat());
    assert!(said["peak"].is_null() && said["rows"][0].get("percent_of_peak").is_none(), "{said}");
    assert_eq!(said["rows"].as_array().map(Vec::len), Some(6), "{said}");
    assert_eq!(said["rows"][2]["replayed_percent"], 0.0, "{said}");
    assert!(said["failed"][0].as_str().is_some_and(|why| why.starts_with("nowhere: ")), "{said}");
    assert!(!done.success(), "{done}");
}

/// The script that tests a GPU, where another machine has built and there is no Python: it ends as the benchmark does.
#[test]
fn the_test_of_a_gpu_needs_no_python_and_ends_as_the_benchmark() {
    let tools = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| tools.path().join(name);
    for tool in ["bash", "dirname", "realpath", "grep"] {
        let folders = ["/bin", "/usr/bin", "/usr/local/bin"].map(|folder| Path::new(folder).join(tool));
        symlink(folders.iter().find(|path| path.exists()).expect(tool), at(tool)).expect("a link");
    }
    for (name, script) in [
        ("nvidia-smi", "echo 'GPU 0: none'"),
        ("tests", ":"),
        ("passes", "[ $1 = doctor ] || [ \"$*\" = 'bench gpu' ]"),
        ("fails", "[ $1 = doctor ]"),
    ] {
        fs::write(at(name), format!("#!/bin/bash\n{script}\n")).expect("a script");
        fs::set_permissions(at(name), Permissions::from_mode(0o755)).expect("its mode");
    }
    let run = |lockstep: &str| {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gpu/run"));
        let output = command.args([at(lockstep), at("tests")]).env("PATH", tools.path()).output();
        let output = output.expect("it starts");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).contains("passed with one GPU"))
    };
    assert_eq!(run("passes"), (true, true));
    assert_eq!(run("fails"), (false, false));
}

#[test]
fn the_gateway_is_measured_with_its_processes() {
    let said = bench(&["gateway", "--connections", "1,2", "--requests", "5", "--json"]);
    let results = said["results"].as_array().expect("rows");
    assert_eq!(results.len(), 4, "{said}");
    for row in results {
        assert!(positive(&row["median_ms"]) && positive(&row["requests_per_s"]), "{row}");
        assert_eq!(row["requests"].as_u64(), row["connections"].as_u64().map(|n| n * 5));
    }
}

#[test]
fn a_start_is_measured_on_a_new_and_on_a_used_directory() {
    let (_directory, model) = tiny_model();
    let said = bench(&[
        "start",
        &model,
        "--threads=2",
        "--repeats=1",
        "--tokens=16",
        "--nodes=2",
        "--cold",
        "--json",
    ]);
    for which in ["fresh", "used"] {
        let start = &said[which];
        let phases = ["coordinator_s", "ready_s", "run_s", "forward_backward_s", "step_s"];
        let times = phases.map(|phase| start[phase].as_f64().expect("a time"));
        assert!(times[0] > 0.0 && times.is_sorted(), "{said}");
        assert!(start["nodes_pss_mib"].as_f64() < start["nodes_rss_mib"].as_f64(), "{said}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused_by_its_flag() {
    for (arguments, flag) in [
        (["allreduce", "--processes", "1"], "--processes"),
        (["allreduce", "--mb", "0"], "--mb"),
        (["allreduce", "--repeats", "0"], "--repeats"),
        (["publish", "--rank", "100000"], "--rank"),
        (["gateway", "--connections", "0"], "--connections"),
        (["train", "--model", "/nowhere"], "--model"),
        (["gpu", "--device", "cpu"], "--device"),
        (["start", "--model", "/nowhere"], "--model"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .arg("bench")
            .args(arguments)
            .output()
            .expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(flag), "{said}");
    }
}
