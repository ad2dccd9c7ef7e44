//! The link that is a GPU and an NCCL communicator: one call of CUDA or NCCL for each of `Link`'s, on one
//! stream, and the proof that each may be made.

use std::{
    ffi::{CStr, c_int},
    ops::Range,
    ptr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use cudarc::{
    driver::{
        CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, LaunchConfig, PinnedHostSlice,
        PushKernelArg, result, sys as cuda,
    },
    nccl::sys,
    nvrtc,
};

use super::{
    NCCL_IN_ONE_ORDER, Reduction,
    abortable::Abortable,
    link::{Fault, Link, Transfer},
    program,
};
use crate::{collective::plan::Step, nvidia, protocol::RankIndex};

/// A GPU in a rank set.
pub(super) struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    communicator: Arc<Abortable<Communicator>>,
    kernel: CudaFunction,
    memory: CudaSlice<f32>,
    program: CudaSlice<u64>,
    pinned: PinnedHostSlice<f32>,
}

#[derive(Clone, Copy)]
struct Communicator(sys::ncclComm_t);

// SAFETY: a communicator belongs to no thread; that one thread uses it at a time, and what may be called beside
// that, is `Abortable`'s to see to.
unsafe impl Send for Communicator {}

/// How long `ncclCommAbort` may take. It waits for kernels, which an abort ends at their next look.
const ABORT_PATIENCE: Duration = Duration::from_secs(15);

/// How long a communicator that is no longer needed may take to send what the others have not fetched yet.
const FINALIZE_PATIENCE: Duration = Duration::from_secs(5);

/// Exit status of a process whose GPU could not be stopped; a supervisor starts it again.
const CANNOT_ABORT: i32 = 70;

const THREADS: u32 = 256;

/// Enough for any GPU; each thread goes on to further values.
const MOST_BLOCKS: usize = 4096;

impl Gpu {
    /// The GPU's identity and the library's version, if both are there.
    pub(super) fn offer(ordinal: u32) -> Result<(String, u32), String> {
        nvidia::NCCL_LIBRARY.find()?;
        let uuid = nvidia::uuid(ordinal).map_err(|e| e.to_string())?;
        let mut version: c_int = 0;
        // SAFETY: writes one int, which is ours.
        let status = unsafe { sys::ncclGetVersion(&mut version) };
        check("ncclGetVersion", status, None).map_err(|e| e.to_string())?;
        match u32::try_from(version) {
            Ok(version) if version >= OLDEST_NCCL => Ok((uuid, version)),
            _ => Err(format!("NCCL {version} is older than {OLDEST_NCCL}")),
        }
    }

    /// What rank 0 tells the others.
    pub(super) fn unique_id() -> Result<Vec<u8>, Fault> {
        let mut id = sys::ncclUniqueId { internal: [0; _] };
        // SAFETY: writes one identifier, which is ours.
        check("ncclGetUniqueId", unsafe { sys::ncclGetUniqueId(&mut id) }, None)?;
        Ok(id.internal.map(|byte| byte as u8).to_vec())
    }

