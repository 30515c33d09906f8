//! Levels that keep blocks.
//!
//! # The contract of a lower tier
//!
//! A tier below the arena keeps blocks under their keys, for one [`Identity`], and may lose any of them at any time. It never
//! gives back bytes that were not put under the key that is asked for: not after a crash, not from a torn, swapped or changed
//! entry, not from another model's. What it cannot verify is a miss.
//!
//! 1. *Batched.* Every operation takes many blocks, the head of a prompt first. Of one batch, the tail is the first to go.
//! 2. *Never in the way.* [`put`](Tier::put) and [`get`](Tier::get) return at once, without I/O. A full queue drops what is
//!    offered and says so. No fault is ever an error of the caller's request: it is a miss, or a block that was dropped.
//! 3. *A deadline on every operation.* What has not begun by then never begins. What has begun may land later; its landing is
//!    not used twice and its slot not let go of before the system has let go of it.
//! 4. *Verified before visible.* A landing is landed only when the bytes in its slot are the whole block that the key names.
//!    It is dropped, once nothing writes the slot any more, in every other case.
//! 5. *Bounded.* Bytes kept, bytes queued and blocks being read are bounded by what the tier was made with.
//! 6. *Says it once.* A tier that begins to fail logs it once, goes on answering misses, tries again by itself, and logs once
//!    that it has recovered.
//!
//! `suite` holds the tests that every tier, and every wrapper of one, must pass.

#[cfg(not(shuttle))]
pub mod disk;
#[cfg(not(shuttle))]
pub mod guard;
pub mod host;
#[cfg(not(shuttle))]
pub mod late;
#[cfg(not(shuttle))]
pub mod rows;
#[cfg(all(any(test, feature = "suite"), not(shuttle)))]
pub mod suite;

use std::any::Any;
use std::time::{Duration, Instant};

use crate::key::{BlockKey, Keys};
use crate::mask::BlockMask;
use crate::namespace::Namespace;
use crate::sync::Arc;
use host::SlotId;

/// Whose blocks a tier keeps. Entries of another identity never match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The model and layout.
    pub namespace: Namespace,
    /// Which rank's part of each block.
    pub row: u32,
    /// Of how many ranks.
    pub world: u32,
}

/// A block that a tier may keep. The bytes of the slot stay as they are as long as `keep` lives.
pub struct Offer {
    /// The block.
    pub key: BlockKey,
    /// Where its bytes are.
    pub slot: SlotId,
    /// Dropped when the tier needs the slot no more.
    pub keep: Arc<dyn Any + Send + Sync>,
}

/// What a tier does with an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It will be written, if nothing goes wrong.
    Queued,
    /// The tier has it, or is writing it.
    Present,
    /// The tier's rule of admission leaves it out.
    Refused,
    /// There was no room in the queue, or the tier is failing.
    Dropped,
}

/// A block that is wanted back, and where.
pub struct Want {
    /// The block.
    pub key: BlockKey,
    /// The place.
    pub landing: Box<dyn Landing>,
}

/// A slot that is filled, and who is told. Dropped without a landing, it is a miss.
pub trait Landing: Send {
    /// The slot, which nobody else reads or writes as long as this lives.
    fn slot(&self) -> SlotId;
    /// The slot holds the block, verified.
    fn land(self: Box<Self>);
}

/// A level below the arena. The module's text is its contract.
pub trait Tier: Send + Sync {
    /// `disk`, say.
    fn name(&self) -> &'static str;

    /// Which of `keys` the tier seems to have. A hint: only a landing proves it.
    fn contains(&self, keys: Keys<'_>, deadline: Instant) -> BlockMask;

    /// Offers blocks and tells what becomes of each.
    fn put(&self, offers: Vec<Offer>) -> Vec<Put>;

    /// Reads blocks into the slots of their landings.
    fn get(&self, wants: Vec<Want>, deadline: Instant);

    /// Forgets blocks and tells how many it had. After a crash one may be back.
    fn remove(&self, keys: Keys<'_>, deadline: Instant) -> usize;

    /// Forgets every block, for good: none is back after a crash. False if that cannot be promised; the tier then stays off.
    fn clear(&self) -> bool;

    /// Waits until what was put is kept or given up. True if that was in time.
    fn flush(&self, patience: Duration) -> bool;

    /// Takes nothing more and waits for what is under way. True if that has ended in time.
    fn stop(&self, patience: Duration) -> bool;

    /// Numbers at this moment.
    fn stats(&self) -> TierStats;
}

/// Numbers of a tier: sizes now, counters since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Blocks kept for this identity.
    pub blocks: usize,
    /// Blocks for which there is room.
    pub capacity_blocks: usize,
    /// Bytes that the tier takes, room for more blocks included.
    pub bytes: u64,
    /// Bytes that it may take.
    pub max_bytes: u64,
    /// Bytes that wait to be written.
    pub queued_bytes: usize,
    /// Blocks that landed.
    pub hits: u64,
    /// Blocks asked for that did not land, whatever the reason.
    pub misses: u64,
    /// Blocks written.
    pub written: u64,
    /// Bytes written, headers included.
    pub bytes_written: u64,
    /// Bytes read and verified.
    pub bytes_read: u64,
    /// Blocks that admission left out.
    pub refused: u64,
    /// Blocks dropped because the queue was full or the tier was failing.
    pub dropped: u64,
    /// Blocks forgotten to make room.
    pub evictions: u64,
    /// Entries whose bytes were not what they should be.
    pub corrupt: u64,
    /// Reads and writes that the system failed.
    pub errors: u64,
    /// Blocks that had not come by their deadline.
    pub late: u64,
    /// Blocks found when the tier was opened.
    pub recovered: usize,
    /// Whether it still looks for what it kept before.
    pub scanning: bool,
    /// Whether it is failing at this moment.
    pub failing: bool,
}
