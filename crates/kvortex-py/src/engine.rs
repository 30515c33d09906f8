//! The engine's face: convert, detach from the GIL, call, map the error.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvortex::{
    Admission, DiskConfig, Engine, EngineConfig, Error, GpuConfig, LowerStats, Method, Namespace, Quantiles, Stats,
    Ticket, Value,
};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCFunction, PyDict, PyType};

use crate::answers::{PyLease, PyMask, PyReport, PyTicket, blocks};
use crate::errors::{detached, entry, invalid, raise};
use crate::gpu::device_choice;
use crate::identity::namespace;
use crate::keys::PackedKeys;
use crate::logs;
use crate::number::whole;
use crate::parts::PyParts;
use crate::stream::{no_stream, stream_of};
use crate::tensors::{all_of, sequence, sources, targets};

/// How long copies in flight may take at the end of the process.
pub(crate) const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a wait goes without looking for Ctrl-C.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

/// Engines to shut down at exit. Locked only by threads that hold the GIL, so no other thread holds it when a process forks.
static ENGINES: Mutex<Vec<Weak<Engine>>> = Mutex::new(Vec::new());

/// Keeps KV blocks of one layout in host memory. Made by `KVortexEngine.create`; shared by any number of threads.
#[pyclass(name = "KVortexEngine", frozen, weakref, module = "kvortex")]
pub(crate) struct PyEngine {
    engine: Option<Arc<Engine>>,
    /// The user's text that goes into every namespace.
    text: String,
}

