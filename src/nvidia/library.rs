use std::ffi::{CStr, CString};

/// A library that a binary with the feature `cuda` calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Library {
    pub name: &'static str,
    /// Its files' names, the newest first: any of them does.
    pub files: &'static [&'static str],
}

/// Beside the driver itself.
pub const CUDA_LIBRARIES: [Library; 4] = [
    Library { name: "cuBLAS", files: &["libcublas.so.13", "libcublas.so.12"] },
    Library { name: "cuBLASLt", files: &["libcublasLt.so.13", "libcublasLt.so.12"] },
    Library { name: "cuRAND", files: &["libcurand.so.10"] },
    Library { name: "NVRTC", files: &["libnvrtc.so.13", "libnvrtc.so.12"] },
];

pub const NCCL_LIBRARY: Library = Library { name: "NCCL", files: &["libnccl.so.2"] };

impl Library {
    /// Loads it, and says under which name; or why the loader can't, in its own words for the newest.
    pub fn find(&self) -> Result<&'static str, String> {
        let mut first_problem = None;
        for file in self.files {
            match load(file) {
                Ok(()) => return Ok(file),
                Err(problem) => first_problem.get_or_insert(problem),
            };
        }
        Err(first_problem.unwrap_or_else(|| format!("no file is known of {}", self.name)))
    }
}

/// It stays loaded: CUDA's libraries are not made to be unloaded, and what calls them needs it soon.
fn load(file: &str) -> Result<(), String> {
    let name = CString::new(file).map_err(|_| format!("{file:?} is no file's name"))?;
    // SAFETY: the name ends with a zero and outlives the call. Loading runs the library's initialisers,
    // which NVIDIA's libraries keep free of effects until their first function is called.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
    if !library.is_null() {
        return Ok(());
    }
    // SAFETY: takes nothing; gives this thread's last message of the loader, or null.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return Err(format!("{file} could not be loaded"));
    }
    // SAFETY: not null, ends with a zero, and is valid until this thread calls the loader again.
    Err(unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found_and_what_is_not_is_explained() {
        // Every process on Linux that links libc has it under this name.
        let there = Library { name: "libc", files: &["libno-such-thing.so.9", "libc.so.6"] };
        assert_eq!(there.find(), Ok("libc.so.6"));
        let absent = Library { name: "nothing", files: &["libno-such-thing.so.9"] };
        let problem = absent.find().unwrap_err();
        assert!(problem.contains("libno-such-thing.so.9"), "{problem}");
    }
}
