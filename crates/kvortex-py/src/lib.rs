//! The Python seam of KVortex: convert, detach from the GIL, call, map the error. No decision about caching is made here.
//!
//! Importing starts no thread and touches no device. Everything is safe for threads: classes are frozen, and locks are never
//! held while waiting for the GIL.
#![deny(unsafe_code)]

use pyo3::prelude::*;

mod answers;
mod device_pool;
mod disk;
#[expect(unsafe_code, reason = "raw memory crosses the border here and nowhere else")]
mod dlpack;
mod engine;
mod errors;
mod gpu;
mod identity;
mod keys;
mod logs;
mod number;
mod numbers;
mod paged;
mod parts;
mod pool;
mod promotion;
mod ranks;
mod raw;
mod stream;
mod tensors;

/// The native part of kvortex; import `kvortex` instead.
#[pymodule(gil_used = false)]
mod _core {
    use super::*;

    #[pymodule_export]
    use answers::{Block, PyLease, PyMask, PyReport, PyTicket};
    #[pymodule_export]
    use device_pool::{DeviceBuffer, PyDevicePool};
    #[pymodule_export]
    use disk::{inspect_disk, trim_disk};
    #[pymodule_export]
    use dlpack::HostView;
    #[pymodule_export]
    use engine::PyEngine;
    #[pymodule_export]
    use errors::{
        CapacityError, ClosedError, ConfigError, CudaError, CudaUnavailableError, DoubleFreeError, ForeignPointerError,
        ForkedProcessError, InvalidArgumentError, KVortexError, KVortexTimeoutError, LayoutError, PoolError,
        PoolExhaustedError, TransferError, UnsupportedError,
    };
    #[pymodule_export]
    use gpu::{gpu_link, gpus};
    #[pymodule_export]
    use identity::{PyKeyChain, PyNamespace, hash_tokens};
    #[pymodule_export]
    use paged::{PagedBlocks, PagedCache};
    #[pymodule_export]
    use parts::PyParts;
    #[pymodule_export]
    use pool::{PinnedBuffer, PyPool};
    #[pymodule_export]
    use promotion::PyPromotion;
    #[pymodule_export]
    use ranks::{PyRankMover, PyRankPlanner};
    #[pymodule_export]
    use raw::RawTensor;
    #[pymodule_export]
    use tensors::Segments;

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// What this library was built as, for bug reports.
    #[pyfunction]
    fn build_info(py: Python<'_>) -> PyResult<Bound<'_, pyo3::types::PyDict>> {
        let dict = pyo3::types::PyDict::new(py);
        dict.set_item("version", __version__)?;
        dict.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
        dict.set_item("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))?;
        dict.set_item("abi3", "3.11")?;
        Ok(dict)
    }

    #[pymodule_init]
    fn init() {
        logs::install();
    }
}
