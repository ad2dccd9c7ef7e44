//! CUDA: device, stream, memory and cuBLAS are candle's, the kernels are our own.

use std::{
    collections::HashMap,
    ffi::{c_int, c_void},
    ptr,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    CudaDevice,
    cuda_backend::cudarc::{
        cublas::{self, CudaBlas},
        driver::{
            CudaEvent, CudaFunction, CudaGraph, CudaModule, CudaSlice, CudaStream, DevicePtr, DriverError,
            LaunchConfig, PinnedHostSlice, PushKernelArg, result, sys,
        },
        nvrtc::{CompileOptions, compile_ptx_with_opts},
    },
};

use super::{
    Element, GpuError,
    device::Argument,
    kernels::KERNELS,
    product::{RawFactor, RawProduct},
    staging::{self, Lane},
};

/// One GPU.
pub(super) struct Cuda {
    ordinal: usize,
    name: String,
    stream: Arc<CudaStream>,
    blas: Arc<CudaBlas>,
    // Behind cuBLAS's handle, which uses it to its end.
    _workspace: CudaSlice<u8>,
    module: Arc<CudaModule>,
    /// By name, as they are first launched.
    functions: Mutex<HashMap<String, CudaFunction>>,
    staging: Mutex<[Staging; 2]>,
}

/// Memory that the GPU reaches by itself, and when the last copy from or to it is done.
struct Staging {
    pinned: PinnedHostSlice<u8>,
    done: CudaEvent,
}

/// Bytes of each: a copy of that size takes a third of a millisecond, much more than starting it does.
const STAGED: usize = 16 << 20;

/// Fewer bytes go directly: the driver has them copied by the time that the call returns.
const STAGED_LEAST: usize = 64 << 10;

/// Staging on its way to or from one place in the GPU's memory.
struct CudaLane<'a> {
    staging: &'a mut [Staging; 2],
    stream: &'a CudaStream,
    address: u64,
}

/// A recorded stretch of the stream, ready to be launched.
pub(super) struct Graph {
    graph: CudaGraph,
    stream: Arc<CudaStream>,
}

// SAFETY: graphs belong to no thread; the driver asks that two don't use one at a time, which they do only through `&Cuda`
// by whoever has the GPU's turn, and at its drop, when nobody else has it.
unsafe impl Send for Graph {}

/// Memory from the device's pool, given back in the stream's order.
pub(super) struct Memory {
    slice: CudaSlice<u8>,
    address: u64,
}

fn failed(call: &'static str) -> impl Fn(DriverError) -> GpuError {
    move |error| GpuError::Failed { call, problem: error.to_string() }
}

impl Cuda {
    pub(super) fn open(ordinal: usize) -> Result<Self, GpuError> {
        let unavailable = |problem: String| GpuError::Unavailable { ordinal, problem };
        // candle would panic where there is no driver.
        result::init().map_err(|e| unavailable(format!("no driver answers ({e})")))?;
        let count = result::device::get_count().map_err(|e| unavailable(e.to_string()))?;
        if ordinal >= count as usize {
            return Err(unavailable(format!("this machine has {count}")));
        }
        // A stream of its own: candle's usual one is each thread's own, and ranks and replicas are
        // several threads.
        let device = CudaDevice::new_with_stream(ordinal).map_err(|e| unavailable(e.to_string()))?;
        // SAFETY: all work of this device goes through the one stream, so nothing is used on another.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        keep_freed_memory(&stream)?;
        let context = stream.context();
        let (major, minor) = context.compute_capability().map_err(failed("cuDeviceGetAttribute"))?;
        let options = CompileOptions {
            options: vec![
                format!("--gpu-architecture=compute_{major}{minor}"),
                // A sum is rounded as it is written, so that it can be held against the CPU's.
                "--fmad=false".to_owned(),
            ],
            ..CompileOptions::default()
        };
        let ptx = compile_ptx_with_opts(KERNELS, options)
            .map_err(|e| GpuError::Kernels { problem: format!("{e:?}") })?;
        let module = context.load_module(ptx).map_err(failed("cuModuleLoadData"))?;
        let name = context.name().map_err(failed("cuDeviceGetName"))?;
        let blas = device.cublas_handle();
        let workspace = workspace(&stream, &blas, if major >= 9 { WORKSPACE_HOPPER } else { WORKSPACE })?;
        let staging = Mutex::new([Staging::new(&stream)?, Staging::new(&stream)?]);
        let functions = Mutex::default();
        Ok(Self { ordinal, name, stream, blas, _workspace: workspace, module, functions, staging })
    }

