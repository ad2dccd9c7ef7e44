use std::{fmt, str::FromStr, sync::Arc};

#[cfg(feature = "cuda")]
use super::cuda::Cuda;
use super::{
    GpuError, Turn,
    emulator::{self, Emulator},
    graph,
    heap::{Heap, Memory, Place, Source},
    turns::Turns,
};

/// A GPU that is open; clones are the same.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    name: String,
    /// Its kind, by which nodes that give the same bits know each other.
    engine: String,
    backend: Backend,
    turns: Turns,
    heap: Arc<Heap>,
}

enum Backend {
    Emulated(Emulator),
    #[cfg(feature = "cuda")]
    Cuda(Box<Cuda>),
}

/// An argument of a kernel.
#[derive(Clone, Copy)]
pub(super) enum Argument {
    U32(u32),
    F32(f32),
    /// An address, too.
    U64(u64),
}

/// What a node computes on, as `--device` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    #[default]
    Cpu,
    /// The GPU with this number.
    Cuda(usize),
    /// The first GPU if there is one, else the CPU.
    Auto,
    /// The GPU's engine on the CPU, for trying it out.
    Emulated,
}

impl Gpu {
    /// Opens the GPU with this number and compiles the kernels for it, which takes some seconds.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize) -> Result<Self, GpuError> {
        let cuda = Cuda::open(ordinal)?;
        Ok(Self::of(cuda.name(), format!("cuda {}", cuda.model()), Backend::Cuda(Box::new(cuda))))
    }

    /// Refused: this lockstep was built without CUDA.
    #[cfg(not(feature = "cuda"))]
    pub fn cuda(_: usize) -> Result<Self, GpuError> {
        Err(GpuError::NotBuilt)
    }

    /// The engine of a GPU on this machine's CPU, thousands of times slower. Needs g++.
    pub fn emulated() -> Result<Self, GpuError> {
        Ok(Self::of("emulated GPU".to_owned(), "emulated".to_owned(), Backend::Emulated(Emulator::open()?)))
    }

    fn of(name: String, engine: String, backend: Backend) -> Self {
        let (turns, heap) = (Turns::default(), Arc::default());
        Self(Arc::new(Inner { name, engine, backend, turns, heap }))
    }

    /// Its kind: GPUs of one kind give the same bits.
    pub fn engine(&self) -> &str {
        &self.0.engine
    }

    /// What it calls itself.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its number in this process; an emulation has none.
    pub fn ordinal(&self) -> Option<u32> {
        match &self.0.backend {
            Backend::Emulated(_) => None,
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => Some(cuda.ordinal() as u32),
        }
    }

    /// Waits until everybody who asked before is done. Whoever computes holds a turn: a micro-batch, a
    /// step of decoding.
    pub fn turn(&self) -> Turn<'_> {
        self.0.turns.take()
    }

    /// Bytes that are free, and bytes that there are; unknown of an emulation.
    pub fn memory(&self) -> Result<Option<[u64; 2]>, GpuError> {
        match &self.0.backend {
            Backend::Emulated(_) => Ok(None),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.memory().map(Some),
        }
    }

    /// Bytes that arrays hold now, and the most that they have held at once. What CUDA, its libraries and the pool
    /// take beside them is not in it.
    pub fn held(&self) -> [u64; 2] {
        self.0.heap.held()
    }

    pub(super) fn heap(&self) -> &Arc<Heap> {
        &self.0.heap
    }

    /// Waits until everything that was asked is done.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.0.heap.admit(false)?;
        match &self.0.backend {
            Backend::Emulated(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.synchronize(),
        }
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<Memory, GpuError> {
        let pool = match self.0.heap.source(bytes)? {
            Source::Pool(memory) => return Ok(memory),
            Source::Backend(pool) => pool,
        };
        let place = match &self.0.backend {
            Backend::Emulated(_) => Place::Emulated(emulator::Memory::new(bytes)?),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => Place::Cuda(cuda.allocate(bytes)?),
        };
        Ok(self.0.heap.counted(place, bytes, pool))
    }

    /// Never out of a pool, and not while something is recorded.
    pub(super) fn allocate_zeros(&self, bytes: usize) -> Result<Memory, GpuError> {
        self.0.heap.admit(false)?;
        let place = match &self.0.backend {
            Backend::Emulated(_) => Place::Emulated(emulator::Memory::zeroed(bytes)?),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => Place::Cuda(cuda.allocate_zeros(bytes)?),
        };
        Ok(self.0.heap.counted(place, bytes, None))
    }

    /// Fills memory from its beginning on, once what was asked before is done with it.
    pub(super) fn write(&self, memory: &Memory, bytes: &[u8]) -> Result<(), GpuError> {
        self.0.heap.admit(false)?;
        match (&self.0.backend, memory.place()) {
            (Backend::Emulated(_), Place::Emulated(memory)) => memory.write(bytes),
            #[cfg(feature = "cuda")]
            (Backend::Cuda(cuda), Place::Cuda(memory)) => return cuda.write(memory, bytes),
            #[cfg(feature = "cuda")]
            _ => unreachable!("memory of another GPU"),
        }
        #[allow(unreachable_code)]
        Ok(())
    }

    pub(super) fn read(&self, memory: &Memory, from: usize, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.0.heap.admit(false)?;
        match (&self.0.backend, memory.place()) {
            (Backend::Emulated(_), Place::Emulated(memory)) => memory.read(from, bytes),
            #[cfg(feature = "cuda")]
            (Backend::Cuda(cuda), Place::Cuda(memory)) => return cuda.read(memory, from, bytes),
            #[cfg(feature = "cuda")]
            _ => unreachable!("memory of another GPU"),
        }
        #[allow(unreachable_code)]
        Ok(())
    }

    /// Runs a kernel of kernels/ over `grid` blocks of `threads` threads.
    ///
    /// # Safety
    ///
    /// The arguments are those of the kernel, in number, type and order, and the arrays that they point
    /// to are as long as the kernel takes them to be.
    pub(super) unsafe fn launch(
        &self,
        kernel: &str,
        grid: [usize; 2],
        threads: usize,
        arguments: &[Argument],
    ) -> Result<(), GpuError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let grid = [grid_size(grid[0])?, grid_size(grid[1])?];
        self.0.heap.admit(true)?;
        match &self.0.backend {
            // SAFETY: by the caller's promise.
            Backend::Emulated(emulator) => unsafe {
                emulator.launch(kernel, grid, threads as u32, arguments)
            },
            #[cfg(feature = "cuda")]
            // SAFETY: by the caller's promise.
            Backend::Cuda(cuda) => unsafe { cuda.launch(kernel, grid, threads as u32, arguments) },
        }
    }

    /// `c = alpha · a · b + beta · c`; see [`Product`](super::Product), which checks sizes.
    ///
    /// # Safety
    ///
    /// As said there.
    pub(super) unsafe fn multiply(&self, product: &super::product::RawProduct) -> Result<(), GpuError> {
        self.0.heap.admit(true)?;
        match &self.0.backend {
            // SAFETY: by the caller's promise.
            Backend::Emulated(emulator) => unsafe { emulator.multiply(product) },
            #[cfg(feature = "cuda")]
            // SAFETY: by the caller's promise.
            Backend::Cuda(cuda) => unsafe { cuda.multiply(product) },
        }
    }

    /// From here on recordings fail, those that are there, too.
    #[cfg(test)]
    pub(crate) fn break_recordings(&self) {
        match &self.0.backend {
            Backend::Emulated(emulator) => emulator.break_recordings(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => unreachable!("a real GPU is not to be broken"),
        }
    }

    /// From here on what is launched is recorded, and not done.
    pub(super) fn begin_capture(&self) -> Result<(), GpuError> {
        match &self.0.backend {
            Backend::Emulated(emulator) => {
                emulator.begin_capture();
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.begin_capture(),
        }
    }

    /// What was recorded; from here on everything is done again.
    pub(super) fn end_capture(&self) -> Result<graph::Place, GpuError> {
        match &self.0.backend {
            Backend::Emulated(emulator) => emulator.end_capture().map(graph::Place::Emulated),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.end_capture().map(graph::Place::Cuda),
        }
    }

    /// # Safety
    ///
    /// As of [`Gpu::replay`].
    pub(super) unsafe fn launch_graph(&self, graph: &graph::Place) -> Result<(), GpuError> {
        match (&self.0.backend, graph) {
            (Backend::Emulated(emulator), graph::Place::Emulated(graph)) => {
                // SAFETY: by the caller's promise.
                unsafe { emulator.launch_graph(graph) }
            }
            #[cfg(feature = "cuda")]
            // SAFETY: by the caller's promise.
            (Backend::Cuda(cuda), graph::Place::Cuda(graph)) => unsafe { cuda.launch_graph(graph) },
            #[cfg(feature = "cuda")]
            _ => unreachable!("a graph of another GPU"),
        }
    }
}

/// Blocks in one direction; CUDA counts them in 31 bits.
fn grid_size(blocks: usize) -> Result<u32, GpuError> {
    u32::try_from(blocks).ok().filter(|blocks| *blocks < 1 << 31).ok_or_else(|| GpuError::Unsupported {
        field: "batch",
        problem: format!("asks for {blocks} blocks of threads; a GPU takes less than 2^31"),
    })
}

impl DeviceChoice {
    /// That of node `index` of several that are started together on one machine: GPUs in the order of their numbers,
    /// from the given one on.
    pub fn of_node(self, index: u32) -> Self {
        match self {
            Self::Cuda(first) => Self::Cuda(first + index as usize),
            Self::Cpu | Self::Auto | Self::Emulated => self,
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "auto" => Ok(Self::Auto),
            "cuda" => Ok(Self::Cuda(0)),
            "emulated" => Ok(Self::Emulated),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "a device is cpu, cuda, cuda:N, auto or emulated".to_owned()),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Auto => f.write_str("auto"),
            Self::Emulated => f.write_str("emulated"),
        }
    }
}
