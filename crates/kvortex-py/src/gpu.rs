//! Which GPUs there are, and what their links do.

use kvortex::{DeviceChoice, link_profile};
use kvortex_mem::copy::Direction;
use kvortex_mem::copy::gpu::{Profile, Rates, Shape};
use kvortex_mem::cuda::Cuda;
use kvortex_mem::device::DeviceInfo;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors::{ConfigError, detached, entry};

/// "none", "auto", "cuda" or "cuda:1".
pub(crate) fn device_choice(text: &str) -> PyResult<DeviceChoice> {
    let number = |text: &str| if text.is_empty() { Some(0) } else { text.strip_prefix(':')?.parse().ok() };
    match (text, text.strip_prefix("cuda").and_then(number)) {
        ("none", _) => Ok(DeviceChoice::None),
        ("auto", _) => Ok(DeviceChoice::Auto(0)),
        (_, Some(ordinal)) => Ok(DeviceChoice::Cuda(ordinal)),
        _ => Err(ConfigError::new_err(format!("device = {text:?}: give \"auto\", \"none\", \"cuda\" or \"cuda:0\""))),
    }
}

/// What is known of each GPU that this process sees. CudaUnavailableError without a driver or a GPU.
///
/// Takes a context on each, with some hundred MB of its memory.
#[pyfunction]
pub(crate) fn gpus(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    entry(py, || {
        let found = detached(py, || {
            let opened = (0..Cuda::count()?).map(|ordinal| {
                let device = Cuda::open(ordinal)?;
                Ok((device.info().clone(), device.memory()?.0))
            });
            Ok(opened.collect::<Result<Vec<_>, kvortex_mem::MemError>>()?)
        })?;
        found.iter().map(|(info, free)| described(py, info, *free)).collect()
    })
}

fn described<'py>(py: Python<'py>, info: &DeviceInfo, free: usize) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("ordinal", info.ordinal)?;
    dict.set_item("name", &info.name)?;
    dict.set_item("bus_id", &info.bus_id)?;
    dict.set_item("driver_cuda", format!("{}.{}", info.driver.0, info.driver.1))?;
    dict.set_item("compute_capability", format!("{}.{}", info.capability.0, info.capability.1))?;
    dict.set_item("memory_bytes", info.memory_bytes)?;
    dict.set_item("memory_free_bytes", free)?;
    dict.set_item("multiprocessors", info.multiprocessors)?;
    dict.set_item("maps_host", info.maps_host)?;
    dict.set_item("numa_node", info.numa_node)?;
    Ok(dict)
}

/// What the link of GPU `ordinal` does, as copies are chosen by it: for "store" and "load" the speeds of one long copy and of
/// the copy kernel in bytes per second, the microseconds that each copy and each staged transfer costs beyond its bytes, and
/// under "methods" the way that is chosen for 1,000 blocks of 2 MiB, by the bytes of a fragment, for a load where it is awaited as
/// a whole. `fresh` measures anew.
#[pyfunction]
#[pyo3(signature = (ordinal=0, fresh=false))]
pub(crate) fn gpu_link(py: Python<'_>, ordinal: u32, fresh: bool) -> PyResult<Bound<'_, PyDict>> {
    entry(py, || {
        let (Profile { store, load }, maps_host) = detached(py, || {
            let device = Cuda::open(ordinal)?;
            Ok((link_profile(&device, fresh), device.info().maps_host))
        })?;
        let dict = PyDict::new(py);
        dict.set_item("store", rated(py, &store, maps_host, Direction::Store)?)?;
        dict.set_item("load", rated(py, &load, maps_host, Direction::Load)?)?;
        Ok(dict)
    })
}

fn rated<'py>(py: Python<'py>, rates: &Rates, maps_host: bool, direction: Direction) -> PyResult<Bound<'py, PyDict>> {
    const BLOCKS: usize = 1000;
    const BLOCK: usize = 2 << 20;
    let methods = PyDict::new(py);
    for fragment in (12..22).map(|power| 1usize << power) {
        let shape = Shape {
            bytes: BLOCKS * BLOCK,
            fragments: BLOCKS * (BLOCK / fragment),
            slots: BLOCKS,
            rows: BLOCKS,
            beside: direction == Direction::Store,
        };
        methods.set_item(fragment, rates.choose(&shape, maps_host).name())?;
    }
    let dict = PyDict::new(py);
    dict.set_item("link_bytes_per_s", rates.link * 1e6)?;
    dict.set_item("kernel_bytes_per_s", rates.kernel * 1e6)?;
    dict.set_item("copy_us", rates.copy_us)?;
    dict.set_item("staged_us", rates.staged_us)?;
    dict.set_item("methods", methods)?;
    Ok(dict)
}
