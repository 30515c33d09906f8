//! What has ended in a lane, readable without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::sync::Arc;

/// Failed tickets that a lane remembers.
pub const FAILED_KEPT: usize = 64;

/// The end of one lane's tickets, which end in order.
#[derive(Debug)]
pub struct LaneBoard {
    watermark: AtomicU64,
    failures: AtomicU64,
    ring: Arc<[AtomicU64; FAILED_KEPT]>,
}

impl Default for LaneBoard {
    fn default() -> LaneBoard {
        let ring = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
        LaneBoard { watermark: AtomicU64::new(0), failures: AtomicU64::new(0), ring }
    }
}

impl LaneBoard {
    /// The greatest ticket that has ended; all smaller ones of this lane have ended too, and what they wrote can be read.
    pub fn watermark(&self) -> u64 {
        self.watermark.load(Ordering::Acquire)
    }

    /// How many tickets have failed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Acquire)
    }

    /// The latest failed tickets, at most [`FAILED_KEPT`]; complete for all tickets up to a watermark read before, as long as
    /// fewer failed since the last look.
    pub fn failed(&self) -> Vec<u64> {
        let count = self.failures();
        let first = count.saturating_sub(FAILED_KEPT as u64);
        (first..count).map(|index| self.ring[index as usize % FAILED_KEPT].load(Ordering::Acquire)).collect()
    }

    /// To be called in order, by one thread at a time; a failure is there before the watermark passes it.
    pub(super) fn publish(&self, ticket: u64, ok: bool) {
        if !ok {
            let count = self.failures.load(Ordering::Relaxed);
            self.ring[count as usize % FAILED_KEPT].store(ticket, Ordering::Release);
            self.failures.store(count + 1, Ordering::Release);
        }
        self.watermark.fetch_max(ticket, Ordering::Release);
    }
}
