//! `lockstep bench`, run as a user runs it: the smallest sizes, since a figure is no test.

use std::process::Command;

use serde_json::Value;

/// The one line of JSON that a benchmark prints.
fn bench(arguments: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .arg("bench")
        .args(arguments)
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 1, "{said}");
    serde_json::from_str(lines[0]).expect("a line of JSON")
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

#[test]
fn what_cannot_be_measured_is_refused_by_its_flag() {
    for (arguments, flag) in [
        (["allreduce", "--processes", "1"], "--processes"),
        (["allreduce", "--mb", "0"], "--mb"),
        (["allreduce", "--repeats", "0"], "--repeats"),
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
