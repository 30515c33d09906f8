//! Moving bytes between engine pages and arena slots.

mod by_place;
mod crew;
pub mod gpu;
mod host;
pub(crate) mod job;
mod scoreboard;
mod stream;
#[cfg(any(test, feature = "suite"))]
pub mod suite;
mod transfer;

pub use by_place::ByPlace;
pub use gpu::Method;
pub use host::HostCopy;
pub use transfer::{Direction, Step, Transfer, check_targets};

use std::time::Duration;

use crate::device::RawStream;
use crate::error::MemError;
use crate::span::{Pages, Place, reached_by_cpu};

/// Called once with what came of a submitted transfer.
pub type Done = Box<dyn FnOnce(Result<(), MemError>) + Send>;

/// Executes transfers. It never decides what to move.
///
/// The contract, which the suite beside this trait (feature `suite`) proves for every implementation:
///
/// 1. After success every byte of every step is in its place; after failure the targets hold undefined bytes and the error
///    says so. No path leads from a failed copy to success.
/// 2. A transfer, with all memory it keeps alive, is dropped *before* `run` returns and before `done` is called: who sees
///    the end knows that nothing of it is referenced any more.
/// 3. Engines may be used from any thread. Transfers given to one engine may run at the same time and in any order; keeping
///    conflicting ones apart is the caller's duty.
/// 4. Dropping an engine waits for what it accepted, except on a thread of its own.
/// 5. In a forked child every call fails at once with [`MemError::Forked`], and dropping the engine returns.
pub trait CopyEngine: Send + Sync {
    /// Executes a transfer; returns when every byte is in place.
    fn run(&self, transfer: Transfer) -> Result<(), MemError>;

    /// Accepts a transfer and returns at once.
    ///
    /// `Ok` means that `done` will be called exactly once, on any thread, also if the copy fails. `Err` means that the
    /// transfer was not accepted: it has been dropped, and `done` dropped uncalled. `done` must not block for long, and a
    /// panic in it is logged and otherwise ignored.
    fn submit(&self, transfer: Transfer, done: Done) -> Result<(), MemError>;

    /// Fails with [`MemError::WrongPlace`] for pages that `run` and `submit` refuse because of where they are.
    fn reaches(&self, place: Place) -> Result<(), MemError> {
        reached_by_cpu(place)
    }

    /// Refuses new work with [`MemError::Stopped`] from now on and waits up to `deadline` for what was accepted. Returns true
    /// if all of it has ended, its `done` calls included. What has not goes on; calling again waits again. Called from
    /// within a `done` it waits in vain for that one.
    fn stop(&self, deadline: Duration) -> bool;

    /// Puts every submitted copy that reads or writes `pages`, which are about to be written, before what `stream` is given from
    /// now on. The host does not wait for copies of a device's memory; for those of host memory it does.
    fn fence(&self, stream: RawStream, pages: &Pages) -> Result<(), MemError>;

    /// A short name for logs and statistics.
    fn name(&self) -> &'static str;
}
