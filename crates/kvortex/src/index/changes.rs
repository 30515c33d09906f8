//! What has become visible or was forgotten since somebody last asked. A block that came and went, or went and came again, in
//! between is not told of, so that there is never more to tell than blocks that were told of and blocks that are there.

use std::collections::HashMap;

use crate::key::BlockKey;

/// What there is to tell of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Stored,
    Removed,
}

/// The keys that have become visible, and those forgotten. No key is in both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Visible now, and not when it was last asked.
    pub stored: Vec<BlockKey>,
    /// The other way round.
    pub removed: Vec<BlockKey>,
}

/// Changes of one shard.
#[derive(Default)]
pub(super) struct Changes(HashMap<BlockKey, Change>);

impl Changes {
    /// A block became visible.
    pub(super) fn stored(&mut self, key: BlockKey) {
        self.note(key, Change::Stored);
    }

    /// A visible block was forgotten.
    pub(super) fn removed(&mut self, key: BlockKey) {
        self.note(key, Change::Removed);
    }

    fn note(&mut self, key: BlockKey, change: Change) {
        match self.0.remove(&key) {
            Some(other) => debug_assert_ne!(other, change, "a block came or went twice"),
            None => drop(self.0.insert(key, change)),
        }
    }

    /// Moves everything to `to`.
    pub(super) fn drain(&mut self, to: &mut Changed) {
        for (key, change) in self.0.drain() {
            match change {
                Change::Stored => to.stored.push(key),
                Change::Removed => to.removed.push(key),
            }
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<(BlockKey, Change)>()
    }
}
