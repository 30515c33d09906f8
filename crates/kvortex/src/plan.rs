//! What to do, and what came of it: plain data.

use std::time::Duration;

use crate::mask::BlockMask;
pub use crate::tier::host::Step;

/// The number of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TicketId(pub u64);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From the caller's pages into slots.
    Save,
    /// From slots into the caller's pages.
    Load,
}

impl Kind {
    /// `save` or `load`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Save => "save",
            Self::Load => "load",
        }
    }
}

/// Copies to be made. A step's page is the position of its key in the call.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Under which number the planner keeps what must stay until the plan is settled.
    pub ticket: TicketId,
    /// Which way.
    pub kind: Kind,
    /// One copy each.
    pub steps: Vec<Step>,
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// What was asked for.
    pub kind: Kind,
    /// Save: which blocks are held now. Load: which were copied to the caller.
    pub mask: BlockMask,
    /// Blocks copied.
    pub blocks: usize,
    /// Save: blocks that were there, or that another save is writing, so that nothing was copied.
    pub present: usize,
    /// Save: blocks for which no room could be made.
    pub refused: usize,
    /// Load: blocks that were not there.
    pub missing: usize,
    /// Bytes copied.
    pub bytes: u64,
    /// From the call to the last byte.
    pub elapsed: Duration,
}

impl Report {
    /// The report of a call about `len` blocks of which nothing was copied yet.
    pub(crate) fn empty(kind: Kind, len: usize) -> Self {
        let missing = if kind == Kind::Load { len } else { 0 };
        let mask = BlockMask::new(len);
        Self { kind, mask, blocks: 0, present: 0, refused: 0, missing, bytes: 0, elapsed: Duration::ZERO }
    }
}