    /// Begins to make a communicator; it is there when [`Link::is_queued`] says so.
    pub(super) fn start(
        ordinal: u32,
        id: &[u8],
        me: RankIndex,
        world_size: u32,
        reduction: Reduction,
    ) -> Result<Self, Fault> {
        let id: [u8; 128] = id.try_into().map_err(|_| Fault::new("ncclUniqueId", "it has not 128 bytes"))?;
        if reduction == Reduction::Fast {
            warn_of_other_algorithms();
        }
        let cuda = |call| move |error: result::DriverError| Fault::new(call, error);
        let context = CudaContext::new(ordinal as usize).map_err(cuda("cuDevicePrimaryCtxRetain"))?;
        // Else a context's first stream waits for the whole GPU, where a replica may be recording a step: which ends the
        // recording, or this.
        // SAFETY: all memory of this context is used on the one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(cuda("cuStreamCreate"))?;
        let ptx = nvrtc::compile_ptx(program::SOURCE)
            .map_err(|e| Fault::new("nvrtcCompileProgram", format!("{e:?}")))?;
        let module = context.load_module(ptx).map_err(cuda("cuModuleLoadData"))?;
        let kernel = module.load_function(program::KERNEL).map_err(cuda("cuModuleGetFunction"))?;
        let memory = stream.alloc_zeros(1).map_err(cuda("cuMemAllocAsync"))?;
        let program = stream.alloc_zeros(1).map_err(cuda("cuMemAllocAsync"))?;
        let pinned = pinned(&context, 1)?;
        // NCCL takes the GPU of the calling thread's context.
        context.bind_to_thread().map_err(cuda("cuCtxSetCurrent"))?;
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as _) };
        let (mut config, mut communicator) = (nonblocking(), ptr::null_mut());
        let (world_size, rank) = (world_size as c_int, me.0 as c_int);
        // SAFETY: the communicator's place and the configuration are ours and outlive the call, which copies
        // the latter; a context of this GPU is current.
        let status =
            unsafe { sys::ncclCommInitRankConfig(&mut communicator, world_size, id, rank, &mut config) };
        check("ncclCommInitRankConfig", status, None)?;
        let communicator = Arc::new(Abortable::new(Communicator(communicator)));
        Ok(Self { context, stream, communicator, kernel, memory, program, pinned })
    }

    /// The address of a place in the device's memory.
    fn at(&self, values: &Range<usize>) -> Result<cuda::CUdeviceptr, Fault> {
        if values.start > values.end || values.end > self.memory.len() {
            let problem = format!("{values:?} lies outside {} values", self.memory.len());
            return Err(Fault::new("place", problem));
        }
        let (base, _event) = self.memory.device_ptr(&self.stream);
        Ok(base + (values.start * size_of::<f32>()) as u64)
    }

    /// Runs calls of NCCL, whose status is the communicator's.
    fn nccl(
        &self,
        call: &'static str,
        body: impl FnOnce(sys::ncclComm_t) -> sys::ncclResult_t,
    ) -> Result<(), Fault> {
        let done = self.communicator.call(|communicator| {
            let status = body(communicator.0);
            check(call, status, Some(communicator.0))
        });
        done.unwrap_or_else(|| Err(Fault::new(call, "the communicator was aborted")))
    }

    /// What the communicator is doing: an error, `false` while it is busy with what it was given.
    fn state(&self) -> Result<bool, Fault> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        self.nccl("ncclCommGetAsyncError", |communicator| {
            // SAFETY: a live communicator, and a place that is ours.
            let asked = unsafe { sys::ncclCommGetAsyncError(communicator, &mut state) };
            match (asked, state) {
                (sys::ncclResult_t::ncclSuccess, sys::ncclResult_t::ncclInProgress) => asked,
                (sys::ncclResult_t::ncclSuccess, state) => state,
                (failed, _) => failed,
            }
        })?;
        Ok(state != sys::ncclResult_t::ncclInProgress)
    }

    fn stream_is_idle(&self) -> Result<bool, Fault> {
        // SAFETY: the stream lives as long as `self`.
        match unsafe { cuda::cuStreamQuery(self.stream.cu_stream()) } {
            cuda::CUresult::CUDA_SUCCESS => Ok(true),
            cuda::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            error => Err(Fault::new("cuStreamQuery", result::DriverError(error))),
        }
    }

    /// Lets the communicator send what the others have not fetched; whether it came to an end.
    fn finalize(&self) -> bool {
        // SAFETY: a live communicator, of which nothing more is asked.
        let finalize = |communicator| unsafe { sys::ncclCommFinalize(communicator) };
        self.nccl("ncclCommFinalize", finalize).is_ok()
            && until(FINALIZE_PATIENCE, || self.state().unwrap_or(true))
            && self.state().is_ok()
    }
}

impl Link for Gpu {
    fn reserve(&mut self, device: usize, pinned_values: usize) -> Result<(), Fault> {
        if self.memory.len() < device {
            let refused = |error| Fault::new("cuMemAllocAsync", format!("{error} ({} MiB)", device >> 18));
            // Before the larger one is asked for: both need not fit.
            self.memory = self.stream.alloc_zeros(1).map_err(refused)?;
            self.memory = self.stream.alloc_zeros(device).map_err(refused)?;
        }
        if self.pinned.len() < pinned_values {
            self.pinned = pinned(&self.context, pinned_values)?;
        }
        Ok(())
    }

    fn pinned(&mut self) -> Result<&mut [f32], Fault> {
        self.pinned.as_mut_slice().map_err(|e| Fault::new("cuEventSynchronize", e))
    }

