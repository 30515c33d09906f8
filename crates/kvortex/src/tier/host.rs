//! The host tier: blocks in the slots of the arena. What the planner may know of it is that a block takes a slot.

use std::ptr::NonNull;

use kvortex_mem::arena::Arena;
pub use kvortex_mem::copy::Step;
use kvortex_mem::map::Pinned;
pub use kvortex_mem::slots::{SlotClaim, SlotId, SlotPool};

use crate::sync::Arc;

/// Numbers about the host tier at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HostStats {
    /// Blocks that fit.
    pub capacity: usize,
    /// Blocks that have a slot.
    pub used: usize,
    /// 1 - (largest run of free slots / free slots); 0 when none is free. It costs nothing: every slot fits every block.
    pub fragmentation: f64,
    /// Bytes in huge pages when the arena was made.
    pub huge_page_bytes: usize,
    /// Whether the arena is page-locked.
    pub pinned: bool,
}

/// The arena, as the engine sees it.
#[derive(Clone)]
pub struct Host {
    arena: Arc<Arena>,
    /// Read once: the system counts it page by page, and it hardly changes after the arena was touched.
    huge_page_bytes: usize,
}

impl Host {
    /// Keeps blocks in `arena`.
    #[must_use]
    pub fn new(arena: Arc<Arena>) -> Self {
        let huge_page_bytes = arena.memory().huge_page_bytes();
        Self { arena, huge_page_bytes }
    }

    /// Where slots come from.
    #[must_use]
    pub fn slots(&self) -> &SlotPool {
        self.arena.slots()
    }

    /// The memory itself.
    #[must_use]
    pub const fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Where the bytes of a slot begin; valid while the arena lives. Who may read them when: whoever holds a lease on the
    /// block.
    #[must_use]
    pub fn addr(&self, slot: SlotId) -> Option<NonNull<u8>> {
        self.arena.addr(slot)
    }

    /// Numbers at this moment.
    #[must_use]
    pub fn stats(&self) -> HostStats {
        let slots = self.arena.slots();
        let (capacity, free, largest) = (slots.total(), slots.free(), slots.largest_free_run());
        let fragmentation = if free == 0 { 0.0 } else { 1.0 - largest as f64 / free as f64 };
        let pinned = !matches!(self.arena.memory().pinned(), Pinned::No { .. });
        HostStats { capacity, used: capacity - free, fragmentation, huge_page_bytes: self.huge_page_bytes, pinned }
    }
}
