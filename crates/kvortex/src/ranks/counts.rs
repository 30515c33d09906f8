//! What a planner has done so far, in numbers that cost nothing to read.

use crate::sync::{AtomicU64, Ordering};
use crate::tier::host::SlotPool;

/// Numbers of a planner: what there is room for now, and what was counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks that fit.
    pub capacity: u64,
    /// Blocks that have a slot.
    pub used: u64,
    /// Blocks that became visible by a store.
    pub stored: u64,
    /// Plans to store of which nothing became visible.
    pub failed_stores: u64,
    /// Blocks that found no room, or that rest on a load that failed.
    pub refused: u64,
    /// Blocks that made room.
    pub evicted: u64,
    /// Blocks whose life was over.
    pub expired: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    stored: AtomicU64,
    failed_stores: AtomicU64,
    refused: AtomicU64,
    expired: AtomicU64,
}

impl Counters {
    pub(super) fn stored(&self, blocks: usize, ok: bool) {
        self.stored.fetch_add(blocks as u64, Ordering::Relaxed);
        self.failed_stores.fetch_add(u64::from(!ok), Ordering::Relaxed);
    }

    pub(super) fn refuse(&self, blocks: usize) {
        self.refused.fetch_add(blocks as u64, Ordering::Relaxed);
    }

    pub(super) fn expire(&self, blocks: usize) {
        self.expired.fetch_add(blocks as u64, Ordering::Relaxed);
    }

    pub(super) fn read(&self, slots: &SlotPool, evicted: u64) -> Counts {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            capacity: slots.total() as u64,
            used: (slots.total() - slots.free()) as u64,
            stored: count(&self.stored),
            failed_stores: count(&self.failed_stores),
            refused: count(&self.refused),
            evicted,
            expired: count(&self.expired),
        }
    }
}