    fn upload(&mut self, into: Range<usize>) -> Result<(), Fault> {
        let (at, stream) = (self.at(&into)?, self.stream.cu_stream());
        let values = &self.pinned()?[..into.len()];
        // SAFETY: `at` has room for `into.len()` values; the pinned memory is neither freed nor written before
        // the stream is idle, which is the trait's contract and `Drop`'s.
        let queued = unsafe { result::memcpy_htod_async(at, values, stream) };
        queued.map_err(|e| Fault::new("cuMemcpyHtoDAsync", e))
    }

    fn download(&mut self, from: Range<usize>) -> Result<(), Fault> {
        let (at, stream) = (self.at(&from)?, self.stream.cu_stream());
        let values = &mut self.pinned()?[..from.len()];
        // SAFETY: as in `upload`, the other way.
        let queued = unsafe { result::memcpy_dtoh_async(values, at, stream) };
        queued.map_err(|e| Fault::new("cuMemcpyDtoHAsync", e))
    }

    fn transfer(&mut self, transfers: &[Transfer]) -> Result<(), Fault> {
        let places: Vec<_> = transfers
            .iter()
            .map(|transfer| match transfer {
                Transfer::Send { values, .. } | Transfer::Receive { values, .. } => self.at(values),
            })
            .collect::<Result<_, _>>()?;
        let stream = self.stream.cu_stream().cast();
        let kind = sys::ncclDataType_t::ncclFloat32;
        self.nccl("ncclGroupEnd", |communicator| {
            let one = |(transfer, at): (&Transfer, &cuda::CUdeviceptr)| match transfer {
                // SAFETY: the place lies in the device's memory, which is kept until the stream is idle and
                // overlaps no other place of the group; the stream is of the communicator's GPU.
                Transfer::Send { to, values } => unsafe {
                    sys::ncclSend(*at as *const _, values.len(), kind, to.0 as c_int, communicator, stream)
                },
                // SAFETY: as above.
                Transfer::Receive { from, values } => unsafe {
                    sys::ncclRecv(*at as *mut _, values.len(), kind, from.0 as c_int, communicator, stream)
                },
            };
            // SAFETY: takes nothing; every start has its end below, on this thread.
            let started = unsafe { sys::ncclGroupStart() };
            let failed = transfers.iter().zip(&places).map(one).find(|status| !is_fine(*status));
            // SAFETY: as above.
            let ended = unsafe { sys::ncclGroupEnd() };
            if is_fine(started) { failed.unwrap_or(ended) } else { started }
        })
    }

    fn sum(&mut self, steps: &[Step], sources: &[usize], out: Range<usize>) -> Result<(), Fault> {
        let count = out.len();
        for source in sources {
            self.at(&(*source..source + count))?;
        }
        self.at(&out)?;
        let words = program::encode(steps, sources);
        let cuda = |call| move |error: result::DriverError| Fault::new(call, error);
        if self.program.len() < words.len() {
            self.program = self.stream.alloc_zeros(words.len()).map_err(cuda("cuMemAllocAsync"))?;
        }
        if !words.is_empty() {
            self.stream.memcpy_htod(&words, &mut self.program).map_err(cuda("cuMemcpyHtoDAsync"))?;
        }
        let blocks = count.div_ceil(THREADS as usize).clamp(1, MOST_BLOCKS) as u32;
        let grid = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        let (steps, start, count) = (words.len() as u64, out.start as u64, count as u64);
        let mut launch = self.stream.launch_builder(&self.kernel);
        launch.arg(&self.program).arg(&steps).arg(&mut self.memory).arg(&start).arg(&count);
        // SAFETY: the arguments are those of `tree_sum`; every place of the program and of the sum has `count`
        // values in the device's memory, as was looked at above.
        unsafe { launch.launch(grid) }.map(drop).map_err(cuda("cuLaunchKernel"))
    }

    fn all_reduce(&mut self, values: Range<usize>) -> Result<(), Fault> {
        let (at, stream) = (self.at(&values)?, self.stream.cu_stream().cast());
        let (kind, sum) = (sys::ncclDataType_t::ncclFloat32, sys::ncclRedOp_t::ncclSum);
        self.nccl("ncclAllReduce", |communicator| {
            // SAFETY: the place lies in the device's memory, which is kept until the stream is idle; NCCL
            // takes the same place for both sides.
            unsafe {
                sys::ncclAllReduce(
                    at as *const _,
                    at as *mut _,
                    values.len(),
                    kind,
                    sum,
                    communicator,
                    stream,
                )
            }
        })
    }

