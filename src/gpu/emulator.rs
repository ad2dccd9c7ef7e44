//! The kernels of a GPU as machine code of this one.

#[cfg(test)]
use std::sync::atomic::{AtomicBool, Ordering};
use std::{
    alloc::{Layout, alloc, alloc_zeroed, dealloc},
    ffi::{CStr, CString, c_void},
    path::Path,
    process::Command,
    ptr,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use super::{
    Element, GpuError,
    device::Argument,
    kernels::{EMULATION, KERNELS},
    product::RawProduct,
};

/// Alignment of memory, that of a GPU's.
const ALIGNMENT: usize = 256;

/// The compiled kernels, of which a process has one set, and what is recorded instead of being done.
pub(super) struct Emulator {
    library: &'static Library,
    recorded: Mutex<Option<Graph>>,
    /// Whether recordings fail at their end, and what was recorded at its launch.
    #[cfg(test)]
    is_broken: AtomicBool,
}

/// What was recorded, in its order.
#[derive(Default)]
pub(super) struct Graph(Vec<Work>);

enum Work {
    Launch { kernel: String, grid: [u32; 2], threads: u32, arguments: Vec<Argument> },
    Product(RawProduct),
}

struct Library(*mut c_void);

// SAFETY: a handle of dlopen, which any thread may search.
unsafe impl Send for Library {}
// SAFETY: as above; the kernels keep their state in thread-local variables.
unsafe impl Sync for Library {}

impl Emulator {
    pub(super) fn open() -> Result<Self, GpuError> {
        static LIBRARY: OnceLock<Result<Library, GpuError>> = OnceLock::new();
        let library = LIBRARY.get_or_init(Library::compile).as_ref().map_err(Clone::clone)?;
        Ok(Self {
            library,
            recorded: Mutex::default(),
            #[cfg(test)]
            is_broken: AtomicBool::new(false),
        })
    }

    #[cfg(test)]
    pub(super) fn break_recordings(&self) {
        self.is_broken.store(true, Ordering::Relaxed);
    }

    fn check_whole(&self) -> Result<(), GpuError> {
        #[cfg(test)]
        if self.is_broken.load(Ordering::Relaxed) {
            return Err(GpuError::Failed { call: "recording", problem: "it is broken".to_owned() });
        }
        Ok(())
    }

    pub(super) fn begin_capture(&self) {
        *self.recorded() = Some(Graph::default());
    }

    /// Nothing is recorded any more, whatever comes back.
    pub(super) fn end_capture(&self) -> Result<Graph, GpuError> {
        let graph = self.recorded().take().unwrap_or_default();
        self.check_whole().map(|()| graph)
    }

    /// # Safety
    ///
    /// As of [`Gpu::replay`](super::Gpu::replay).
    pub(super) unsafe fn launch_graph(&self, graph: &Graph) -> Result<(), GpuError> {
        self.check_whole()?;
        for work in &graph.0 {
            match work {
                Work::Launch { kernel, grid, threads, arguments } => {
                    // SAFETY: it was given so to `launch`, and by the caller's promise the arrays are still there.
                    unsafe { self.launch(kernel, *grid, *threads, arguments) }?;
                }
                // SAFETY: as above, to `multiply`.
                Work::Product(product) => unsafe { self.multiply(product) }?,
            }
        }
        Ok(())
    }

    fn recorded(&self) -> MutexGuard<'_, Option<Graph>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Safety
    ///
    /// As of [`Gpu::launch`](super::Gpu::launch).
    pub(super) unsafe fn launch(
        &self,
        kernel: &str,
        [x, y]: [u32; 2],
        threads: u32,
        arguments: &[Argument],
    ) -> Result<(), GpuError> {
        if let Some(Graph(recorded)) = &mut *self.recorded() {
            let (kernel, arguments) = (kernel.to_owned(), arguments.to_vec());
            recorded.push(Work::Launch { kernel, grid: [x, y], threads, arguments });
            return Ok(());
        }
        type Launch = unsafe extern "C" fn(u32, u32, u32, *const *const c_void);
        let entry = self.library.find(&format!("emulate_{kernel}"))?;
        // SAFETY: EMULATE in emulate.h gives these functions this type.
        let launch = unsafe { std::mem::transmute::<*mut c_void, Launch>(entry) };
        let addresses: Vec<*const c_void> = arguments.iter().map(Argument::address).collect();
        // SAFETY: by the caller's promise.
        unsafe { launch(x, y, threads, addresses.as_ptr()) };
        Ok(())
    }

    /// # Safety
    ///
    /// As of [`Gpu::multiply`](super::Gpu::multiply).
    pub(super) unsafe fn multiply(&self, product: &RawProduct) -> Result<(), GpuError> {
        if let Some(Graph(recorded)) = &mut *self.recorded() {
            recorded.push(Work::Product(*product));
            return Ok(());
        }
        #[rustfmt::skip]
        type Multiply = unsafe extern "C" fn(
            u32, u32, u32, f32, u64, u64, u64, u64, u64, u64, f32, u64, u64,
        );
        let RawProduct { m, n, k, alpha, a, b, beta, c, element, result } = *product;
        let entry = self.library.find(&format!("emulate_product_{}_{}", element.name(), result.name()))?;
        // SAFETY: EMULATE_PRODUCT in emulate_end.h gives these functions this type; pointers are 64 bits.
        let multiply = unsafe { std::mem::transmute::<*mut c_void, Multiply>(entry) };
        let ([a_row, a_column], [b_row, b_column]) = (a.strides(), b.strides());
        let c_row = n as u64;
        let [m, n, k] = [m, n, k].map(|size| size as u32);
        // SAFETY: by the caller's promise.
        unsafe {
            multiply(m, n, k, alpha, a.address, a_row, a_column, b.address, b_row, b_column, beta, c, c_row);
        }
        Ok(())
    }
}

impl Argument {
    /// Where it is: a kernel takes its arguments by address.
    pub(super) fn address(&self) -> *const c_void {
        match self {
            Self::U32(value) => ptr::from_ref(value).cast(),
            Self::F32(value) => ptr::from_ref(value).cast(),
            Self::U64(value) => ptr::from_ref(value).cast(),
        }
    }
}

impl Library {
    fn compile() -> Result<Self, GpuError> {
        let problem = |problem: String| GpuError::Kernels { problem };
        let directory = std::env::temp_dir().join(format!("lockstep-emulation-{}", std::process::id()));
        let build = || -> Result<Self, GpuError> {
            std::fs::create_dir_all(&directory)
                .map_err(|e| problem(format!("{}: {e}", directory.display())))?;
            let [before, behind] = EMULATION;
            let (source, library) = (directory.join("kernels.cpp"), directory.join("kernels.so"));
            std::fs::write(&source, [before, KERNELS, behind].concat())
                .map_err(|e| problem(format!("{}: {e}", source.display())))?;
            // Fibres jump between stacks, which the checks of _FORTIFY_SOURCE take for an attack. Sums keep
            // the order that they are written in.
            let output = Command::new("g++")
                .args([
                    "-std=c++17",
                    "-O2",
                    "-ffp-contract=off",
                    "-U_FORTIFY_SOURCE",
                    "-fPIC",
                    "-shared",
                    "-o",
                ])
                .args([&library, &source])
                .output()
                .map_err(|e| problem(format!("running g++: {e}")))?;
            if !output.status.success() {
                return Err(problem(String::from_utf8_lossy(&output.stderr).into_owned()));
            }
            Self::load(&library)
        };
        let library = build();
        // Once loaded it needs no file; what cannot be removed is the system's to clear.
        let _ = std::fs::remove_dir_all(&directory);
        library
    }

    fn load(path: &Path) -> Result<Self, GpuError> {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| GpuError::Kernels {
            problem: "the directory for temporary files has a name with a zero byte".to_owned(),
        })?;
        // SAFETY: a library that we have just compiled, which does nothing when it is loaded.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() { Err(GpuError::Kernels { problem: last_error() }) } else { Ok(Self(handle)) }
    }

    fn find(&self, name: &str) -> Result<*mut c_void, GpuError> {
        let name = CString::new(name).map_err(|e| GpuError::Kernels { problem: e.to_string() })?;
        // SAFETY: the handle stays open as long as the process.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        if address.is_null() { Err(GpuError::Kernels { problem: last_error() }) } else { Ok(address) }
    }
}

