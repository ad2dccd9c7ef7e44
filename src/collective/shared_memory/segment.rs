//! Where the files of a rank set lie, and that none stays behind.
//!
//! A name lives from the making of its file to the moment when every rank has it open, some
//! milliseconds. What a killed process leaves in them is swept by the next rank set of the host:
//! each name says which process made it (the control page says it inside).

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process,
};

use super::control;
use crate::protocol::RankIndex;

/// Directories in which segments may lie, best first. The control page lies in the first.
#[derive(Debug, Clone)]
pub(in crate::collective) struct Places(Vec<PathBuf>);

impl Places {
    /// Shared memory; then, for when it is full (containers often have 64 MiB of it), the directory
    /// of temporary files.
    pub(in crate::collective) fn of_this_host() -> Self {
        let memory = PathBuf::from("/dev/shm");
        let mut places = Vec::new();
        if memory.is_dir() {
            places.push(memory);
        }
        places.push(std::env::temp_dir());
        Self(places)
    }

    #[cfg(test)]
    pub(in crate::collective) fn under(directories: Vec<PathBuf>) -> Self {
        Self(directories)
    }

    fn first(&self) -> &Path {
        // `of_this_host` always has one.
        &self.0[0]
    }

    /// A new file under a temporary name.
    pub(super) fn new_control(&self, name: &str) -> io::Result<(File, PathBuf)> {
        let path = self.first().join(format!("{}{name}.new.{}", prefix(), process::id()));
        let _ = fs::remove_file(&path);
        create(&path).map(|file| (file, path))
    }

    /// Gives it its name, whole as it is. Fails if there is one: a rank set meets once.
    pub(super) fn publish_control(&self, name: &str, temporary: &Path) -> io::Result<()> {
        fs::hard_link(temporary, self.control_path(name))
    }

    pub(super) fn open_control(&self, name: &str) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(self.control_path(name))
    }

    pub(super) fn remove_control(&self, name: &str) {
        let _ = fs::remove_file(self.control_path(name));
    }

    fn control_path(&self, name: &str) -> PathBuf {
        self.first().join(format!("{}{name}{CONTROL}", prefix()))
    }

    /// Another rank's segment.
    pub(super) fn open(
        &self,
        name: &str,
        round: u64,
        rank: RankIndex,
        pid: u32,
        place: u32,
    ) -> io::Result<File> {
        let directory =
            self.0.get(place as usize).ok_or_else(|| io::Error::other(format!("no place {place}")))?;
        File::open(directory.join(segment_name(name, round, rank, pid)))
    }

    /// Removes what ended processes of this host have left.
    pub(super) fn sweep(&self) {
        for directory in &self.0 {
            let Ok(entries) = fs::read_dir(directory) else { continue };
            for entry in entries.flatten() {
                let file_name = entry.file_name();
                let Some(name) = file_name.to_str().filter(|name| name.starts_with(&prefix())) else {
                    continue;
                };
                let maker = if name.ends_with(CONTROL) {
                    control_maker(&entry.path())
                } else {
                    name.rsplit_once('.').and_then(|(_, pid)| pid.parse().ok())
                };
                if maker.is_some_and(|pid| !is_alive(pid)) {
                    tracing::info!(name, "removing what an ended process left in shared memory");
                    let _ = fs::remove_file(entry.path());
                }
            }
        }
    }
}

const CONTROL: &str = ".control";

/// A segment that this rank writes; its name goes with it.
pub(super) struct OwnSegment {
    file: File,
    path: PathBuf,
}

