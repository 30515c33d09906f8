//! `GpuAsyncPool`: stream-ordered GPU memory for Python, given back by `free` or when its last view ends.

use std::sync::{Arc, Mutex, PoisonError};

use kvortex::DeviceChoice;
use kvortex_mem::MemError;
use kvortex_mem::device::{Event, RawStream};
use kvortex_mem::device_pool::{DevicePoolOptions, GpuAsyncPool};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};

use crate::dlpack::{Lent, Place, Wishes, device_capsule};
use crate::errors::{CudaUnavailableError, PoolExhaustedError, detached, entry, raise_mem};
use crate::gpu::device_choice;
use crate::number::whole;
use crate::pool::Held;
use crate::stream::stream_on;

struct Core {
    pool: GpuAsyncPool,
    ordinal: u32,
    held: Held,
}

/// A live piece; its drop gives it back in the order of the streams that it was used in.
pub(crate) struct DevicePiece {
    core: Arc<Core>,
    addr: usize,
    bytes: usize,
    /// The stream that it was allocated in and is given back in, and those of consumers.
    streams: Mutex<(RawStream, Vec<RawStream>)>,
}

impl DevicePiece {
    pub(crate) const fn addr(&self) -> usize {
        self.addr
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn ordinal(&self) -> u32 {
        self.core.ordinal
    }

    /// Lets `stream` use the memory from now on.
    fn enter(&self, stream: RawStream) -> Result<(), MemError> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if streams.0 == stream || streams.1.contains(&stream) {
            return Ok(());
        }
        self.order(streams.0, stream)?;
        streams.1.push(stream);
        Ok(())
    }

    /// Gives the memory back in the order of `stream` instead of the one that it was allocated in.
    fn leave_in(&self, stream: RawStream) -> Result<(), MemError> {
        self.enter(stream)?;
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let first = std::mem::replace(&mut streams.0, stream);
        streams.1.push(first);
        Ok(())
    }

    fn order(&self, first: RawStream, then: RawStream) -> Result<(), MemError> {
        let event = Event::new(self.core.pool.device())?;
        event.record(first)?;
        event.hold(then)
    }
}

impl Drop for DevicePiece {
    fn drop(&mut self) {
        let mut held = self.core.held.lock();
        held.remove(&self.addr);
        let (stream, others) = self.streams.get_mut().unwrap_or_else(PoisonError::into_inner).clone();
        let ordered =
            others.into_iter().filter(|&other| other != stream).try_for_each(|other| self.order(other, stream));
        if let Err(error) = ordered.and_then(|()| self.core.pool.free(self.addr, stream)) {
            // Kept, since somebody may still be using it.
            log::debug!("{:#x} not given back: {error}", self.addr);
        }
    }
}

/// Stream-ordered memory of a GPU, in pieces of any size, from a pool of its own: nobody waits for an allocation or its end.
///
/// `capacity_bytes` limits what is given out at once; `release_threshold_bytes` is what the pool keeps of the GPU's memory when
/// pieces are given back. A stream is a handle, an object with `cuda_stream`, or None for torch's current one, and must live
/// as long as the pieces that were used in it. CudaUnavailableError without such a GPU.
#[pyclass(name = "GpuAsyncPool", frozen, module = "kvortex")]
pub(crate) struct PyDevicePool(Arc<Core>);

#[pymethods]
impl PyDevicePool {
    #[new]
    #[pyo3(signature = (device="cuda", *, capacity_bytes=None, release_threshold_bytes=None),
           text_signature = "(device='cuda', *, capacity_bytes=None, release_threshold_bytes=0)")]
    fn new(
        py: Python<'_>,
        device: &str,
        capacity_bytes: Option<&Bound<'_, PyAny>>,
        release_threshold_bytes: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        entry(py, || {
            let capacity_bytes = capacity_bytes.map(|bytes| whole("capacity_bytes", bytes)).transpose()?;
            let keep_bytes = release_threshold_bytes.map_or(Ok(0), |bytes| whole("release_threshold_bytes", bytes))?;
            let choice = match device_choice(device)? {
                DeviceChoice::Auto(ordinal) => DeviceChoice::Cuda(ordinal),
                choice => choice,
            };
            let options = DevicePoolOptions { capacity_bytes, keep_bytes };
            let made = detached(py, || {
                let Some(device) = kvortex::open_device(choice)? else { return Ok(None) };
                Ok(Some((GpuAsyncPool::new(&device, options)?, device.info().ordinal)))
            })?;
            let (pool, ordinal) = made.ok_or_else(|| {
                CudaUnavailableError::new_err("a GpuAsyncPool needs a GPU: pass device=\"cuda\" or \"cuda:0\"")
            })?;
            Ok(Self(Arc::new(Core { pool, ordinal, held: Held::default() })))
        })
    }

    /// `nbytes` of memory with undefined content, for what the stream is given from now on. PoolExhaustedError when the pool
    /// or the GPU has no more.
    #[pyo3(signature = (nbytes, *, stream=None))]
    fn allocate(
        &self,
        py: Python<'_>,
        nbytes: &Bound<'_, PyAny>,
        stream: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<DeviceBuffer> {
        entry(py, || {
            let bytes = whole("nbytes", nbytes)?;
            let stream = stream_on(self.0.ordinal, stream, py)?;
            let (piece, place) = py.detach(|| self.take(bytes, stream)).map_err(|error| exhausted(&error))?;
            Ok(DeviceBuffer {
                piece: Arc::downgrade(&piece),
                place,
                address: piece.addr,
                nbytes: bytes,
                ordinal: self.0.ordinal,
            })
        })
    }

    /// Gives back the buffer at `address` once the stream has passed what it was given so far. ForeignPointerError or
    /// DoubleFreeError for any other address; InvalidArgumentError while views of it exist.
    fn free(&self, py: Python<'_>, address: &Bound<'_, PyAny>) -> PyResult<()> {
        entry(py, || {
            let addr = whole("address", address)?;
            self.0.held.give_back(addr, || self.0.pool.free(addr, RawStream(0)))
        })
    }

    /// capacity (None without a limit), used, peak and reserved in bytes, reserved being what the pool holds of the GPU's
    /// memory; live, allocations and failures as counts.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        entry(py, || {
            let stats = detached(py, || Ok(self.0.pool.stats()?))?;
            let dict = PyDict::new(py);
            dict.set_item("capacity", stats.capacity)?;
            dict.set_item("used", stats.used)?;
            dict.set_item("peak", stats.peak)?;
            dict.set_item("reserved", stats.reserved)?;
            dict.set_item("live", stats.live)?;
            dict.set_item("allocations", stats.allocations)?;
            dict.set_item("failures", stats.failures)?;
            Ok(dict)
        })
    }

    /// Returns to the GPU what is not given out, all but `keep_bytes`.
    #[pyo3(signature = (keep_bytes=None), text_signature = "($self, keep_bytes=0)")]
    fn trim(&self, py: Python<'_>, keep_bytes: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        entry(py, || {
            let keep = keep_bytes.map_or(Ok(0), |bytes| whole("keep_bytes", bytes))?;
            detached(py, || Ok(self.0.pool.trim(keep)?))
        })
    }

    /// Ends allocation and returns what was still allocated, as (address, nbytes). Buffers that live on stay valid.
    fn close(&self, py: Python<'_>) -> PyResult<Vec<(usize, usize)>> {
        entry(py, || Ok(self.0.pool.close().into_iter().map(|piece| (piece.addr, piece.bytes)).collect()))
    }

    /// The GPU that the memory is on, "cuda:0" say.
    #[getter]
    fn device(&self) -> String {
        format!("cuda:{}", self.0.ordinal)
    }

    fn __repr__(&self) -> String {
        format!("<kvortex.GpuAsyncPool on {}>", self.device())
    }
}