    pub(super) fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Its model, as NVIDIA calls it.
    pub(super) fn model(&self) -> &str {
        &self.name
    }

    pub(super) fn name(&self) -> String {
        format!("{} (cuda:{})", self.name, self.ordinal)
    }

    pub(super) fn memory(&self) -> Result<[u64; 2], GpuError> {
        let (free, total) = self.stream.context().mem_get_info().map_err(failed("cuMemGetInfo"))?;
        Ok([free as u64, total as u64])
    }

    pub(super) fn synchronize(&self) -> Result<(), GpuError> {
        self.stream.synchronize().map_err(failed("cuStreamSynchronize"))
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<Memory, GpuError> {
        // SAFETY: nobody reads it before it is written, as arrays say.
        self.hold(bytes, unsafe { self.stream.alloc::<u8>(bytes.max(1)) })
    }

    pub(super) fn allocate_zeros(&self, bytes: usize) -> Result<Memory, GpuError> {
        self.hold(bytes, self.stream.alloc_zeros::<u8>(bytes.max(1)))
    }

    fn hold(&self, bytes: usize, slice: Result<CudaSlice<u8>, DriverError>) -> Result<Memory, GpuError> {
        let slice = slice.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                GpuError::OutOfMemory { bytes, problem: error.to_string() }
            }
            _ => failed("cuMemAllocAsync")(error),
        })?;
        let address = slice.device_ptr(&self.stream).0;
        Ok(Memory { slice, address })
    }

    pub(super) fn write(&self, memory: &Memory, bytes: &[u8]) -> Result<(), GpuError> {
        assert!(bytes.len() <= memory.slice.len());
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        if bytes.len() >= STAGED_LEAST {
            return self.staged(memory, |lane| staging::upload(lane, 0, bytes));
        }
        // SAFETY: inside the memory. From pageable memory the call returns once the bytes are read.
        unsafe { result::memcpy_htod_async(memory.address, bytes, self.stream.cu_stream()) }
            .map_err(failed("cuMemcpyHtoDAsync"))
    }

    pub(super) fn read(&self, memory: &Memory, from: usize, bytes: &mut [u8]) -> Result<(), GpuError> {
        if bytes.is_empty() {
            return Ok(());
        }
        assert!(from <= memory.slice.len() && bytes.len() <= memory.slice.len() - from);
        if bytes.len() >= STAGED_LEAST {
            self.bind()?;
            return self.staged(memory, |lane| staging::download(lane, from, bytes));
        }
        let part = memory.slice.slice(from..from + bytes.len());
        self.stream.memcpy_dtoh(&part, bytes).map_err(failed("cuMemcpyDtoHAsync"))?;
        self.synchronize()
    }

    /// Copies inside `memory`, whose bounds the caller has checked; one at a time.
    fn staged(
        &self,
        memory: &Memory,
        copy: impl FnOnce(&mut CudaLane<'_>) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        // A copy that failed left events behind that say when its buffers are free.
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        copy(&mut CudaLane { staging: &mut staging, stream: &self.stream, address: memory.address })
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
        let function = self.function(kernel)?;
        let mut launch = self.stream.launch_builder(&function);
        for argument in arguments {
            match argument {
                Argument::U32(value) => launch.arg(value),
                Argument::F32(value) => launch.arg(value),
                Argument::U64(value) => launch.arg(value),
            };
        }
        let config = LaunchConfig { grid_dim: (x, y, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: by the caller's promise.
        unsafe { launch.launch(config) }.map_err(failed("cuLaunchKernel"))?;
        Ok(())
    }

    fn function(&self, kernel: &str) -> Result<CudaFunction, GpuError> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(kernel) {
            return Ok(function.clone());
        }
        let function = self.module.load_function(kernel).map_err(failed("cuModuleGetFunction"))?;
        functions.insert(kernel.to_owned(), function.clone());
        Ok(function)
    }

    /// cuBLAS reads memory by columns, to which ours are transposes: `cᵀ = bᵀ aᵀ`.
    ///
    /// # Safety
    ///
    /// As of [`Gpu::multiply`](super::Gpu::multiply).
    pub(super) unsafe fn multiply(&self, product: &RawProduct) -> Result<(), GpuError> {
        let RawProduct { m, n, k, alpha, a, b, beta, c, element, result } = *product;
        self.bind()?;
        // SAFETY: by the caller's promise; alpha and beta are on the host, where the handle expects them.
        unsafe {
            cublas::result::gemm_ex(
                *self.blas.handle(),
                operation(b),
                operation(a),
                size(n)?,
                size(m)?,
                size(k)?,
                ptr::from_ref(&alpha).cast(),
                b.address as *const c_void,
                data_type(element),
                size(b.row)?,
                a.address as *const c_void,
                data_type(element),
                size(a.row)?,
                ptr::from_ref(&beta).cast(),
                c as *mut c_void,
                data_type(result),
                size(n)?,
                cublas::sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas::sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(|e| GpuError::Failed { call: "cublasGemmEx", problem: format!("{e:?}") })
    }

    pub(super) fn begin_capture(&self) -> Result<(), GpuError> {
        // This thread alone does nothing that a recording forbids; NCCL's and others' may.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed("cuStreamBeginCapture"))
    }

    /// The stream is itself again whatever comes back.
    pub(super) fn end_capture(&self) -> Result<Graph, GpuError> {
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        match graph.map_err(failed("cuStreamEndCapture or cuGraphInstantiateWithFlags"))? {
            Some(graph) => Ok(Graph { graph, stream: self.stream.clone() }),
            None => Err(GpuError::Failed {
                call: "cuStreamEndCapture",
                problem: "nothing was recorded".to_owned(),
            }),
        }
    }

    /// # Safety
    ///
    /// As of [`Gpu::replay`](super::Gpu::replay).
    pub(super) unsafe fn launch_graph(&self, graph: &Graph) -> Result<(), GpuError> {
        graph.graph.launch().map_err(failed("cuGraphLaunch"))
    }

    /// Calls below cudarc's own want the context on their thread.
    fn bind(&self) -> Result<(), GpuError> {
        self.stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))
    }
}

impl Staging {
    fn new(stream: &CudaStream) -> Result<Self, GpuError> {
        let context = stream.context();
        // Not write-combined: downloads are read from it.
        // SAFETY: every bit pattern is a byte, so what stands there at first is some value.
        let pinned =
            unsafe { context.alloc_pinned_with_flags(STAGED, 0) }.map_err(failed("cuMemHostAlloc"))?;
        // An event that was never recorded is one that has come.
        let done = context
            .new_event(Some(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))
            .map_err(failed("cuEventCreate"))?;
        Ok(Self { pinned, done })
    }
}

impl Lane for CudaLane<'_> {
    type Error = GpuError;

    fn buffer(&mut self, which: usize) -> Result<&mut [u8], GpuError> {
        let Staging { pinned, done } = &mut self.staging[which];
        done.synchronize().map_err(failed("cuEventSynchronize"))?;
        pinned.as_mut_slice().map_err(failed("cuEventSynchronize"))
    }

    fn fetch(&mut self, which: usize, from: usize, len: usize) -> Result<(), GpuError> {
        let (at, stream) = (self.address + from as u64, self.stream);
        let buffer = &mut self.buffer(which)?[..len];
        // SAFETY: `at` has `len` bytes, as whoever copies has checked, and so has the buffer, which is neither touched nor
        // freed before the event that is recorded next: `buffer` waits for it, and `Cuda`'s drop for the stream.
        unsafe { result::memcpy_dtoh_async(buffer, at, stream.cu_stream()) }
            .map_err(failed("cuMemcpyDtoHAsync"))?;
        self.staging[which].done.record(stream).map_err(failed("cuEventRecord"))
    }

    fn deliver(&mut self, which: usize, to: usize, len: usize) -> Result<(), GpuError> {
        let (at, stream) = (self.address + to as u64, self.stream);
        // Not `buffer`: whoever filled it has waited.
        let pinned = &mut self.staging[which].pinned;
        let buffer = &pinned.as_slice().map_err(failed("cuEventSynchronize"))?[..len];
        // SAFETY: as in `fetch`, the other way.
        unsafe { result::memcpy_htod_async(at, buffer, stream.cu_stream()) }
            .map_err(failed("cuMemcpyHtoDAsync"))?;
        self.staging[which].done.record(stream).map_err(failed("cuEventRecord"))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Copies from or to pinned memory end before it is freed. What the stream says then, nobody can use.
        let _ = self.stream.synchronize();
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The manual doesn't say that a graph may go while it runs. What the stream says then, nobody can use.
        let _ = self.stream.synchronize();
    }
}

