//! Locks and atomics, so that shuttle can take their place under `cfg(shuttle)`.

pub(crate) use kvortex_mem::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
pub(crate) use kvortex_mem::sync::{Arc, Condvar, Mutex};
