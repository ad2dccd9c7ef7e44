//! Which machine this is.

/// Names this boot of this machine: ranks whose nodes share it may share memory. Machines
/// cloned from one image have equal machine ids, and containers of one machine equal boot ids, so
/// both are in it.
pub(super) fn identity() -> String {
    let read = |path: &str| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    match (read("/etc/machine-id"), read("/proc/sys/kernel/random/boot_id")) {
        (None, None) => {
            // Nothing to tell machines apart by: share with this process alone.
            format!("process-{}", std::process::id())
        }
        (machine, boot) => format!("{}/{}", machine.unwrap_or_default(), boot.unwrap_or_default()),
    }
}