impl PyDevicePool {
    fn take(&self, bytes: usize, stream: RawStream) -> Result<(Arc<DevicePiece>, Arc<Place>), MemError> {
        let core = &self.0;
        let mut held = core.held.lock();
        let addr = core.pool.allocate(bytes, stream)?.addr;
        let streams = Mutex::new((stream, Vec::new()));
        let piece = Arc::new(DevicePiece { core: core.clone(), addr, bytes, streams });
        let place = Arc::new(Place::new(Lent::device(piece.clone())));
        held.insert(addr, Arc::downgrade(&place));
        Ok((piece, place))
    }
}

fn exhausted(error: &MemError) -> PyErr {
    match error {
        MemError::OutOfDeviceMemory { .. } => PoolExhaustedError::new_err(error.to_string()),
        _ => raise_mem(error),
    }
}

/// Memory of a `GpuAsyncPool`, by DLPack: one dimension of bytes. It goes back to the pool on `free`, or when this object and
/// all tensors made from it have ended, in the order of the streams that it was handed to.
#[pyclass(frozen, module = "kvortex")]
pub(crate) struct DeviceBuffer {
    piece: std::sync::Weak<DevicePiece>,
    place: Arc<Place>,
    /// Address of the first byte.
    #[pyo3(get)]
    address: usize,
    /// Number of bytes.
    #[pyo3(get)]
    nbytes: usize,
    ordinal: u32,
}

impl DeviceBuffer {
    fn piece(&self) -> PyResult<Arc<DevicePiece>> {
        self.piece.upgrade().ok_or_else(|| raise_mem(&MemError::DoubleFree { addr: self.address }))
    }
}

#[pymethods]
impl DeviceBuffer {
    /// A capsule of this memory, which `stream`, the consumer's, may use from now on; -1 leaves the order to the caller.
    #[expect(clippy::too_many_arguments, reason = "the signature is DLPack's")]
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        entry(py, || {
            let capsule = device_capsule(py, &self.place, &Wishes { max_version, dl_device, copy })?;
            let unordered = stream.and_then(|stream| stream.extract::<i64>().ok()) == Some(-1);
            if !unordered {
                let (piece, stream) = (self.piece()?, stream_on(self.ordinal, stream, py)?);
                py.detach(|| piece.enter(stream)).map_err(|error| raise_mem(&error))?;
            }
            Ok(capsule)
        })
    }

    /// Memory of a GPU: (2, its number).
    fn __dlpack_device__(&self) -> (i32, u32) {
        (2, self.ordinal)
    }

    /// Gives the memory back once `stream` has passed what it was given so far. DoubleFreeError if it was given back;
    /// InvalidArgumentError while views of it exist.
    #[pyo3(signature = (*, stream=None))]
    fn free(&self, py: Python<'_>, stream: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        entry(py, || {
            let (piece, stream) = (self.piece()?, stream_on(self.ordinal, stream, py)?);
            piece.leave_in(stream).map_err(|error| raise_mem(&error))?;
            drop(piece);
            match self.place.give_back()? {
                true => Ok(()),
                false => Err(raise_mem(&MemError::DoubleFree { addr: self.address })),
            }
        })
    }

    fn __len__(&self) -> usize {
        self.nbytes
    }

    fn __repr__(&self) -> String {
        format!("<kvortex.DeviceBuffer of {} bytes at {:#x} on cuda:{}>", self.nbytes, self.address, self.ordinal)
    }
}
