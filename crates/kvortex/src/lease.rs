//! Proof that blocks stay.

use crate::eviction::{Eviction, Lru};
use crate::index::{Handle, Index};
use crate::sync::Arc;
use crate::tier::host::SlotId;

/// Leases on blocks of an index, ended on drop: the run becomes the most recently used, its head more than its tail.
pub(crate) struct Held<P: Eviction> {
    index: Arc<Index<P>>,
    handles: Vec<Handle>,
}

impl<P: Eviction> Held<P> {
    pub(crate) fn new(index: Arc<Index<P>>, handles: Vec<Handle>) -> Self {
        Self { index, handles }
    }
}

impl<P: Eviction> Drop for Held<P> {
    fn drop(&mut self) {
        self.index.release(&self.handles);
    }
}

/// Holds a run of blocks: none of them is evicted and none of their slots is reused until this is dropped. One object for
/// the whole run. Dropping it makes the run the most recently used, its head more than its tail.
#[must_use = "dropping a lease ends it"]
pub struct Lease<P: Eviction = Lru> {
    _held: Option<Held<P>>,
    slots: Vec<SlotId>,
}

impl<P: Eviction> Lease<P> {
    pub(crate) fn new(held: Held<P>, slots: Vec<SlotId>) -> Self {
        Self { _held: Some(held), slots }
    }

    /// A lease on nothing.
    pub(crate) const fn none() -> Self {
        Self { _held: None, slots: Vec::new() }
    }

    /// Number of blocks held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether no block is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The slots of the blocks, in the order of the keys.
    #[must_use]
    pub fn slots(&self) -> &[SlotId] {
        &self.slots
    }
}
