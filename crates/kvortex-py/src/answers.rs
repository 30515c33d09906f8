//! What calls return: masks, reports, tickets, leases and blocks.

use std::sync::{Arc, Mutex, PoisonError};

use kvortex::{BlockMask, LeasedBlocks, Report, Ticket};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt, PyIterator, PyList};

use crate::dlpack::{HostView, Lent, Place};
use crate::errors::{entry, invalid};

/// One bit per key of the call.
#[pyclass(name = "BlockMask", frozen, eq, module = "kvortex")]
#[derive(PartialEq)]
pub(crate) struct PyMask(pub(crate) BlockMask);

#[pymethods]
impl PyMask {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __getitem__(&self, index: isize) -> PyResult<bool> {
        let len = self.0.len();
        let place = if index < 0 { index.checked_add_unsigned(len) } else { Some(index) };
        let place = place.and_then(|place| usize::try_from(place).ok()).filter(|&place| place < len);
        place
            .map(|place| self.0.get(place))
            .ok_or_else(|| PyIndexError::new_err(format!("bit {index} of a mask of {len} bits")))
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        PyList::new(py, (0..self.0.len()).map(|i| self.0.get(i)))?.try_iter()
    }

    /// Number of ones.
    fn count(&self) -> usize {
        self.0.count()
    }

    /// Number of ones before the first zero.
    fn prefix(&self) -> usize {
        self.0.prefix()
    }

    /// Whether every bit is one; true for no bits.
    fn all(&self) -> bool {
        self.0.all()
    }

    /// Whether some bit is one.
    fn any(&self) -> bool {
        self.0.any()
    }

    /// The bits, bit `i` at `i % 8` of byte `i // 8`.
    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.as_bytes())
    }

    /// The bits as one number, bit `i` worth `2**i`.
    fn __int__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        py.get_type::<PyInt>().call_method1("from_bytes", (self.__bytes__(py), "little"))
    }

    fn __repr__(&self) -> String {
        format!("<kvortex.BlockMask {} of {}>", self.0.count(), self.0.len())
    }
}

/// What came of a save or load.
#[pyclass(name = "Report", frozen, get_all, module = "kvortex")]
pub(crate) struct PyReport {
    /// "save" or "load".
    kind: &'static str,
    /// Save: which blocks are held after the call. Load: which blocks were copied to the caller.
    mask: Py<PyMask>,
    /// Blocks copied.
    blocks: usize,
    /// Save: blocks that were there already.
    present: usize,
    /// Save: blocks for which there was no room.
    refused: usize,
    /// Load: blocks that were not there; their targets are as they were.
    missing: usize,
    /// Bytes copied.
    bytes: u64,
    /// From the call to the last byte, in microseconds.
    elapsed_us: f64,
}

impl PyReport {
    pub(crate) fn new(py: Python<'_>, report: Report) -> PyResult<Self> {
        let elapsed_us = report.elapsed.as_secs_f64() * 1e6;
        let Report { kind, mask, blocks, present, refused, missing, bytes, .. } = report;
        let mask = Py::new(py, PyMask(mask))?;
        Ok(Self { kind: kind.name(), mask, blocks, present, refused, missing, bytes, elapsed_us })
    }
}

#[pymethods]
impl PyReport {
    fn __repr__(&self) -> String {
        format!(
            "<kvortex.Report {}: {} blocks copied, {} present, {} refused, {} missing, {} bytes in {:.0} us>",
            self.kind, self.blocks, self.present, self.refused, self.missing, self.bytes, self.elapsed_us
        )
    }
}

/// The handle of a save or load that goes on by itself, whether the handle is kept or not.
#[pyclass(name = "Ticket", frozen, module = "kvortex")]
pub(crate) struct PyTicket(pub(crate) Ticket);

#[pymethods]
impl PyTicket {
    /// Whether it is over, well or not.
    #[getter]
    fn done(&self) -> bool {
        self.0.is_done()
    }

    /// Its number.
    #[getter]
    fn id(&self) -> u64 {
        self.0.id()
    }

    fn __repr__(&self) -> String {
        format!("<kvortex.Ticket {}{}>", self.0.id(), if self.0.is_done() { ", done" } else { "" })
    }
}

/// Blocks that are not evicted until `release`, the end of a `with`, or the end of this object.
#[pyclass(name = "Lease", frozen, module = "kvortex")]
pub(crate) struct PyLease {
    blocks: usize,
    held: Mutex<Option<Held>>,
}

/// Of an engine, or of a planner of ranks.
enum Held {
    Engine { _leased: LeasedBlocks },
    Ranks(kvortex::Lease),
}

impl PyLease {
    pub(crate) fn new(leased: LeasedBlocks) -> Self {
        Self { blocks: leased.len(), held: Mutex::new(Some(Held::Engine { _leased: leased })) }
    }

    pub(crate) fn of_ranks(lease: kvortex::Lease) -> Self {
        Self { blocks: lease.len(), held: Mutex::new(Some(Held::Ranks(lease))) }
    }

    /// The lease of a planner of ranks, which this object then has no more.
    pub(crate) fn take_ranks(&self) -> PyResult<kvortex::Lease> {
        match self.take() {
            Some(Held::Ranks(lease)) => Ok(lease),
            _ => {
                Err(invalid("the lease has ended or is another's: pass one that lease_prefix of this planner returned"))
            }
        }
    }

    fn take(&self) -> Option<Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[pymethods]
impl PyLease {
    /// Blocks that were leased, also after the release.
    fn __len__(&self) -> usize {
        self.blocks
    }

    /// Ends the lease. Doing it again changes nothing.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        entry(py, || {
            let held = self.take();
            py.detach(|| drop(held));
            Ok(())
        })
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _type: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.release(py)
    }

    fn __repr__(&self) -> String {
        format!("<kvortex.Lease of {} blocks>", self.blocks)
    }
}

/// A block where it lies in the cache, read-only, by DLPack or the buffer protocol. It is not evicted while this object, or an
/// array made from it, lives.
///
/// DLPack can only tell a consumer that memory is read-only. NumPy obeys; PyTorch does not, and writing into such a tensor
/// would change what the cache gives to others: pass `copy=True` to `from_dlpack` to get memory of your own.
#[pyclass(frozen, extends = HostView, module = "kvortex")]
pub(crate) struct Block;

/// The blocks that `mask` says are leased, None for the others.
pub(crate) fn blocks<'py>(py: Python<'py>, leased: LeasedBlocks, mask: &BlockMask) -> PyResult<Bound<'py, PyList>> {
    let leased = Arc::new(leased);
    let mut next = 0..leased.len();
    let found = (0..mask.len()).map(|i| if mask.get(i) { next.next() } else { None });
    let lent: Vec<_> = found.map(|place| place.and_then(|place| Lent::block(&leased, place))).collect();
    let blocks: PyResult<Vec<_>> = lent.into_iter().map(|lent| lent.map(|lent| block(py, lent)).transpose()).collect();
    PyList::new(py, blocks?)
}

fn block(py: Python<'_>, lent: Lent) -> PyResult<Py<Block>> {
    let view = HostView::of(Arc::new(Place::new(lent)))?;
    Py::new(py, PyClassInitializer::from(view).add_subclass(Block))
}
