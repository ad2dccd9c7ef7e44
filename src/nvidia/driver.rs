use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use cudarc::driver::{
    CudaContext, DriverError,
    result::{self, device},
    sys::{CUdevice, CUdevice_attribute, CUresult, CUuuid},
};

use super::{Gpu, NoGpu};

/// The GPUs of this process, by ordinal. Makes a context on each, for the memory that is free.
pub fn gpus() -> Result<Vec<Gpu>, NoGpu> {
    initialise()?;
    let count = device::get_count().map_err(|error| refusal("cuDeviceGetCount", error))?;
    match count {
        0 => Err(NoGpu::NoDevice),
        count => (0..count as u32).map(gpu).collect(),
    }
}

/// The UUID of the GPU with this number; makes no context.
pub fn uuid(ordinal: u32) -> Result<String, NoGpu> {
    initialise()?;
    let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
    let device = device::get(number).map_err(|error| refusal("cuDeviceGet", error))?;
    device::get_uuid(device).map(text_of).map_err(|error| refusal("cuDeviceGetUuid", error))
}

fn initialise() -> Result<(), NoGpu> {
    // cudarc panics where a driver lacks a function that its bindings name.
    let initialised = catch_unwind(result::init)
        .map_err(|_| NoGpu::NoDriver { reason: "it is older than CUDA 12".into() })?;
    initialised.map_err(|error| match error.0 {
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            NoGpu::NoDriver { reason: "libcuda.so.1 is not to be found".into() }
        }
        CUresult::CUDA_ERROR_NO_DEVICE => NoGpu::NoDevice,
        _ => refusal("cuInit", error),
    })
}

fn gpu(ordinal: u32) -> Result<Gpu, NoGpu> {
    let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
    let device = device::get(number).map_err(|error| refusal("cuDeviceGet", error))?;
    let capability = (
        attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    // SAFETY: `device` comes from `cuDeviceGet`.
    let memory = unsafe { device::total_mem(device) }.map_err(|error| refusal("cuDeviceTotalMem", error))?;
    Ok(Gpu {
        ordinal,
        name: device::get_name(device).map_err(|error| refusal("cuDeviceGetName", error))?,
        uuid: device::get_uuid(device).map(text_of).map_err(|error| refusal("cuDeviceGetUuid", error))?,
        capability,
        memory: memory as u64,
        free: free_memory(ordinal),
    })
}

fn attribute(device: CUdevice, attribute: CUdevice_attribute) -> Result<u32, NoGpu> {
    // SAFETY: `device` comes from `cuDeviceGet`.
    let value = unsafe { device::get_attribute(device, attribute) };
    value.map(|value| value as u32).map_err(|error| refusal("cuDeviceGetAttribute", error))
}

/// Makes a context, as every use of the GPU does.
fn free_memory(ordinal: u32) -> Result<u64, String> {
    let ask = || -> Result<usize, DriverError> {
        let context: Arc<CudaContext> = CudaContext::new(ordinal as usize)?;
        context.mem_get_info().map(|(free, _)| free)
    };
    match catch_unwind(AssertUnwindSafe(ask)) {
        Ok(Ok(free)) => Ok(free as u64),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the driver lacks a function of CUDA 13".into()),
    }
}

fn refusal(call: &'static str, error: DriverError) -> NoGpu {
    NoGpu::Driver { call, reason: error.to_string() }
}

/// As `nvidia-smi -L` writes it.
fn text_of(uuid: CUuuid) -> String {
    let hex = hex::encode(uuid.bytes.map(|byte| byte as u8));
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
