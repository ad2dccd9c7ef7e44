//! What this machine has, what Lockstep makes of it, and what to do about what is wrong.

use std::{
    fs,
    net::{SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use anyhow::bail;
use clap::Args;
use lockstep::{
    kernels,
    model::ModelSource,
    pull,
    service::{COORDINATOR_PORT, ServiceError, run_here},
    store::{BlobStore, BucketLocation},
    transport::{ClusterCa, Identity, TransportError, unix_now},
};

use super::{
    arguments::{DATA_DIR, all_cores, parse_models},
    parts::Store,
};

/// Receive buffer that QUIC fills at 1 Gbit/s while a control thread waits its turn.
const UDP_BUFFER: u64 = 2 << 20;

/// Least free space for a journal and a few checkpoints.
const FREE_BYTES: u64 = 2 << 30;

/// Clocks before this are wrong: certificates are valid from 2020 on, and tokens expire.
const YEAR_2024: u64 = 1_704_067_200;

/// The last that is written with four digits.
const YEAR_9999: u64 = 253_370_764_800;

/// A CA is changed in good time: half a year before its end, in seconds.
const CA_NEAR_ITS_END: u64 = 183 * 86_400;

mod gpu;

#[derive(Args)]
pub struct Doctor {
    /// A model that this machine shall serve, as NAME=PATH; by default those that were pulled.
    #[arg(long = "model", value_name = "NAME=PATH")]
    models: Vec<String>,
    #[command(flatten)]
    store: Store,
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

/// One thing that was looked at.
enum Finding {
    Fine(String),
    /// It works, but not as well as it could: what to do.
    Poor(String, &'static str),
    /// It does not work: what to do.
    Broken(String, String),
}

use Finding::{Broken, Fine, Poor};

impl Doctor {
    /// Prints a line for each thing; fails if one does not work.
    pub fn run(self) -> anyhow::Result<()> {
        let models = match self.models.is_empty() {
            true => pull::installed(&self.data_dir),
            false => parse_models(&self.models)?,
        };
        let mut findings = vec![
            ("lockstep", Fine(env!("CARGO_PKG_VERSION").into())),
            ("cpu", cpu()),
            ("kernels", kernel_path()),
            ("memory", memory(&models)),
        ];
        findings.extend(gpu::findings());
        findings.extend([
            ("data", data(&self.data_dir)),
            ("store", store(&self.data_dir, self.store.store.as_ref())),
            ("trust", trust(&self.data_dir)),
            ("http", port("TCP", 8000, |at| TcpListener::bind(at).is_ok())),
            ("quic", port("UDP", COORDINATOR_PORT, |at| UdpSocket::bind(at).is_ok())),
            ("udp", udp_buffer()),
            ("shm", shared_memory()),
            ("clock", clock()),
        ]);
        let mut broken = 0;
        for (what, finding) in findings {
            match finding {
                Fine(is) => println!("{what:<9} {is}"),
                Poor(is, advice) => println!("{what:<9} {is}\n          better: {advice}"),
                Broken(is, advice) => {
                    broken += 1;
                    println!("{what:<9} {is}\n          do: {advice}");
                }
            }
        }
        match broken {
            0 => Ok(()),
            1 => bail!("one thing does not work"),
            n => bail!("{n} things do not work"),
        }
    }
}

fn cpu() -> Finding {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name"));
    let name = name.map_or("unknown", |name| name.trim_matches([' ', '\t', ':']));
    Fine(format!("{name} ({} cores)", all_cores()))
}

fn kernel_path() -> Finding {
    let is = format!("{} of {}", kernels::path(), kernels::paths().join(", "));
    match kernels::amx() {
        Some(Err(reason)) => Poor(
            format!("{is}; the CPU's AMX is not used: {reason}"),
            "nothing, unless `--dtype bf16` shall be faster: the other kernels serve it, too",
        ),
        _ => Fine(is),
    }
}

/// Base weights are held once, in f32; a step's activations come on top.
fn memory(models: &[ModelSource]) -> Finding {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |field: &str| -> Option<u64> {
        info.lines().find_map(|line| line.strip_prefix(field))?.trim().trim_end_matches(" kB").parse().ok()
    };
    let (Some(total), Some(available)) = (kib("MemTotal:"), kib("MemAvailable:")) else {
        return Poor("unknown".into(), "mount /proc");
    };
    let gib = |kib: u64| kib as f64 / (1 << 20) as f64;
    let is = format!("{:.1} GiB, {:.1} available", gib(total), gib(available));
    let needed: u64 = models.iter().map(|model| size_of_model(&model.path)).sum::<u64>() >> 10;
    match models.len() {
        0 => Fine(is),
        _ if needed > available => Broken(
            format!("{is}; the models' files alone are {:.1} GiB", gib(needed)),
            "serve fewer or smaller models".into(),
        ),
        count => Fine(format!("{is}; {count} models of {:.1} GiB on disk", gib(needed))),
    }
}

/// Bytes of a model's weight files as they lie on disk: quantised ones take more in memory.
fn size_of_model(path: &Path) -> u64 {
    let size = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
    match fs::read_dir(path) {
        Err(_) => size(path),
        Ok(files) => {
            let weights = files.flatten().map(|file| file.path());
            let weights = weights.filter(|path| path.extension().is_some_and(|kind| kind == "safetensors"));
            weights.map(|path| size(&path)).sum()
        }
    }
}

fn data(directory: &Path) -> Finding {
    let probe = directory.join(format!(".doctor-{}", std::process::id()));
    if !directory.exists() {
        return Fine(format!("{} is not there yet; it is made at first start", directory.display()));
    }
    let written = fs::write(&probe, b"x").and_then(|()| fs::remove_file(&probe));
    if let Err(error) = written {
        let advice = format!("make {} writable, or choose another --data-dir", directory.display());
        return Broken(format!("{}: {error}", directory.display()), advice);
    }
    match free_bytes(directory) {
        Some(free) if free < FREE_BYTES => Broken(
            format!("{} has {} MiB free", directory.display(), free >> 20),
            "make room: a service that can't write accepts nothing".into(),
        ),
        Some(free) => Fine(format!("{}, {} GiB free", directory.display(), free >> 30)),
        None => Fine(directory.display().to_string()),
    }
}

/// Writes, reads, lists and removes something in the bucket, if blobs are kept in one.
fn store(directory: &Path, wanted: Option<&BucketLocation>) -> Finding {
    let probed =
        run_here("doctor", async { Ok::<_, ServiceError>(BlobStore::probe(directory, wanted).await) });
    match probed {
        Ok(Ok(Some(location))) => Fine(format!("{location} can be read, written and swept")),
        Ok(Ok(None)) => Fine("blobs are kept in the data directory".into()),
        Ok(Err(error)) => Broken(error.to_string(), "see that this machine may use the bucket".into()),
        Err(error) => Broken(error.to_string(), "let this user start threads".into()),
    }
}

fn free_bytes(directory: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(directory).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Whether the certificates of the data directory belong together, and until when they are good.
fn trust(directory: &Path) -> Finding {
    let identities = directory.join("identity");
    let names = fs::read_dir(&identities).map_or_else(
        |_| Vec::new(),
        |files| {
            let names = files.flatten().filter_map(|file| {
                let name = file.file_name().into_string().ok()?;
                name.strip_suffix(".key").map(str::to_owned)
            });
            names.collect::<Vec<_>>()
        },
    );
    if names.is_empty() {
        return Fine("no certificates yet; they are made at first start, or with a token".into());
    }
    let ca = directory.join("ca").exists().then(|| {
        let ca = ClusterCa::open_or_create(directory)?;
        Ok::<_, TransportError>((ca.fingerprint(), ca.expires_at()?))
    });
    let ca = match ca.transpose() {
        Ok(ca) => ca,
        Err(error) => return Broken(error.to_string(), "restore DATA/ca from a backup".into()),
    };
    let mut good_until = u64::MAX;
    for name in &names {
        let advice = || format!("delete {}/{name}.* and start again", identities.display());
        match Identity::load(&identities, name) {
            Err(error) => return Broken(error.to_string(), advice()),
            Ok(identity) if ca.as_ref().is_some_and(|(ca, _)| *ca != identity.ca_fingerprint()) => {
                return Broken(format!("the certificate of {name} is of another cluster"), advice());
            }
            Ok(identity) => good_until = good_until.min(identity.validity().expires_at),
        }
    }
    let (mut said, now) =
        (format!("certificates of {}, good until {}", names.join(", "), day(good_until)), unix_now());
    let Some((_, ca_until)) = ca else { return Fine(said) };
    said += &format!("; the cluster's CA until {}", day(ca_until));
    match ca_until.saturating_sub(now) < CA_NEAR_ITS_END {
        true => Poor(said, "change it before then: lockstep cluster rotate-ca"),
        false => Fine(said),
    }
}

/// As `2026-11-30`.
fn day(unix_seconds: u64) -> String {
    let time = UNIX_EPOCH + Duration::from_secs(unix_seconds.min(YEAR_9999));
    humantime::format_rfc3339_seconds(time).to_string()[..10].to_owned()
}

fn port(kind: &str, port: u16, free: impl Fn(SocketAddr) -> bool) -> Finding {
    match free(SocketAddr::from(([127, 0, 0, 1], port))) {
        true => Fine(format!("{kind} port {port} is free")),
        false => Poor(
            format!("{kind} port {port} is taken (by a running lockstep?)"),
            "choose another with --http or --listen, if it is not lockstep's",
        ),
    }
}

fn udp_buffer() -> Finding {
    let limit = fs::read_to_string("/proc/sys/net/core/rmem_max").ok();
    match limit.and_then(|limit| limit.trim().parse::<u64>().ok()) {
        Some(limit) if limit < UDP_BUFFER => Poor(
            format!("receive buffers of at most {} KiB", limit >> 10),
            "between machines: sysctl -w net.core.rmem_max=7500000 net.core.wmem_max=7500000",
        ),
        Some(limit) => Fine(format!("receive buffers of up to {} KiB", limit >> 10)),
        None => Fine("receive buffers are not known".into()),
    }
}

/// Ranks of one machine exchange gradients here.
fn shared_memory() -> Finding {
    match free_bytes(Path::new("/dev/shm")) {
        Some(free) if free < 256 << 20 => Poor(
            format!("/dev/shm has {} MiB free", free >> 20),
            "give containers a larger one (--shm-size, or an emptyDir with medium Memory)",
        ),
        Some(free) => Fine(format!("/dev/shm has {} MiB free", free >> 20)),
        None => {
            Poor("there is no /dev/shm".into(), "mount a tmpfs there; ranks of this machine use QUIC without")
        }
    }
}

fn clock() -> Finding {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    match now.map_or(0, |since| since.as_secs()) {
        now if now < YEAR_2024 => Broken(
            "it says a time before 2024".into(),
            "set the clock: certificates and tokens need it".into(),
        ),
        _ => Fine("plausible".into()),
    }
}
