//! Which copy engine serves an engine: the CPU alone, or the CPU and a GPU.

use std::thread;
#[cfg(not(shuttle))]
use std::time::Duration;

use kvortex_mem::arena::Arena;
use kvortex_mem::copy::{CopyEngine, HostCopy};
use kvortex_mem::device::Device;
use kvortex_mem::map::{HostMemory, MapOptions};

use crate::config::{DeviceChoice, EngineConfig};
#[cfg(not(shuttle))]
use crate::error::Error;
use crate::error::Result;
use crate::lower::Lower;
use crate::namespace::Namespace;
use crate::planner::Planner;
use crate::sync::Arc;
#[cfg(not(shuttle))]
use crate::tier::{
    Identity, Tier,
    disk::{DiskConfig, DiskTier},
    late,
    rows::AllRows,
};

/// Threads that fill an arena with pages when it is made. With 4, 40 GiB of huge pages take 2.3 s, with 8 1.4 s, with 16 0.9 s
/// (16 cores of a virtual machine, 2026-11).
const TOUCH_THREADS: usize = 16;

/// The device that `choice` names; `None` if it leaves that open and none can be used.
///
/// # Errors
/// [`Error::Mem`](crate::Error::Mem) when the named device cannot be used, with the reason.
#[cfg(not(shuttle))]
pub fn open(choice: DeviceChoice) -> Result<Option<Arc<dyn Device>>> {
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

/// There are no devices in a model.
///
/// # Errors
/// Never.
#[cfg(shuttle)]
pub fn open(_: DeviceChoice) -> Result<Option<Arc<dyn Device>>> {
    Ok(None)
}

/// The tier below an arena, if one is configured and can be used. It outlives the process, so it needs to know whose blocks these
/// are. One that cannot be used is a warning: the host tier serves without.
#[cfg(not(shuttle))]
pub(crate) fn lower(
    config: &EngineConfig,
    arena: &Arc<Arena>,
    namespace: Namespace,
    planner: &Arc<Planner>,
) -> Option<Lower> {
    let disk = config.disk.clone()?;
    if namespace == Namespace::default() {
        log::warn!("the disk tier stays off: nothing says which model the blocks belong to; bind a namespace");
        return None;
    }
    match lower_of_rows(disk, config.disk_read_deadline, &[Arc::clone(arena)], namespace, planner) {
        Ok(lower) => Some(lower),
        Err(error) => {
            log::warn!("the disk tier stays off: {error}");
            None
        }
    }
}

/// The tier below `rows`, which are the slots of `planner` on each rank. The rows share what the configuration allows.
#[cfg(not(shuttle))]
pub(crate) fn lower_of_rows(
    disk: DiskConfig,
    deadline: Duration,
    rows: &[Arc<Arena>],
    namespace: Namespace,
    planner: &Arc<Planner>,
) -> Result<Lower> {
    let block_bytes = rows.iter().map(|row| row.slot_bytes()).sum();
    let rows = rows.to_vec();
    let tier = late::open("disk", move || below_rows(&disk, &rows, namespace))?;
    Lower::new(tier, Arc::clone(planner), block_bytes, deadline)
}

/// A disk tier for each of `rows`, as one.
#[cfg(not(shuttle))]
fn below_rows(disk: &DiskConfig, rows: &[Arc<Arena>], namespace: Namespace) -> Result<Arc<dyn Tier>> {
    let world = rows.len() as u32;
    disk.clear_other_worlds(world)?;
    let open = |(row, arena): (u32, &Arc<Arena>)| {
        let tier = DiskTier::open(disk.share_of(row, world, arena), arena, Identity { namespace, row, world })?;
        Ok(Box::new(tier) as Box<dyn Tier>)
    };
    let mut tiers = (0..).zip(rows).map(open).collect::<Result<Vec<_>>>()?;
    match tiers.pop() {
        Some(tier) if tiers.is_empty() => Ok(Arc::from(tier)),
        Some(tier) => Ok(Arc::new(AllRows::new(tiers.into_iter().chain([tier]).collect()))),
        None => Err(Error::invalid("no rows")),
    }
}

/// There are no files in a model.
#[cfg(shuttle)]
pub(crate) fn lower(_: &EngineConfig, _: &Arc<Arena>, _: Namespace, _: &Arc<Planner>) -> Option<Lower> {
    None
}

/// The memory of an arena, near its GPU unless `config` says otherwise.
pub(crate) fn map(config: &EngineConfig, device: Option<&Arc<dyn Device>>) -> Result<HostMemory> {
    Ok(HostMemory::map(&map_options(config, device))?)
}

/// How that memory is mapped.
pub(crate) fn map_options(config: &EngineConfig, device: Option<&Arc<dyn Device>>) -> MapOptions {
    MapOptions {
        bytes: config.pool_bytes,
        huge_pages: config.huge_pages,
        numa_node: config.numa_node.or_else(|| device.and_then(|device| device.info().numa_node)),
        touch_threads: thread::available_parallelism().map_or(1, usize::from).min(TOUCH_THREADS),
    }
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
    memory.pin_or_warn(device);
    with_device(config, host, device)
}

#[cfg(not(shuttle))]
fn with_device(config: &EngineConfig, host: Arc<HostCopy>, device: &Arc<dyn Device>) -> Result<Arc<dyn CopyEngine>> {
    use kvortex_mem::copy::ByPlace;
    use kvortex_mem::copy::gpu::{GpuCopy, GpuOptions};

    use crate::profile;

    let options = GpuOptions {
        streams: config.gpu.streams,
        method: config.gpu.method,
        staging_bytes: config.gpu.staging_bytes,
        ..GpuOptions::default()
    };
    let gpu = GpuCopy::new(Arc::clone(device), options, profile::link_profile(device, false))?;
    Ok(Arc::new(ByPlace::new(host, Arc::new(gpu))))
}

#[cfg(shuttle)]
fn with_device(_: &EngineConfig, host: Arc<HostCopy>, _: &Arc<dyn Device>) -> Result<Arc<dyn CopyEngine>> {
    Ok(host)
}
