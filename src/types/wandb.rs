use serde::{Deserialize, Serialize};

use super::InvalidInput;

/// Longest name that Weights & Biases takes.
const MAX_NAME_CHARS: usize = 128;

/// What a project's name may not contain, as Weights & Biases says.
const FORBIDDEN: [char; 6] = ['/', '\\', '#', '?', '%', ':'];

/// Where a run's training metrics are streamed on Weights & Biases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WandbConfig {
    /// User or team that the project belongs to; the one of the login when absent.
    #[serde(default)]
    pub entity: Option<String>,
    /// Project name: 1 to 128 characters, not blank, none of `/ \ # ? % :`.
    pub project: String,
    /// Name of the run there, 1 to 128 characters and not blank; W&B picks one when absent.
    #[serde(default)]
    pub name: Option<String>,
}

impl WandbConfig {
    /// Longest name of a run, in characters.
    pub const NAME_MAX: usize = MAX_NAME_CHARS;

    /// Refuses names that Weights & Biases would refuse, before the run starts.
    pub fn validate(&self) -> Result<(), InvalidInput> {
        check("project", &self.project)?;
        if let Some(found) = self.project.chars().find(|c| FORBIDDEN.contains(c)) {
            return Err(InvalidInput::new(
                "project",
                format!("may not contain {found:?}, got {:?}", self.project),
            ));
        }
        self.entity.as_deref().map_or(Ok(()), |entity| check("entity", entity))?;
        self.name.as_deref().map_or(Ok(()), |name| check("name", name))
    }
}

fn check(field: &str, name: &str) -> Result<(), InvalidInput> {
    if name.trim().is_empty() {
        return Err(InvalidInput::new(field, "must not be empty"));
    }
    match name.chars().count() {
        0..=MAX_NAME_CHARS => Ok(()),
        count => Err(InvalidInput::new(field, format!("at most {MAX_NAME_CHARS} characters, got {count}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(project: &str, name: Option<&str>) -> String {
        let config = WandbConfig { entity: None, project: project.into(), name: name.map(Into::into) };
        config.validate().unwrap_err().field
    }

    #[test]
    fn a_project_with_and_without_a_name_is_accepted() {
        for name in [None, Some("first: try/1".to_owned())] {
            WandbConfig { entity: None, project: "p".repeat(128), name }.validate().unwrap();
        }
    }

    #[test]
    fn an_empty_project_is_refused() {
        assert_eq!(refused("", None), "project");
        assert_eq!(refused("  ", None), "project");
    }

    #[test]
    fn a_project_with_a_forbidden_character_is_refused() {
        for c in FORBIDDEN {
            assert_eq!(refused(&format!("a{c}b"), None), "project");
        }
    }

    #[test]
    fn a_name_too_long_is_refused() {
        assert_eq!(refused(&"p".repeat(129), None), "project");
        assert_eq!(refused("p", Some(&"n".repeat(129))), "name");
    }

    #[test]
    fn an_empty_name_is_refused() {
        assert_eq!(refused("p", Some("")), "name");
    }

    #[test]
    fn the_name_may_be_absent_in_json() {
        let config: WandbConfig = serde_json::from_str(r#"{"project": "p"}"#).unwrap();
        assert_eq!(config, WandbConfig { entity: None, project: "p".into(), name: None });
    }
}
