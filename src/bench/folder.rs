use std::{
    fs,
    path::{Path, PathBuf},
};

/// A place for what a measurement writes, in the system's temporary folder; gone with this.
pub(super) struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    /// Of this process and this measurement. Whoever writes makes it.
    pub fn new(measurement: &str) -> Self {
        Self(std::env::temp_dir().join(format!("lockstep-bench-{}-{measurement}", std::process::id())))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // An error would only leave files in the system's folder for them.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_with_all_that_was_written() {
        let folder = TemporaryFolder::new("folder-test");
        let path = folder.path().to_owned();
        fs::create_dir_all(path.join("a")).unwrap();
        fs::write(path.join("a/b"), "c").unwrap();
        drop(folder);
        assert!(!path.exists());
        // Nothing was written.
        drop(TemporaryFolder::new("folder-test"));
    }
}
