//! `PinnedHostPool`: memory of any size for Python, given back by `free` or when its last view ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvortex::DeviceChoice;
use kvortex_mem::MemError;
use kvortex_mem::map::{HostMemory, MapOptions, Pinned};
use kvortex_mem::pool::PinnedHostPool;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::dlpack::{HostView, Lent, Place};
use crate::errors::{detached, entry, invalid, raise_mem};
use crate::gpu::device_choice;
use crate::number::whole;

/// Threads that touch the pages of a new pool.
const TOUCH_THREADS: usize = 4;

/// Who holds what of a pool. Under the lock an address has an entry exactly while it is allocated, so that nobody can give
/// back memory that a piece still stands for.
#[derive(Default)]
pub(crate) struct Held(Mutex<HashMap<usize, Weak<Place>>>);

impl Held {
    pub(crate) fn lock(&self) -> MutexGuard<'_, HashMap<usize, Weak<Place>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back what starts at `addr`. `unknown` says why nothing does.
    pub(crate) fn give_back(&self, addr: usize, unknown: impl FnOnce() -> Result<(), MemError>) -> PyResult<()> {
        let place = {
            let held = self.lock();
            match held.get(&addr) {
                Some(place) => place.upgrade(),
                None => return unknown().map_err(|error| raise_mem(&error)),
            }
        };
        match place {
            Some(place) if place.give_back()? => Ok(()),
            Some(_) => Err(raise_mem(&MemError::DoubleFree { addr })),
            None => Err(invalid(format!("the buffer at {addr:#x} ended, but views of it live on: drop them first"))),
        }
    }
}

struct Core {
    pool: PinnedHostPool,
    held: Held,
}

impl Core {
    fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Arc<Place>, MemError> {
        let mut held = self.held.lock();
        let addr = self.pool.allocate(bytes)?.addr;
        let place = Arc::new(Place::new(Lent::piece(Piece { core: self.clone(), addr, bytes })));
        held.insert(addr, Arc::downgrade(&place));
        Ok(place)
    }
}

/// A live allocation; its drop gives it back.
pub(crate) struct Piece {
    core: Arc<Core>,
    addr: usize,
    bytes: usize,
}

impl Piece {
    pub(crate) const fn addr(&self) -> usize {
        self.addr
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let mut held = self.core.held.lock();
        held.remove(&self.addr);
        if let Err(error) = self.core.pool.free(self.addr) {
            log::debug!("{:#x} not given back: {error}", self.addr);
        }
    }
}

/// A pool whose memory is page-locked for a device if there is one, and plain if that fails.
fn pinned_pool(bytes: usize, alignment: usize, choice: DeviceChoice) -> Result<PinnedHostPool, kvortex::Error> {
    let device = kvortex::open_device(choice)?;
    let numa_node = device.as_ref().and_then(|device| device.info().numa_node);
    let mut memory = HostMemory::map(&MapOptions { bytes, huge_pages: true, numa_node, touch_threads: TOUCH_THREADS })?;
    if let Some(device) = device {
        memory.pin_or_warn(&device);
    }
    Ok(PinnedHostPool::new(memory, alignment)?)
}

/// Memory of any size from one region. Page-locked for the GPU that `device` names ("auto", "none", "cuda" or "cuda:0", as in
/// KVortexConfig), plain memory where there is none (`pinned` says which). Best fit; neighbours that are given back grow
/// together.
#[pyclass(name = "PinnedHostPool", frozen, module = "kvortex")]
pub(crate) struct PyPool(Arc<Core>);

#[pymethods]
impl PyPool {
    #[new]
    #[pyo3(signature = (capacity_bytes, alignment=None, *, device="auto"),
           text_signature = "(capacity_bytes, alignment=128, *, device='auto')")]
    fn new(capacity_bytes: &Bound<'_, PyAny>, alignment: Option<&Bound<'_, PyAny>>, device: &str) -> PyResult<Self> {
        let py = capacity_bytes.py();
        entry(py, || {
            let bytes = whole("capacity_bytes", capacity_bytes)?;
            let alignment = alignment.map_or(Ok(128), |alignment| whole("alignment", alignment))?;
            let choice = device_choice(device)?;
            let pool = detached(py, || pinned_pool(bytes, alignment, choice))?;
            Ok(Self(Arc::new(Core { pool, held: Held::default() })))
        })
    }

    /// `nbytes` of memory. PoolExhaustedError when no free run is long enough.
    fn allocate<'py>(&self, py: Python<'py>, nbytes: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PinnedBuffer>> {
        entry(py, || {
            let place = self.0.allocate(whole("nbytes", nbytes)?).map_err(|error| raise_mem(&error))?;
            Bound::new(py, PyClassInitializer::from(HostView::of(place)?).add_subclass(PinnedBuffer))
        })
    }

    /// Gives back the buffer at `address`. ForeignPointerError or DoubleFreeError for any other address;
    /// InvalidArgumentError while views of it exist.
    fn free(&self, py: Python<'_>, address: &Bound<'_, PyAny>) -> PyResult<()> {
        entry(py, || {
            let addr = whole("address", address)?;
            self.0.held.give_back(addr, || self.0.pool.free(addr))
        })
    }

    /// capacity, used, free, peak and largest_free in bytes; fragmentation (1 - largest_free / free); live, allocations and
    /// failures as counts.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.0.pool.stats();
        let dict = PyDict::new(py);
        dict.set_item("capacity", stats.capacity)?;
        dict.set_item("used", stats.used)?;
        dict.set_item("free", stats.free)?;
        dict.set_item("peak", stats.peak)?;
        dict.set_item("largest_free", stats.largest_free)?;
        dict.set_item("fragmentation", stats.fragmentation)?;
        dict.set_item("live", stats.live)?;
        dict.set_item("allocations", stats.allocations)?;
        dict.set_item("failures", stats.failures)?;
        Ok(dict)
    }

    /// Whether the memory is page-locked.
    #[getter]
    fn pinned(&self) -> bool {
        !matches!(self.0.pool.pinned(), Pinned::No { .. })
    }

    /// Ends allocation and returns what was still allocated, as (address, nbytes). Buffers that live on stay valid.
    fn close(&self, py: Python<'_>) -> PyResult<Vec<(usize, usize)>> {
        entry(py, || Ok(self.0.pool.close().into_iter().map(|piece| (piece.addr, piece.bytes)).collect()))
    }

    fn __repr__(&self) -> String {
        let stats = self.0.pool.stats();
        format!("<kvortex.PinnedHostPool {} of {} bytes used>", stats.used, stats.capacity)
    }
}

/// Writable memory of a `PinnedHostPool`, by DLPack or the buffer protocol. It goes back to the pool on `free`, or when this
/// object and all arrays made from it have ended.
#[pyclass(frozen, extends = HostView, module = "kvortex")]
pub(crate) struct PinnedBuffer;

#[pymethods]
impl PinnedBuffer {
    /// Gives the memory back now. DoubleFreeError if it was given back; InvalidArgumentError while views of it exist.
    fn free(slf: &Bound<'_, Self>) -> PyResult<()> {
        entry(slf.py(), || {
            let view = slf.as_super().get();
            match view.place().give_back()? {
                true => Ok(()),
                false => Err(raise_mem(&MemError::DoubleFree { addr: view.address() })),
            }
        })
    }
}