impl Memory {
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

/// What NVIDIA recommends for cuBLAS's workspace, from Hopper on and before.
const WORKSPACE_HOPPER: usize = 32 << 20;
const WORKSPACE: usize = 4 << 20;

/// Gives cuBLAS a workspace for good: of its own it allocates one within each recording. It is the same for what is recorded
/// and what is not, so that cuBLAS chooses alike for both; one serves all, as all work goes through one stream.
fn workspace(stream: &Arc<CudaStream>, blas: &CudaBlas, bytes: usize) -> Result<CudaSlice<u8>, GpuError> {
    // SAFETY: a workspace has no content that anybody counts on.
    let workspace = unsafe { stream.alloc::<u8>(bytes) }.map_err(failed("cuMemAllocAsync"))?;
    let address = workspace.device_ptr(stream).0 as *mut c_void;
    // SAFETY: that many bytes, aligned as the driver aligns all memory, which live as long as the handle: whoever opens the
    // GPU keeps both, and drops the handle first.
    unsafe { cublas::sys::cublasSetWorkspace_v2(*blas.handle(), address, bytes) }
        .result()
        .map_err(|e| GpuError::Failed { call: "cublasSetWorkspace", problem: format!("{e:?}") })?;
    Ok(workspace)
}

/// By default a pool gives freed memory back to the driver at every synchronisation, which makes the
/// next allocation slow; this one keeps it.
fn keep_freed_memory(stream: &CudaStream) -> Result<(), GpuError> {
    let mut pool = ptr::null_mut();
    let mut keep = u64::MAX;
    stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
    // SAFETY: both calls take addresses of values of the types that the driver's manual names.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device())
            .result()
            .map_err(failed("cuDeviceGetDefaultMemPool"))?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, ptr::from_mut(&mut keep).cast())
            .result()
            .map_err(failed("cuMemPoolSetAttribute"))
    }
}

fn operation(factor: RawFactor) -> cublas::sys::cublasOperation_t {
    match factor.is_transposed {
        true => cublas::sys::cublasOperation_t::CUBLAS_OP_T,
        false => cublas::sys::cublasOperation_t::CUBLAS_OP_N,
    }
}

fn data_type(element: Element) -> cublas::sys::cudaDataType {
    match element {
        Element::F32 => cublas::sys::cudaDataType::CUDA_R_32F,
        Element::Bf16 => cublas::sys::cudaDataType::CUDA_R_16BF,
        Element::U32 | Element::U64 => unreachable!("a product is of numbers"),
    }
}

fn size(size: usize) -> Result<c_int, GpuError> {
    c_int::try_from(size).map_err(|_| GpuError::Unsupported {
        field: "batch",
        problem: format!("makes a matrix of {size} rows or columns; cuBLAS takes less than 2^31"),
    })
}
