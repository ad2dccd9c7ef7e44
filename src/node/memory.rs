//! How much memory this process may use, as the kernel says.

use std::fs;

/// The machine's memory, or the limit of this process's control group where that is less; `None`
/// where neither is said.
pub(super) fn machine_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|info| total(&info));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = limit_files(&groups).into_iter().filter_map(|path| limit(&fs::read_to_string(path).ok()?));
    machine.into_iter().chain(limits).min()
}

/// `MemTotal` of /proc/meminfo.
fn total(info: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Where the limits of a process's groups stand, given its /proc/self/cgroup: the group of version
/// 2 and those above it, and version 1's group of memory.
fn limit_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        if controllers.is_empty() {
            let mut group = group.trim_end_matches('/');
            loop {
                files.push(format!("/sys/fs/cgroup{group}/memory.max"));
                let Some((above, _)) = group.rsplit_once('/') else { break };
                group = above;
            }
        } else if controllers.split(',').any(|controller| controller == "memory") {
            // Inside a container the group's own files are mounted at the top.
            files.push(format!("/sys/fs/cgroup/memory{group}/memory.limit_in_bytes"));
            files.push("/sys/fs/cgroup/memory/memory.limit_in_bytes".to_owned());
        }
    }
    files
}

/// A limit in bytes; `max` is none.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_machines_memory() {
        let info = "MemTotal:       24544024 kB\nMemFree:        16777216 kB\n";
        assert_eq!(total(info), Some(24_544_024 * 1024));
        assert_eq!(total("MemFree: 1 kB\n"), None);
        assert_eq!(total("MemTotal: much\n"), None);
    }

    #[test]
    fn looks_for_limits_where_both_versions_have_them() {
        let two = limit_files("0::/user.slice/job.scope\n");
        let expected = ["/user.slice/job.scope", "/user.slice", ""];
        assert_eq!(two, expected.map(|group| format!("/sys/fs/cgroup{group}/memory.max")));
        assert_eq!(limit_files("0::/\n"), ["/sys/fs/cgroup/memory.max"]);
        let one = limit_files("11:cpu,cpuacct:/a\n4:memory:/docker/7\n");
        assert_eq!(
            one,
            [
                "/sys/fs/cgroup/memory/docker/7/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes"
            ]
        );
        assert_eq!((limit("max\n"), limit("4096\n")), (None, Some(4096)));
    }

    #[test]
    fn this_machine_has_some() {
        // Whatever runs these tests has more than 64 MiB, and less than a PiB.
        let bytes = machine_bytes().unwrap();
        assert!((1 << 26..1 << 50).contains(&bytes), "{bytes}");
    }
}