fn last_error() -> String {
    // SAFETY: it returns a string that lives to the thread's next call, or null.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "no reason is given".to_owned();
    }
    // SAFETY: not null, as just seen.
    unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
}

/// Memory that only kernels and copies touch, through addresses.
pub(super) struct Memory {
    start: *mut u8,
    layout: Layout,
    bytes: usize,
}

// SAFETY: it is an address; users take turns.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(super) fn new(bytes: usize) -> Result<Self, GpuError> {
        // SAFETY: the layout's size is never 0.
        Self::with(bytes, |layout| unsafe { alloc(layout) })
    }

    pub(super) fn zeroed(bytes: usize) -> Result<Self, GpuError> {
        // SAFETY: as above.
        Self::with(bytes, |layout| unsafe { alloc_zeroed(layout) })
    }

    fn with(bytes: usize, allocate: impl FnOnce(Layout) -> *mut u8) -> Result<Self, GpuError> {
        let short = |problem: &str| GpuError::OutOfMemory { bytes, problem: problem.to_owned() };
        let layout =
            Layout::from_size_align(bytes.max(ALIGNMENT), ALIGNMENT).map_err(|e| short(&e.to_string()))?;
        let start = allocate(layout);
        if start.is_null() {
            Err(short("this machine's is used up"))
        } else {
            Ok(Self { start, layout, bytes })
        }
    }

    pub(super) fn address(&self) -> u64 {
        self.start as u64
    }

    pub(super) fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.bytes);
        // SAFETY: inside the memory, as just checked, to which no reference exists.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start, bytes.len()) };
    }

    pub(super) fn read(&self, from: usize, bytes: &mut [u8]) {
        assert!(from <= self.bytes && bytes.len() <= self.bytes - from);
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(self.start.add(from), bytes.as_mut_ptr(), bytes.len()) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and nobody holds it any more.
        unsafe { dealloc(self.start, self.layout) };
    }
}

impl Element {
    /// Whether it is a number format.
    pub(super) fn is_number(self) -> bool {
        matches!(self, Self::F32 | Self::Bf16)
    }
}
