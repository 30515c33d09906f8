//! Numbers of plans that go from one planner to several movers.

use kvortex_mem::copy::gpu::Lane;

use crate::error::{Error, Result};

const LANE_BITS: u32 = 2;

/// A plan's lane and its number in that lane, counted from 1 without a gap, so that a mover notices one that it never saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RankTicket(u64);

/// A load that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its ticket.
    pub ticket: RankTicket,
    /// Whether every byte is in place.
    pub ok: bool,
}

impl RankTicket {
    pub(super) const fn new(lane: Lane, number: u64) -> Self {
        Self(number << LANE_BITS | lane as u64)
    }

    /// The ticket that [`id`](Self::id) stands for.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a number that no planner gives out.
    pub fn from_id(id: u64) -> Result<Self> {
        let known = (id & 3) < Lane::ALL.len() as u64 && id >> LANE_BITS > 0;
        if known {
            Ok(Self(id))
        } else {
            Err(Error::invalid(format!("{id} is no ticket: pass what the planner returned")))
        }
    }

    /// As one number, to be sent to other processes.
    #[must_use]
    pub const fn id(self) -> u64 {
        self.0
    }

    /// Which copies go in order with its own.
    #[must_use]
    pub const fn lane(self) -> Lane {
        Lane::ALL[(self.0 & 3) as usize]
    }

    /// Its number in the lane.
    pub(super) const fn number(self) -> u64 {
        self.0 >> LANE_BITS
    }
}

impl std::fmt::Display for RankTicket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}
