//! What one API key may use at once.
//!
//! Written `NAME=VALUE`: with `--limits`, separated by commas, for every key; in a line of the key file for its
//! own. `none` lifts a limit.
//!
//! | name | bounds | over it |
//! | --- | --- | --- |
//! | `runs` | runs that are not deleted | refused with 403 |
//! | `queued` | operations of all runs that are not finished | waits, like a full queue of a run |
//! | `disk` | bytes of saved checkpoints | refused with 403, or by the operation's error |
//! | `bodies` | bytes of request bodies in memory | waits before a byte is read |

use std::str::FromStr;

use crate::protocol::Quota;

use super::body::{BUDGET_BYTES, DATA};

/// What a key may use.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Held by the coordinator, which counts it.
    pub(super) quota: Quota,
    /// Held by the gateway. At least that of the largest body, so that none waits for ever.
    pub(super) body_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        let quota =
            Quota { runs: Some(256), queued_operations: Some(4_096), checkpoint_bytes: Some(64 << 30) };
        Self { quota, body_bytes: BUDGET_BYTES / 2 }
    }
}

impl Limits {
    /// No limit but those of the whole service.
    pub(super) const NONE: Self = Self {
        quota: Quota { runs: None, queued_operations: None, checkpoint_bytes: None },
        body_bytes: BUDGET_BYTES,
    };

    /// Takes in one `NAME=VALUE`.
    pub(super) fn set(&mut self, limit: &str) -> Result<(), String> {
        let (name, value) = limit.split_once('=').unwrap_or((limit, ""));
        let wrong = |expected: &str| format!("`{name}` must be {expected}, or none, got {value:?}");
        let some = |value: &str| (value != "none").then(|| value.to_owned());
        let count = |value: String| value.parse::<u32>().map_err(|_| wrong("a whole number"));
        let bytes = |value: String| size(&value).ok_or_else(|| wrong("a size like 20GiB or 512MiB"));
        match name {
            "runs" => self.quota.runs = some(value).map(count).transpose()?,
            "queued" => self.quota.queued_operations = some(value).map(count).transpose()?,
            "disk" => self.quota.checkpoint_bytes = some(value).map(bytes).transpose()?,
            "bodies" => {
                let bytes = some(value).map(bytes).transpose()?.unwrap_or(BUDGET_BYTES);
                if bytes < DATA as u64 {
                    return Err(wrong(&format!("at least {}MiB, the largest body", DATA >> 20)));
                }
                self.body_bytes = bytes.min(BUDGET_BYTES);
            }
            _ => return Err(format!("unknown limit {name:?}; there are runs, queued, disk and bodies")),
        }
        Ok(())
    }
}

/// `NAME=VALUE`, separated by commas; what is not named keeps its default.
impl FromStr for Limits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut limits = Self::default();
        text.split(',').map(str::trim).filter(|limit| !limit.is_empty()).try_for_each(|l| limits.set(l))?;
        Ok(limits)
    }
}

/// A number of bytes, or of KiB, MiB, GiB or TiB.
fn size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_and_the_others_keep_their_default() {
        let limits: Limits = "runs=8, disk=20GiB,bodies=64MiB".parse().unwrap();
        assert_eq!((limits.quota.runs, limits.quota.checkpoint_bytes), (Some(8), Some(20 << 30)));
        assert_eq!(limits.body_bytes, 64 << 20);
        assert_eq!(limits.quota.queued_operations, Limits::default().quota.queued_operations);
        let lifted: Limits = "runs=none,queued=none,disk=none,bodies=none".parse().unwrap();
        assert_eq!(lifted, Limits::NONE);
        assert_eq!("".parse(), Ok(Limits::default()));
    }

    #[test]
    fn a_wrong_limit_is_refused_by_its_name() {
        let refused = |text: &str| text.parse::<Limits>().unwrap_err();
        assert_eq!(refused("runs=many"), "`runs` must be a whole number, or none, got \"many\"");
        assert_eq!(refused("disk=20GB"), "`disk` must be a size like 20GiB or 512MiB, or none, got \"20GB\"");
        assert!(refused("disk=99999999TiB").contains("`disk`"), "over 64 bits");
        assert!(refused("bodies=1MiB").contains("at least 48MiB"));
        assert!(refused("rums=1").contains("unknown limit \"rums\""));
    }
}
