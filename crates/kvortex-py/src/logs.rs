//! Records of the core, handed to Python's `logging`. Native threads only put them into a bounded queue and never take the
//! GIL; calls from Python carry them out on their way back.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};

use log::{Level, LevelFilter, Log, Metadata};
use pyo3::prelude::*;
use pyo3::types::PyModule;

/// Records kept until the next call from Python; more are counted and dropped.
const CAPACITY: usize = 1024;

struct Record {
    level: Level,
    target: String,
    text: String,
}

struct Bridge {
    queue: Mutex<VecDeque<Record>>,
    waiting: AtomicBool,
    lost: AtomicU64,
}

static BRIDGE: Bridge =
    Bridge { queue: Mutex::new(VecDeque::new()), waiting: AtomicBool::new(false), lost: AtomicU64::new(0) };

impl Bridge {
    /// The queue, unless somebody holds it for long: in a forked child that may be a thread that exists no more.
    fn lock(&self) -> Option<MutexGuard<'_, VecDeque<Record>>> {
        for _ in 0..100 {
            match self.queue.try_lock() {
                Ok(queue) => return Some(queue),
                Err(TryLockError::Poisoned(poison)) => return Some(poison.into_inner()),
                Err(TryLockError::WouldBlock) => std::thread::yield_now(),
            }
        }
        None
    }
}

impl Log for Bridge {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        let kept =
            Record { level: record.level(), target: record.target().to_owned(), text: record.args().to_string() };
        match self.lock() {
            Some(mut queue) if queue.len() < CAPACITY => queue.push_back(kept),
            _ => _ = self.lost.fetch_add(1, Ordering::Relaxed),
        }
        self.waiting.store(true, Ordering::Release);
    }

    fn flush(&self) {}
}

/// Makes this bridge the logger of the core. Says nothing until [`follow_level`] was called.
pub(crate) fn install() {
    // Another import of this library found it installed already: the same bridge.
    let _ = log::set_logger(&BRIDGE);
}

/// Takes over the level of Python's logger `kvortex`, so that records nobody wants are never made.
pub(crate) fn follow_level(py: Python<'_>) -> PyResult<()> {
    let level: u32 = logger(py, "kvortex")?.call_method0("getEffectiveLevel")?.extract()?;
    log::set_max_level(match level {
        0..=9 => LevelFilter::Trace,
        10..=19 => LevelFilter::Debug,
        20..=29 => LevelFilter::Info,
        30..=39 => LevelFilter::Warn,
        40..=50 => LevelFilter::Error,
        _ => LevelFilter::Off,
    });
    Ok(())
}

/// Hands waiting records to Python's `logging`; costs one load when there are none.
pub(crate) fn drain(py: Python<'_>) {
    if BRIDGE.waiting.load(Ordering::Relaxed) && BRIDGE.waiting.swap(false, Ordering::Acquire) {
        let records = BRIDGE.lock().map(|mut queue| std::mem::take(&mut *queue)).unwrap_or_default();
        for record in records {
            emit(py, &record.target.replace('_', ".").replace("::", "."), severity(record.level), &record.text);
        }
        let lost = BRIDGE.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            emit(py, "kvortex", severity(Level::Warn), &format!("{lost} log records were dropped: too many at once"));
        }
        let _ = follow_level(py);
    }
}

/// A failing handler of the user's must not fail a copy, so it is reported the way Python reports such things.
fn emit(py: Python<'_>, target: &str, severity: u8, text: &str) {
    let sent = logger(py, target).and_then(|logger| logger.call_method1("log", (severity, "%s", text)));
    if let Err(error) = sent {
        error.write_unraisable(py, None);
    }
}

fn logger<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    PyModule::import(py, "logging")?.call_method1("getLogger", (name,))
}

const fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 40,
        Level::Warn => 30,
        Level::Info => 20,
        Level::Debug => 10,
        Level::Trace => 5,
    }
}