#[pymethods]
impl PyEngine {
    /// Maps the memory. `config` is a KVortexConfig, a mapping, or None for the environment; keywords win over it.
    ///
    /// ConfigError for settings that cannot work, CapacityError when the memory is not to be had.
    #[classmethod]
    #[pyo3(signature = (config=None, **overrides))]
    fn create(
        _cls: &Bound<'_, PyType>,
        py: Python<'_>,
        config: Option<&Bound<'_, PyAny>>,
        overrides: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        entry(py, || {
            logs::follow_level(py)?;
            let known = py.import("kvortex.config")?.getattr("KVortexConfig")?;
            let config = known.call_method("of", (config,), overrides)?;
            let text: String = config.getattr("namespace")?.extract()?;
            let config = settings(&config, &text)?;
            let engine = Arc::new(detached(py, || Engine::create(config))?);
            shut_down_at_exit(py, &engine)?;
            Ok(Self { engine: Some(engine), text })
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
        self.shutdown(py, None).map(|_| ())
    }

    /// Fixes the bytes of one block and the namespace, which a first save would fix otherwise. The same again changes nothing;
    /// LayoutError for anything else.
    #[pyo3(signature = (block_size_bytes, namespace=None), text_signature = "($self, block_size_bytes, namespace=b'')")]
    fn bind(
        &self,
        py: Python<'_>,
        block_size_bytes: &Bound<'_, PyAny>,
        namespace: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        entry(py, || {
            let block_bytes = whole("block_size_bytes", block_size_bytes)?;
            let given = namespace.map_or(Ok(Namespace::default()), self::namespace)?;
            let mixed = mixed(given, &self.text);
            self.call(py, |engine| engine.bind(block_bytes, mixed))
        })
    }

    /// Stores the blocks that are not there yet, block `i` of `data` under key `i`.
    ///
    /// `keys` is packed bytes of n * 32, or a list of 32-byte bytes. `data` is one tensor with a leading dimension of n, a list
    /// of n tensors, Segments, or PagedBlocks; any dtype, contiguous or strided. `stream` is the one that wrote it on a GPU,
    /// torch's current one by default.
    #[pyo3(signature = (keys, data, *, stream=None))]
    fn save_blocks(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
        stream: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyReport> {
        entry(py, || {
            let keys = PackedKeys::from_python(keys)?;
            let pages = sources(data, keys.len(), stream)?;
            PyReport::new(py, self.call(py, |engine| engine.save(keys.keys(), pages))?)
        })
    }

    /// With `out`, copies the blocks that are there into it and leaves the rest of it as it is. Without, returns a read-only
    /// Block for each key that is there, in place and without a copy, and None for the others; the blocks of one call are
    /// leased together until the last of them ends.
    #[pyo3(signature = (keys, out=None, *, stream=None))]
    fn load_blocks<'py>(
        &self,
        py: Python<'py>,
        keys: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        entry(py, || {
            let keys = PackedKeys::from_python(keys)?;
            let Some(out) = out else {
                no_stream(stream)?;
                let (leased, mask) = self.call(py, |engine| engine.lease_each(keys.keys()))?;
                return Ok(blocks(py, leased, &mask)?.into_any());
            };
            let pages = targets(out, keys.len(), stream)?;
            let report = self.call(py, |engine| engine.load(keys.keys(), pages))?;
            PyReport::new(py, report)?.into_bound_py_any(py)
        })
    }

    /// Which blocks are there. Takes no lease and changes no order.
    fn check_blocks(&self, py: Python<'_>, keys: &Bound<'_, PyAny>) -> PyResult<PyMask> {
        entry(py, || {
            let keys = PackedKeys::from_python(keys)?;
            self.call(py, |engine| engine.check(keys.keys())).map(PyMask)
        })
    }

    /// Length of the longest prefix that is there, in blocks.
    fn match_prefix(&self, py: Python<'_>, keys: &Bound<'_, PyAny>) -> PyResult<usize> {
        entry(py, || {
            let keys = PackedKeys::from_python(keys)?;
            self.call(py, |engine| engine.match_prefix(keys.keys()))
        })
    }

    /// Leases the longest prefix that is there.
    fn lease_prefix(&self, py: Python<'_>, keys: &Bound<'_, PyAny>) -> PyResult<PyLease> {
        entry(py, || {
            let keys = PackedKeys::from_python(keys)?;
            self.call(py, |engine| engine.lease_prefix(keys.keys())).map(PyLease::new)
        })
    }

    /// As `save_blocks`, but returns at once. `data` must not change until the ticket is done, but on a GPU in the order of
    /// `stream` behind a `fence`.
    ///
    /// `after` are tickets of loads that the blocks were computed from: the blocks become visible only once all of those have
    /// succeeded, and never if one has failed.
    #[expect(clippy::too_many_arguments, reason = "each says one thing of the save, by name")]
    #[pyo3(signature = (keys, data, *, stream=None, after=None), text_signature = "($self, keys, data, *, stream=None, after=())")]
    fn save_blocks_async(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
        stream: Option<&Bound<'_, PyAny>>,
        after: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyTicket> {
        entry(py, || {
            let keys = PackedKeys::from_python(keys)?;
            let pages = sources(data, keys.len(), stream)?;
            let after = after.map_or(Ok(Vec::new()), tickets)?;
            self.call(py, |engine| engine.save_after(keys.keys(), pages, &after)).map(PyTicket)
        })
    }

    /// As `load_blocks` with `out`, but returns at once. `out` is the engine's until the ticket is done; on a GPU what `stream`
    /// is given from now on comes after the load.
    ///
    /// With `parts`, a stream waits for each part by `Parts.hold` and for nothing else. With `background`, no stream waits:
    /// such loads go a little at a time, and others go first.
    #[expect(clippy::too_many_arguments, reason = "each says one thing of the load, by name")]
    #[pyo3(signature = (keys, out, *, stream=None, parts=None, background=false))]
    fn load_blocks_async(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        stream: Option<&Bound<'_, PyAny>>,
        parts: Option<&Bound<'_, PyParts>>,
        background: bool,
    ) -> PyResult<PyTicket> {
        entry(py, || {
            let keys = PackedKeys::from_python(keys)?;
            let pages = targets(out, keys.len(), stream)?;
            let pages = match parts {
                Some(parts) => parts.get().of(pages)?,
                None => pages,
            };
            let pages = if background { pages.in_background() } else { pages };
            self.call(py, |engine| engine.load_async(keys.keys(), pages)).map(PyTicket)
        })
    }

    /// Makes what `stream`, torch's current one by default, is given from now on wait for every unfinished copy that reads or
    /// writes `blocks`, which are about to be written. The host waits for copies of host memory only.
    #[pyo3(signature = (blocks, *, stream=None))]
    fn fence(&self, py: Python<'_>, blocks: &Bound<'_, PyAny>, stream: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        entry(py, || {
            let pages = all_of(blocks)?;
            let stream = stream_of(pages.place(), stream, py)?;
            self.call(py, |engine| engine.fence(stream, &pages))
        })
    }

    /// Waits until a ticket is done, for ever without a timeout; Ctrl-C ends the wait, not the copy.
    ///
    /// KVortexTimeoutError when it is not done in time: it goes on, and can be waited for again.
    #[pyo3(signature = (ticket, timeout_ms=None))]
    fn wait(
        &self,
        py: Python<'_>,
        ticket: &Bound<'_, PyTicket>,
        timeout_ms: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyReport> {
        entry(py, || {
            let ticket = &ticket.get().0;
            let timeout = timeout_ms.map(|timeout| whole("timeout_ms", timeout)).transpose()?;
            let timeout = timeout.map_or(Duration::MAX, |timeout| Duration::from_millis(timeout as u64));
            let start = Instant::now();
            loop {
                let left = timeout.saturating_sub(start.elapsed());
                let slice = left.min(SIGNAL_INTERVAL);
                match py.detach(|| self.engine().wait(ticket, Some(slice))) {
                    Err(Error::Timeout { .. }) if left > slice => py.check_signals()?,
                    Err(Error::Timeout { ticket, .. }) => {
                        return Err(raise(Error::Timeout { ticket, waited_ms: start.elapsed().as_millis() }));
                    }
                    other => return PyReport::new(py, other.map_err(raise)?),
                }
            }
        })
    }

    /// Counters since the engine was created and sizes now; bytes, microseconds and shares as the names say. Works after
    /// `shutdown` too.
    fn get_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        entry(py, || stats(py, &py.detach(|| self.engine().stats())))
    }

    /// Forgets every block and returns how many there were. Leased ones vanish when they are released.
    fn reset(&self, py: Python<'_>) -> PyResult<usize> {
        entry(py, || self.call(py, Engine::reset))
    }

    /// Waits until the disk tier has kept, or given up, what was saved so far. Returns whether that was in time; true without one.
    #[pyo3(signature = (timeout_ms=None), text_signature = "($self, timeout_ms=5000)")]
    fn flush(&self, py: Python<'_>, timeout_ms: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        entry(py, || {
            let timeout = timeout_of(timeout_ms)?;
            self.call(py, |engine| engine.flush(timeout))
        })
    }

    /// Refuses new work, waits for copies in flight and lets the memory go once nothing uses it. Returns whether all copies
    /// ended in time. Can be called again; also runs at exit.
    #[pyo3(signature = (timeout_ms=None), text_signature = "($self, timeout_ms=5000)")]
    fn shutdown(&self, py: Python<'_>, timeout_ms: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        entry(py, || {
            let timeout = timeout_of(timeout_ms)?;
            Ok(py.detach(|| self.engine().shutdown(timeout)))
        })
    }

    /// Whether the engine was shut down.
    #[getter]
    fn closed(&self) -> bool {
        self.engine().is_closed()
    }

    /// The GPU whose memory can be passed beside that of the host, "cuda:0" say; "none" without one.
    #[getter]
    fn device(&self) -> String {
        let ordinal = self.engine().device().map(|device| device.info().ordinal);
        ordinal.map_or_else(|| "none".to_owned(), |ordinal| format!("cuda:{ordinal}"))
    }

    /// Bytes of one block; None until the first save or `bind`.
    #[getter]
    fn block_size_bytes(&self) -> Option<usize> {
        self.engine().block_bytes()
    }

    /// Blocks that fit; None until the first save or `bind`.
    #[getter]
    fn capacity_blocks(&self) -> Option<usize> {
        self.engine().capacity_blocks()
    }

    fn __repr__(&self) -> String {
        let engine = self.engine();
        match (engine.is_closed(), engine.block_bytes(), engine.capacity_blocks()) {
            (true, ..) => "<kvortex.KVortexEngine, shut down>".to_owned(),
            (_, Some(bytes), Some(blocks)) => format!("<kvortex.KVortexEngine of {blocks} blocks of {bytes} bytes>"),
            _ => "<kvortex.KVortexEngine, not bound yet>".to_owned(),
        }
    }
}

