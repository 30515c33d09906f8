//! Bytes between the slots of an arena and a file.
//!
//! [`SlabFile`] is one file in a folder that nobody else can enter. [`FileIo`] reads and writes it, straight into and out of
//! slots: by a ring of the kernel ([`Uring`]) where that works on this very folder, by threads ([`Psync`]) where it does not.

mod digest;
#[cfg(any(test, feature = "suite"))]
mod faults;
mod op;
mod psync;
mod queue;
mod scratch;
mod slab;
mod sys;
#[cfg(test)]
mod tests;
mod uring;

use std::time::Duration;

pub use digest::{Digest, digest, digest_slot};
#[cfg(any(test, feature = "suite"))]
pub use faults::{Call, Effect, Fault, FaultPlan, Written};
pub use op::{Access, Done, Ended, Memory, Op};
pub use psync::Psync;
pub use scratch::Scratch;
pub use slab::{SlabFile, SlabOptions};
pub use uring::Uring;

use crate::arena::Arena;
use crate::sync::Arc;

/// Offsets, lengths and addresses of direct I/O are multiples of this.
pub const ALIGNMENT: usize = 4096;

/// Reads and writes one [`SlabFile`], many operations at a time.
pub trait FileIo: Send + Sync {
    /// Takes the operations and returns at once. Reads begin before writes; of one kind, they begin in order.
    ///
    /// `done` of each is called once, from any thread, when the system no longer uses its memory. An operation that has not
    /// begun by its deadline ends as timed out, without a byte moved. Nothing that has begun can be taken back.
    fn submit(&self, ops: Vec<Op>);

    /// Ends reads that have not begun by their deadline, even if nothing that has begun ever ends.
    fn expire(&self);

    /// Ends what has not begun as cancelled, takes nothing more, and waits for the rest. True if all has ended in time.
    fn stop(&self, patience: Duration) -> bool;

    /// `io_uring` or `psync`.
    fn name(&self) -> &'static str;
}

/// How many operations may be under way at once, and which engine carries them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoOptions {
    /// Operations under way at once.
    pub depth: usize,
    /// False leaves the ring out.
    pub ring: bool,
}

/// The fastest engine that works for `file`; its operations name slots of `arena`.
///
/// # Errors
/// When not even a thread can be started.
pub fn serve(
    file: &Arc<SlabFile>,
    arena: &Arc<Arena>,
    options: IoOptions,
) -> Result<Box<dyn FileIo>, crate::error::MemError> {
    if options.ring && file.ring_works() {
        match Uring::start(file, arena, options.depth) {
            Ok(ring) => return Ok(Box::new(ring)),
            Err(error) => log::info!("{}: no io_uring, threads read and write it: {error}", file.path().display()),
        }
    }
    Ok(Box::new(Psync::start(file, arena, options.depth)?))
}
