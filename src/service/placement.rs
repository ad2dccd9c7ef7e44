//! Where a node stands in its cluster, as whoever launched it may have said: flags, then
//! `LOCKSTEP_*`, then what known launchers set. A hint: the coordinator assigns the ranks.

use std::fmt;

/// Port of a coordinator that only a host is known of.
pub const COORDINATOR_PORT: u16 = 7700;

/// Variables that number a launcher's processes: `(launcher, variable)`, the first that is set wins.
const NUMBERS: [(&str, &str); 6] = [
    ("SkyPilot", "SKYPILOT_NODE_RANK"),
    ("LeaderWorkerSet", "LWS_WORKER_INDEX"),
    ("JobSet", "JOB_COMPLETION_INDEX"),
    ("Slurm", "SLURM_PROCID"),
    ("torchrun", "GROUP_RANK"),
    ("torchrun", "RANK"),
];

/// Variables that name the first machine, or a list that begins with it.
const LEADERS: [(&str, &str); 3] = [
    ("SkyPilot", "SKYPILOT_NODE_IPS"),
    ("LeaderWorkerSet", "LWS_LEADER_ADDRESS"),
    ("torchrun", "MASTER_ADDR"),
];

/// A value and who said it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub value: String,
    pub by: String,
}

/// What a node is called and whom it calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    pub name: Option<Said>,
    /// HOST:PORT.
    pub coordinator: Option<Said>,
}

impl Placement {
    /// From what was given, or else from the environment that `variable` reads.
    pub fn new(
        name: Option<String>,
        coordinator: Option<String>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Self {
        let given = |value: Option<String>| value.map(|value| Said { value, by: "given".into() });
        let set = |of: &[(&str, &str)]| {
            let found = of.iter().find_map(|(launcher, name)| {
                let value = variable(name).filter(|value| !value.trim().is_empty())?;
                Some((value, format!("{name} of {launcher}")))
            });
            found.map(|(value, by)| Said { value, by })
        };
        let number = || {
            let said = set(&NUMBERS).filter(|said| said.value.parse::<u32>().is_ok())?;
            Some(Said { value: format!("node-{}", said.value), by: said.by })
        };
        let leader = || {
            let said = set(&LEADERS)?;
            let host = said.value.split_whitespace().next()?;
            let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
            Some(Said { value: format!("{host}:{COORDINATOR_PORT}"), by: said.by })
        };
        Self { name: given(name).or_else(number), coordinator: given(coordinator).or_else(leader) }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |said: &Option<Said>| match said {
            Some(Said { value, by }) => format!("{value} ({by})"),
            None => "not known".to_owned(),
        };
        writeln!(f, "name         {}", line(&self.name))?;
        write!(f, "coordinator  {}", line(&self.coordinator))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(environment: &[(&str, &str)]) -> (Option<String>, Option<String>) {
        let variable = |name: &str| {
            environment.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        let Placement { name, coordinator } = Placement::new(None, None, variable);
        (name.map(|said| said.value), coordinator.map(|said| said.value))
    }

    #[test]
    fn launchers_are_understood() {
        let some = |name: &str, coordinator: &str| (Some(name.to_owned()), Some(coordinator.to_owned()));
        assert_eq!(placed(&[("RANK", "3"), ("MASTER_ADDR", "head")]), some("node-3", "head:7700"));
        assert_eq!(
            placed(&[("SKYPILOT_NODE_RANK", "1"), ("SKYPILOT_NODE_IPS", "10.0.0.1\n10.0.0.2")]),
            some("node-1", "10.0.0.1:7700")
        );
        assert_eq!(
            placed(&[("LWS_WORKER_INDEX", "0"), ("LWS_LEADER_ADDRESS", "lws-0.lws.ns")]),
            some("node-0", "lws-0.lws.ns:7700")
        );
        assert_eq!(placed(&[("SLURM_PROCID", "2")]), (Some("node-2".into()), None));
        assert_eq!(placed(&[("JOB_COMPLETION_INDEX", "7")]), (Some("node-7".into()), None));
        assert_eq!(placed(&[("MASTER_ADDR", "fe80::1")]).1, Some("[fe80::1]:7700".into()));
    }

    #[test]
    fn what_is_given_wins_and_nonsense_is_not_taken() {
        let variable = |name: &str| (name == "RANK").then(|| "3".to_owned());
        let placement = Placement::new(Some("gpu-1".into()), None, variable);
        assert_eq!(placement.name, Some(Said { value: "gpu-1".into(), by: "given".into() }));
        assert_eq!(placed(&[("RANK", "x"), ("MASTER_ADDR", " ")]), (None, None));
    }
}