impl PyEngine {
    fn engine(&self) -> &Arc<Engine> {
        self.engine.as_ref().expect("taken only by drop")
    }

    fn call<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&Engine) -> Result<T, Error> + Send) -> PyResult<T> {
        let engine = self.engine();
        detached(py, || work(engine))
    }
}

impl Drop for PyEngine {
    /// Ending an engine may wait for threads and unmaps its memory, so other Python threads go on meanwhile.
    fn drop(&mut self) {
        let engine = self.engine.take();
        Python::attach(|py| py.detach(|| drop(engine)));
    }
}

pub(crate) fn settings(config: &Bound<'_, PyAny>, text: &str) -> PyResult<EngineConfig> {
    Ok(EngineConfig {
        pool_bytes: config.getattr("cpu_pool_size_bytes")?.extract()?,
        block_bytes: config.getattr("block_size_bytes")?.extract()?,
        threads: config.getattr("num_transfer_streams")?.extract()?,
        watermark: config.getattr("eviction_watermark")?.extract()?,
        ratio: config.getattr("eviction_ratio")?.extract()?,
        huge_pages: config.getattr("huge_pages")?.extract()?,
        numa_node: config.getattr("numa_node")?.extract()?,
        namespace: mixed(Namespace::default(), text),
        gpu: GpuConfig {
            device: device_choice(&config.getattr("device")?.extract::<String>()?)?,
            streams: config.getattr("gpu_streams")?.extract()?,
            method: method(&config.getattr("copy_method")?.extract::<String>()?),
            staging_bytes: config.getattr("staging_bytes")?.extract()?,
        },
        disk: disk(config)?,
        disk_read_deadline: disk_deadline(config)?,
    })
}

