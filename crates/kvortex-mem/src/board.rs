//! What has ended in a lane, readable without a lock and from other processes.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::shared::SharedWords;
use crate::sync::Arc;

/// Failed tickets that a lane remembers.
pub const FAILED_KEPT: usize = 64;

/// Words that a lane's board takes.
pub const LANE_WORDS: usize = 2 + FAILED_KEPT;

const WATERMARK: usize = 0;
const FAILURES: usize = 1;
const RING: usize = 2;

/// The end of one lane's tickets, which end in order.
#[derive(Debug, Clone)]
pub struct LaneBoard {
    words: Arc<SharedWords>,
    first: usize,
}

/// What a reader of a board knows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    /// The greatest ticket that it knows to have ended.
    pub watermark: u64,
    failures: u64,
}

/// Which tickets failed among those that ended between two looks.
#[derive(Debug, PartialEq, Eq)]
pub enum Failed {
    /// These.
    These(Vec<u64>),
    /// More than the board remembers: take them all for failed.
    Any,
}

impl Default for LaneBoard {
    fn default() -> LaneBoard {
        LaneBoard::over(Arc::new(SharedWords::private(LANE_WORDS)), 0)
    }
}

impl LaneBoard {
    /// The board in [`LANE_WORDS`] of `words` from `first` on, which must be there.
    pub fn over(words: Arc<SharedWords>, first: usize) -> LaneBoard {
        assert!(first + LANE_WORDS <= words.words().len(), "a board lies within its words");
        LaneBoard { words, first }
    }

    /// The greatest ticket that has ended; all smaller ones of this lane have ended too, and what they wrote can be read.
    pub fn watermark(&self) -> u64 {
        self.word(WATERMARK).load(Ordering::Acquire)
    }

    /// How many tickets have failed.
    pub fn failures(&self) -> u64 {
        self.word(FAILURES).load(Ordering::Acquire)
    }

    /// Looks again: raises `seen`, and says which tickets up to its watermark failed since the last look. Some that are above
    /// it may be named too, once.
    pub fn look(&self, seen: &mut Seen) -> Failed {
        seen.watermark = self.watermark();
        let (first, count) = (seen.failures, self.failures());
        seen.failures = count;
        let tickets = (first..count).map(|index| self.failed(index).load(Ordering::Acquire)).collect();
        // Counted again, because the ring may have gone round meanwhile; the next entry is written before it is counted.
        if self.failures() - first >= FAILED_KEPT as u64 { Failed::Any } else { Failed::These(tickets) }
    }

    /// To be called in order, by one thread at a time; a failure is there before the watermark passes it.
    pub fn publish(&self, ticket: u64, ok: bool) {
        if !ok {
            let count = self.word(FAILURES).load(Ordering::Relaxed);
            self.failed(count).store(ticket, Ordering::Release);
            self.word(FAILURES).store(count + 1, Ordering::Release);
        }
        self.word(WATERMARK).fetch_max(ticket, Ordering::Release);
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.words.words()[self.first + at]
    }

    fn failed(&self, index: u64) -> &AtomicU64 {
        self.word(RING + index as usize % FAILED_KEPT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_tells_what_failed_since_the_last() {
        let (board, mut seen) = (LaneBoard::default(), Seen::default());
        (1..=5).for_each(|ticket| board.publish(ticket, ticket % 2 == 1));
        assert_eq!((board.look(&mut seen), seen.watermark), (Failed::These(vec![2, 4]), 5));
        assert_eq!(board.look(&mut seen), Failed::These(vec![]));
        board.publish(9, false);
        assert_eq!((board.look(&mut seen), seen.watermark), (Failed::These(vec![9]), 9));
    }

    #[test]
    fn failures_that_the_ring_cannot_hold_fail_everything() {
        let (board, mut seen) = (LaneBoard::default(), Seen::default());
        (1..FAILED_KEPT as u64).for_each(|ticket| board.publish(ticket, false));
        assert!(matches!(board.look(&mut seen), Failed::These(tickets) if tickets.len() == FAILED_KEPT - 1));
        (100..100 + FAILED_KEPT as u64).for_each(|ticket| board.publish(ticket, false));
        assert_eq!(board.look(&mut seen), Failed::Any);
        assert_eq!(board.look(&mut seen), Failed::These(vec![]));
    }
}
