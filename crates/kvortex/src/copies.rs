//! Which copy engine serves an engine: the CPU alone, or the CPU and a GPU.

use kvortex_mem::copy::{CopyEngine, HostCopy};
use kvortex_mem::device::Device;
use kvortex_mem::map::HostMemory;

use crate::config::{DeviceChoice, EngineConfig};
use crate::error::Result;
use crate::sync::Arc;

/// The device that `config` asks for, opened; nothing that cannot be undone has happened to it.
#[cfg(not(shuttle))]
pub(crate) fn open(choice: DeviceChoice) -> Result<Option<Arc<dyn Device>>> {
    use kvortex_mem::cuda::Cuda;

    match choice {
        DeviceChoice::None => Ok(None),
        DeviceChoice::Cuda(ordinal) => Ok(Some(Cuda::open(ordinal)?)),
        DeviceChoice::Auto(ordinal) => match Cuda::open(ordinal) {
            Ok(device) => Ok(Some(device)),
            Err(error) => {
                log::info!("plain host memory: {error}");
                Ok(None)
            }
        },
    }
}

#[cfg(shuttle)]
pub(crate) fn open(_: DeviceChoice) -> Result<Option<Arc<dyn Device>>> {
    Ok(None)
}

/// The copies of an engine whose arena is `memory`, which is page-locked if there is a device. Where it cannot be, copies are
/// slow but right.
pub(crate) fn serve(
    config: &EngineConfig,
    device: Option<&Arc<dyn Device>>,
    memory: &mut HostMemory,
) -> Result<Arc<dyn CopyEngine>> {
    let host = Arc::new(HostCopy::new(config.threads));
    let Some(device) = device else { return Ok(host) };
    if let Err(error) = memory.pin(device) {
        log::warn!("copies from and to {} will be slow: {error}", device.info().name);
    }
    with_device(config, host, device)
}

#[cfg(not(shuttle))]
fn with_device(config: &EngineConfig, host: Arc<HostCopy>, device: &Arc<dyn Device>) -> Result<Arc<dyn CopyEngine>> {
    use kvortex_mem::copy::ByPlace;
    use kvortex_mem::copy::gpu::{GpuCopy, GpuOptions};

    let options = GpuOptions {
        streams: config.gpu.streams,
        method: config.gpu.method,
        staging_bytes: config.gpu.staging_bytes,
        ..GpuOptions::default()
    };
    let gpu = GpuCopy::new(Arc::clone(device), options, profile::of(device))?;
    Ok(Arc::new(ByPlace::new(host, Arc::new(gpu))))
}

#[cfg(shuttle)]
fn with_device(_: &EngineConfig, host: Arc<HostCopy>, _: &Arc<dyn Device>) -> Result<Arc<dyn CopyEngine>> {
    Ok(host)
}

#[cfg(not(shuttle))]
mod profile {
    //! The speed of a GPU's link, measured once in a process.

    use std::collections::HashMap;

    use kvortex_mem::copy::gpu::{GpuCopy, Profile};
    use kvortex_mem::device::Device;
    use parking_lot::Mutex;

    use crate::sync::Arc;

    static MEASURED: Mutex<Option<HashMap<String, Profile>>> = Mutex::new(None);

    /// The profile of `device`'s link; an assumed one if it cannot be measured.
    pub(super) fn of(device: &Arc<dyn Device>) -> Profile {
        let mut measured = MEASURED.lock();
        let measured = measured.get_or_insert_default();
        let info = device.info();
        *measured.entry(format!("{} {}", info.bus_id, info.name)).or_insert_with(|| match GpuCopy::calibrate(device) {
            Ok(profile) => {
                log::info!("link of {}: {profile:?}", device.info().name);
                profile
            }
            Err(error) => {
                log::warn!("the link of {} could not be measured: {error}", device.info().name);
                Profile::ASSUMED
            }
        })
    }
}