impl OwnSegment {
    /// Makes a segment by `write`, in the first place that has room; says which.
    pub(super) fn write(
        places: &Places,
        name: &str,
        round: u64,
        rank: RankIndex,
        write: impl Fn(&File) -> io::Result<()>,
    ) -> io::Result<(Self, u32)> {
        let mut full = None;
        for (place, directory) in places.0.iter().enumerate() {
            let path = directory.join(segment_name(name, round, rank, process::id()));
            let at = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
            // From here on the name is removed however this ends.
            let segment = Self { file: create(&path).map_err(at)?, path: path.clone() };
            match write(&segment.file) {
                Ok(()) => return Ok((segment, place as u32)),
                Err(e) if e.kind() == io::ErrorKind::StorageFull => {
                    tracing::debug!(directory = %directory.display(), "full: trying the next place");
                    full = Some(at(e));
                }
                Err(e) => return Err(at(e)),
            }
        }
        Err(full.unwrap_or_else(|| io::Error::other("no place for shared memory")))
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Takes its name away, now that every rank has it open.
    pub(super) fn remove_name(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Drop for OwnSegment {
    fn drop(&mut self) {
        self.remove_name();
    }
}

fn segment_name(name: &str, round: u64, rank: RankIndex, pid: u32) -> String {
    format!("{}{name}.{round}.{}.{pid}", prefix(), rank.0)
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Begins every name. Process ids mean something only inside their namespace, and containers may
/// share their memory without sharing that.
fn prefix() -> String {
    format!("lockstep-{}-", process_namespace())
}

/// Number of the namespace of process ids; 0 where there are none.
pub(in crate::collective) fn process_namespace() -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self/ns/pid").map_or(0, |namespace| namespace.ino())
}

/// Who made a control page, if it is one.
fn control_maker(path: &Path) -> Option<u32> {
    let mut bytes = [0; 12];
    File::open(path).ok()?.read_exact_at(&mut bytes, 0).ok()?;
    let (magic, pid) = bytes.split_first_chunk::<8>()?;
    (u64::from_ne_bytes(*magic) == control::MAGIC).then(|| Some(u32::from_ne_bytes(pid.try_into().ok()?)))?
}

/// Whether a process lives (or its number is another's by now, or it waits to be buried).
pub(super) fn is_alive(pid: u32) -> bool {
    // 0 and what is no pid would mean groups of processes.
    let Ok(pid @ 1..) = libc::pid_t::try_from(pid) else { return false };
    // SAFETY: signal 0 is not delivered; the call touches no memory.
    let answer = unsafe { libc::kill(pid, 0) };
    answer == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn two_places() -> (tempfile::TempDir, tempfile::TempDir, Places) {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let places = Places::under(vec![first.path().into(), second.path().into()]);
        (first, second, places)
    }

    fn files(directory: &tempfile::TempDir) -> usize {
        fs::read_dir(directory.path()).unwrap().count()
    }

    #[test]
    fn a_full_place_gives_way_to_the_next() {
        let (first, second, places) = two_places();
        let tries = Cell::new(0);
        let (segment, place) = OwnSegment::write(&places, "set", 1, RankIndex(0), |file| {
            tries.set(tries.get() + 1);
            match tries.get() {
                1 => Err(io::ErrorKind::StorageFull.into()),
                _ => file.write_all_at(b"values", 0),
            }
        })
        .unwrap();
        assert_eq!((place, files(&first), files(&second)), (1, 0, 1));
        segment.file().write_all_at(b"es!", 3).unwrap();
        let opened = places.open("set", 1, RankIndex(0), process::id(), place).unwrap();
        let mut bytes = [0; 6];
        opened.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"vales!");
        drop(segment);
        assert_eq!(files(&second), 0);
    }

    #[test]
    fn when_all_are_full_the_error_names_the_last() {
        let (first, second, places) = two_places();
        let full = |_: &File| Err(io::ErrorKind::StorageFull.into());
        let error = OwnSegment::write(&places, "set", 1, RankIndex(0), full).err().unwrap();
        assert!(error.to_string().contains(second.path().to_str().unwrap()), "{error}");
        assert_eq!((files(&first), files(&second)), (0, 0));
    }

    #[test]
    fn sweeping_takes_what_the_dead_left_and_nothing_else() {
        let (first, second, places) = two_places();
        let mut ended = process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        let (dead, live) = (ended.id(), process::id());
        let page = |pid: u32| [&control::MAGIC.to_ne_bytes()[..], &pid.to_ne_bytes()].concat();
        let own = prefix();
        for (name, contents, stays) in [
            (format!("{own}c-run-1-1-1.3.0.{dead}"), vec![], false),
            (format!("{own}c-run-1-1-1.3.0.{live}"), vec![], true),
            (format!("{own}c-run-1-1-1.new.{dead}"), vec![], false),
            (format!("{own}a{CONTROL}"), page(dead), false),
            (format!("{own}b{CONTROL}"), page(live), true),
            (format!("{own}d{CONTROL}"), vec![0; 12], true),
            // Another namespace's processes, and other programs' files.
            (format!("lockstep-1-c.3.0.{dead}"), vec![], true),
            (format!("other.{dead}"), vec![], true),
        ] {
            for directory in [&first, &second] {
                fs::write(directory.path().join(&name), &contents).unwrap();
            }
            places.sweep();
            for directory in [&first, &second] {
                assert_eq!(directory.path().join(&name).exists(), stays, "{name}");
            }
        }
    }
}
