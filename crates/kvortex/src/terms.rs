//! On which terms a block is kept: how important it is, and until when.

use crate::eviction::Stamp;

/// Which blocks go first when room is needed, whatever was used when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Priority {
    /// Before all others.
    Low,
    /// As used.
    #[default]
    Normal,
    /// Only when no other is left.
    High,
}

const PRIORITY_SHIFT: u32 = 62;

impl Priority {
    /// Number of priorities.
    pub(crate) const COUNT: usize = 3;

    /// The stamp of a block of this priority that was used at `tick`: stamps order by priority, then by use.
    pub(crate) const fn stamp(self, tick: u64) -> Stamp {
        (self as u64) << PRIORITY_SHIFT | tick
    }

    /// The number of the priority that a stamp has.
    pub(crate) const fn of(stamp: Stamp) -> usize {
        (stamp >> PRIORITY_SHIFT) as usize
    }
}

/// A moment, in quarters of a second of the caller's clock.
pub type Tick = u32;

/// Milliseconds of a [`Tick`].
const TICK_MS: u64 = 250;

/// The tick that has begun at `ms`.
#[must_use]
pub fn tick_at(ms: u64) -> Tick {
    (ms / TICK_MS).try_into().unwrap_or(FOREVER)
}

/// What no clock reaches.
pub(crate) const FOREVER: Tick = Tick::MAX;

/// Terms of one block. Who shares a block raises them: the higher priority and the longer life hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// How important it is.
    pub priority: Priority,
    /// The tick at which it is forgotten.
    pub until: Tick,
}

impl Default for Terms {
    fn default() -> Self {
        Self { priority: Priority::default(), until: FOREVER }
    }
}

impl Terms {
    /// Terms of a block that is kept until `ms` of the caller's clock and no more than one tick longer; `None` for as long
    /// as there is room.
    #[must_use]
    pub fn new(priority: Priority, until_ms: Option<u64>) -> Self {
        let until = until_ms.map_or(FOREVER, |ms| tick_at(ms.saturating_add(TICK_MS - 1)).min(FOREVER - 1));
        Self { priority, until }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_ends_not_before_its_time_and_within_a_tick() {
        for ms in [0, 1, 249, 250, 251, 1_000_000] {
            let until = Terms::new(Priority::Low, Some(ms)).until;
            assert!(tick_at(ms.saturating_sub(1)) < until || ms == 0, "{ms}");
            assert!(tick_at(ms + TICK_MS) >= until, "{ms}");
        }
        assert_eq!(Terms::new(Priority::Low, Some(u64::MAX)).until, FOREVER - 1);
    }

    #[test]
    fn a_stamp_tells_its_priority() {
        let all = [Priority::Low, Priority::Normal, Priority::High];
        assert!(all.iter().all(|&one| Priority::of(one.stamp(7)) == one as usize));
        assert!(Priority::Low.stamp(u64::MAX >> 2) < Priority::Normal.stamp(0));
        assert!(Priority::High.stamp(u64::MAX >> 2) < Stamp::MAX);
    }
}