    fn is_queued(&mut self) -> Result<bool, Fault> {
        self.state()
    }

    fn is_idle(&mut self) -> Result<bool, Fault> {
        Ok(self.state()? && self.stream_is_idle()?)
    }

    fn abort(&mut self) {
        let done = abort(&self.communicator);
        // Ends with the abort, or the process does.
        let _ = done.recv();
    }

    fn abort_handle(&self) -> Box<dyn Fn() + Send + Sync> {
        let communicator = self.communicator.clone();
        Box::new(move || drop(abort(&communicator)))
    }
}

impl Drop for Gpu {
    /// The stream is idle before its memory goes.
    fn drop(&mut self) {
        if !self.communicator.is_ended() && self.finalize() {
            let destroy = |communicator: Communicator| {
                // What it says matters to nobody: the communicator is gone.
                // SAFETY: finalized, and taken: nothing else has it.
                let _ = unsafe { sys::ncclCommDestroy(communicator.0) };
            };
            let _ = self.communicator.end(destroy, ABORT_PATIENCE, cannot_abort).recv();
        }
        self.abort();
        if !until(ABORT_PATIENCE, || self.stream_is_idle().unwrap_or(true)) {
            cannot_abort();
        }
    }
}

/// The oldest library that the bindings fit: 2.28.0.
const OLDEST_NCCL: u32 = 22_800;

/// `NCCL_CONFIG_INITIALIZER` of nccl.h, which is no function, with `blocking` off.
fn nonblocking() -> sys::ncclConfig_t {
    const UNDEFINED: c_int = c_int::MIN;
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: OLDEST_NCCL,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

fn pinned(context: &Arc<CudaContext>, values: usize) -> Result<PinnedHostSlice<f32>, Fault> {
    // Not write-combined: downloads are read from it.
    // SAFETY: every bit pattern is an f32, so what stands there at first is some value.
    let pinned = unsafe { context.alloc_pinned_with_flags(values, 0) };
    pinned.map_err(|e| Fault::new("cuMemHostAlloc", format!("{e} ({} MiB)", values >> 18)))
}

fn abort(communicator: &Arc<Abortable<Communicator>>) -> std::sync::mpsc::Receiver<()> {
    let end = |communicator: Communicator| {
        // As above.
        // SAFETY: taken, so nothing else gets it; a call that is stuck in it is what NCCL allows beside this one.
        let _ = unsafe { sys::ncclCommAbort(communicator.0) };
    };
    communicator.end(end, ABORT_PATIENCE, cannot_abort)
}

/// A GPU that goes on computing into memory that is to be freed: only the process's end is safe.
fn cannot_abort() {
    tracing::error!("a communicator of NCCL could not be stopped: this process ends");
    // SAFETY: ends the process without the exit handlers, which would wait for the same GPU.
    unsafe { libc::_exit(CANNOT_ABORT) }
}

fn until(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

fn is_fine(status: sys::ncclResult_t) -> bool {
    matches!(status, sys::ncclResult_t::ncclSuccess | sys::ncclResult_t::ncclInProgress)
}

/// In NCCL's words, with the last warning that it logged.
fn check(
    call: &'static str,
    status: sys::ncclResult_t,
    communicator: Option<sys::ncclComm_t>,
) -> Result<(), Fault> {
    if is_fine(status) {
        return Ok(());
    }
    // SAFETY: both give strings that end with a zero and stay; the second takes a null communicator too.
    let (what, last) = unsafe {
        (
            text(sys::ncclGetErrorString(status)),
            text(sys::ncclGetLastError(communicator.unwrap_or(ptr::null_mut()))),
        )
    };
    let reason = if last.is_empty() { what } else { format!("{what} ({last})") };
    Err(Fault::new(call, reason))
}

/// # Safety
/// Null, or a string that ends with a zero and lives through the call.
unsafe fn text(string: *const std::ffi::c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: the caller's.
    unsafe { CStr::from_ptr(string) }.to_string_lossy().trim().to_owned()
}

/// `Reduction::Fast` promises the same bits on the same GPUs; NCCL chooses by load and size unless it is told.
fn warn_of_other_algorithms() {
    for (variable, wanted) in NCCL_IN_ONE_ORDER {
        if std::env::var(variable).as_deref() != Ok(wanted) {
            tracing::warn!("{variable} is not {wanted}: fast sums may differ from run to run");
        }
    }
}