/// The disk tier, if a folder is named.
pub(crate) fn disk(config: &Bound<'_, PyAny>) -> PyResult<Option<DiskConfig>> {
    let paths: Vec<String> = config.getattr("disk_paths")?.extract()?;
    if paths.is_empty() {
        return Ok(None);
    }
    let mut disk = DiskConfig::new(paths, config.getattr("disk_size_bytes")?.extract()?);
    disk.queue_bytes = config.getattr("disk_queue_bytes")?.extract()?;
    if config.getattr("disk_admission")?.extract::<String>()? == "second_touch" {
        disk.admission = Admission::SecondTouch;
    }
    Ok(Some(disk))
}

/// How long a lookup may wait for it.
pub(crate) fn disk_deadline(config: &Bound<'_, PyAny>) -> PyResult<Duration> {
    Ok(Duration::from_millis(config.getattr("disk_read_deadline_ms")?.extract()?))
}

/// The method of this name; `None` for "auto".
fn method(text: &str) -> Option<Method> {
    Method::ALL.into_iter().find(|method| method.name() == text)
}

/// A timeout in milliseconds, or what is usual.
pub(crate) fn timeout_of(timeout_ms: Option<&Bound<'_, PyAny>>) -> PyResult<Duration> {
    let timeout = timeout_ms.map(|timeout| whole("timeout_ms", timeout)).transpose()?;
    Ok(timeout.map_or(EXIT_TIMEOUT, |timeout| Duration::from_millis(timeout as u64)))
}

/// The tickets of a list or tuple.
fn tickets(after: &Bound<'_, PyAny>) -> PyResult<Vec<Ticket>> {
    let items = sequence(after).ok_or_else(|| invalid("after is no list: give the tickets of loads"))?;
    let ticket = |item: &Bound<'_, PyAny>| item.cast::<PyTicket>().ok().map(|ticket| ticket.get().0.clone());
    let found: Option<Vec<Ticket>> = items.iter().map(ticket).collect();
    found.ok_or_else(|| invalid("after holds something that is no Ticket: give the tickets of loads"))
}

/// The namespace of the caller's digest and the configuration's text.
fn mixed(given: Namespace, text: &str) -> Namespace {
    if text.is_empty() {
        return given;
    }
    let digest = Value::Bytes(given.digest().to_vec());
    Namespace::builder().field("digest", digest).field("text", Value::Text(text.to_owned())).finish()
}

/// Has copies in flight end before the interpreter goes, without keeping the engine alive.
fn shut_down_at_exit(py: Python<'_>, engine: &Arc<Engine>) -> PyResult<()> {
    static REGISTERED: PyOnceLock<()> = PyOnceLock::new();
    REGISTERED.get_or_try_init(py, || {
        let stop = PyCFunction::new_closure(py, None, None, |args, _| shut_down_all(args.py()))?;
        py.import("atexit")?.call_method1("register", (stop,)).map(|_| ())
    })?;
    let mut engines = ENGINES.lock().unwrap_or_else(PoisonError::into_inner);
    engines.retain(|engine| engine.strong_count() > 0);
    engines.push(Arc::downgrade(engine));
    Ok(())
}

fn shut_down_all(py: Python<'_>) -> PyResult<()> {
    let engines = std::mem::take(&mut *ENGINES.lock().unwrap_or_else(PoisonError::into_inner));
    entry(py, || {
        py.detach(|| engines.iter().filter_map(Weak::upgrade).for_each(|engine| _ = engine.shutdown(EXIT_TIMEOUT)));
        Ok(())
    })
}

