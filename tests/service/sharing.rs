//! Node processes of one machine have one copy of a model's weights in its memory.

use std::{fs, path::Path};

use lockstep::model::{ModelConfig, tiny};

use crate::up::{Up, connect, lockstep, step, train, wait_until_gone};

/// What the kernel says of a process's mapping of a packed file; sizes in KiB.
#[derive(Debug)]
struct Mapping {
    /// Device and inode, which name the file.
    file: String,
    size: u64,
    /// In memory.
    resident: u64,
    /// The same, each page divided by how many processes have it.
    proportional: u64,
    /// Copies that only this process has, because it wrote to them. (Dirty are all of a file in memory, a tmpfs.)
    copied: u64,
}

impl Mapping {
    fn of(pid: u32) -> Self {
        let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("a living node");
        let mut lines = maps.lines().skip_while(|line| !line.ends_with(".pack"));
        let first = lines.next().expect("it has mapped packed weights");
        let words: Vec<&str> = first.split_whitespace().collect();
        let lines: Vec<&str> = lines.take_while(|line| line.contains(" kB")).collect();
        let kib = |name: &str| {
            let line = lines.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).expect("a size")
        };
        Self {
            file: format!("{} {}", words[3], words[4]),
            size: kib("Size"),
            resident: kib("Rss"),
            proportional: kib("Pss"),
            copied: kib("Anonymous"),
        }
    }
}

fn model_command(what: &str, data: &Path) -> String {
    let output = lockstep().args(["model", what, "--data-dir"]).arg(data).output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn node_processes_map_one_copy_of_the_weights() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    // 9 MiB of weights: pages enough to be counted.
    let config = ModelConfig {
        hidden_size: 256,
        intermediate_size: 512,
        num_layers: 4,
        num_heads: 4,
        head_dim: 64,
        ..tiny::config()
    };
    tiny::write(&directory.join("model"), &config, 7).expect("a model directory");
    let mut written = None;
    for start in 0..2 {
        let up = Up::start(directory, &["--nodes", "2", "--trainers", "2"]);
        let service = connect(directory);
        let training = train(&service);
        step(&training);
        let nodes = futures::executor::block_on(service.cluster_status()).expect("status").nodes;
        let mapped: Vec<Mapping> = nodes.iter().map(|node| Mapping::of(node.pid)).collect();
        let [one, other] = &mapped[..] else { panic!("two nodes: {mapped:?}") };
        assert_eq!(one.file, other.file);
        assert_eq!(written.get_or_insert_with(|| one.file.clone()), &one.file, "start {start} writes none");
        for mapping in &mapped {
            assert!(mapping.size > 8 << 10 && mapping.copied == 0, "{mapping:?}");
            assert!(mapping.resident > mapping.size * 9 / 10, "a step reads all weights: {mapping:?}");
        }
        let (counted, there) = (one.resident + other.resident, one.proportional + other.proportional);
        assert!(there < counted * 6 / 10, "{there} KiB are in memory for {counted} that two processes see");
        drop((training, service));
        up.signal("-INT");
        assert!(up.ended_well(), "Ctrl-C ends it cleanly");
        wait_until_gone(directory);
    }

    let data = directory.join("data");
    let listed = model_command("list", &data);
    assert!(listed.starts_with("packed, ") && listed.contains("f32"), "{listed}");
    assert!(model_command("verify", &data).contains("as it was written"));
    assert!(model_command("clear", &data).starts_with("removed "));
    assert_eq!(model_command("list", &data), "");
}