fn stats<'py>(py: Python<'py>, stats: &Stats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("blocks", stats.blocks)?;
    dict.set_item("capacity_blocks", stats.capacity_blocks)?;
    dict.set_item("block_size_bytes", stats.block_bytes)?;
    dict.set_item("bytes_used", stats.bytes_used)?;
    dict.set_item("cpu_pool_size_bytes", stats.pool_bytes)?;
    dict.set_item("hits", stats.hits)?;
    dict.set_item("misses", stats.misses)?;
    dict.set_item("cache_hit_rate", stats.hit_rate())?;
    dict.set_item("saved_blocks", stats.save.blocks)?;
    dict.set_item("loaded_blocks", stats.load.blocks)?;
    dict.set_item("duplicate_blocks", stats.duplicate_blocks)?;
    dict.set_item("evictions", stats.evictions)?;
    dict.set_item("refused", stats.refused)?;
    dict.set_item("failed", stats.failed)?;
    dict.set_item("in_flight", stats.in_flight)?;
    dict.set_item("leased_blocks", stats.leased_blocks)?;
    dict.set_item("save_latency_us", quantiles(py, &stats.save.latency)?)?;
    dict.set_item("load_latency_us", quantiles(py, &stats.load.latency)?)?;
    dict.set_item("save_bandwidth_bytes_per_s", stats.save.bandwidth)?;
    dict.set_item("load_bandwidth_bytes_per_s", stats.load.bandwidth)?;
    dict.set_item("bytes_saved", stats.save.bytes)?;
    dict.set_item("bytes_loaded", stats.load.bytes)?;
    dict.set_item("pool_fragmentation", stats.pool_fragmentation)?;
    dict.set_item("index_bytes", stats.index_bytes)?;
    dict.set_item("huge_page_bytes", stats.huge_page_bytes)?;
    dict.set_item("pinned", stats.pinned)?;
    dict.set_item("num_transfer_streams", stats.threads)?;
    dict.set_item("eviction_watermark", stats.watermark)?;
    dict.set_item("eviction_ratio", stats.ratio)?;
    dict.set_item("disk", stats.disk.map(|disk| disk_dict(py, &disk)).transpose()?)?;
    Ok(dict)
}

/// Numbers of the disk tier, and of what goes up and down.
pub(crate) fn disk_dict<'py>(py: Python<'py>, lower: &LowerStats) -> PyResult<Bound<'py, PyDict>> {
    let (dict, stats) = (PyDict::new(py), &lower.tier);
    dict.set_item("blocks", stats.blocks)?;
    dict.set_item("capacity_blocks", stats.capacity_blocks)?;
    dict.set_item("bytes", stats.bytes)?;
    dict.set_item("max_bytes", stats.max_bytes)?;
    dict.set_item("queued_bytes", stats.queued_bytes)?;
    dict.set_item("hits", stats.hits)?;
    dict.set_item("misses", stats.misses)?;
    dict.set_item("written_blocks", stats.written)?;
    dict.set_item("bytes_written", stats.bytes_written)?;
    dict.set_item("bytes_read", stats.bytes_read)?;
    dict.set_item("refused", stats.refused)?;
    dict.set_item("dropped", stats.dropped)?;
    dict.set_item("evictions", stats.evictions)?;
    dict.set_item("corrupt", stats.corrupt)?;
    dict.set_item("errors", stats.errors)?;
    dict.set_item("late", stats.late)?;
    dict.set_item("recovered_blocks", stats.recovered)?;
    dict.set_item("scanning", stats.scanning)?;
    dict.set_item("failing", stats.failing)?;
    dict.set_item("promoted_blocks", lower.promoted_blocks)?;
    dict.set_item("promoted_bytes", lower.promoted_bytes)?;
    dict.set_item("lost_blocks", lower.lost_blocks)?;
    dict.set_item("unoffered_blocks", lower.unoffered_blocks)?;
    dict.set_item("promotion_bytes_per_second", lower.bytes_per_second)?;
    Ok(dict)
}

fn quantiles<'py>(py: Python<'py>, latency: &Quantiles) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("p50", latency.p50)?;
    dict.set_item("p90", latency.p90)?;
    dict.set_item("p99", latency.p99)?;
    dict.set_item("max", latency.max)?;
    dict.set_item("count", latency.count)?;
    Ok(dict)
}
