//! One mapping cut into equal slots.

use std::ptr::NonNull;

use crate::error::MemError;
use crate::map::HostMemory;
use crate::slots::{SlotId, SlotPool};

/// Slots start at multiples of this, so that direct file I/O can use them.
const SLOT_ALIGNMENT: usize = 4096;

/// One mapping cut into equal slots.
///
/// A documented rule, not a type, orders access to the bytes of a slot: whoever holds its [`SlotClaim`] and has not yet
/// published it writes; after that, whoever holds a lease on it reads. Nothing here ever makes a reference to the bytes, only
/// raw pointers, so that an owner may lend them to other languages.
///
/// [`SlotClaim`]: crate::slots::SlotClaim
#[derive(Debug)]
pub struct Arena {
    memory: HostMemory,
    slots: SlotPool,
    slot_bytes: usize,
    stride: usize,
}

impl Arena {
    /// Cuts `memory` into as many slots of `slot_bytes` payload bytes as fit.
    ///
    /// Fails, and drops the memory, where [`Arena::fit`] fails.
    pub fn cut(memory: HostMemory, slot_bytes: usize) -> Result<Arena, MemError> {
        let count = Arena::fit(memory.len(), slot_bytes)?;
        let stride = slot_bytes.next_multiple_of(SLOT_ALIGNMENT);
        Ok(Arena { memory, slots: SlotPool::new(count), slot_bytes, stride })
    }

    /// How many slots of `slot_bytes` payload bytes fit into `bytes` bytes of memory; an error if none does.
    pub fn fit(bytes: usize, slot_bytes: usize) -> Result<u32, MemError> {
        if slot_bytes == 0 {
            return Err(MemError::ZeroBytes { what: "a slot" });
        }
        let stride = slot_bytes.checked_next_multiple_of(SLOT_ALIGNMENT).unwrap_or(usize::MAX);
        match bytes / stride {
            0 => Err(MemError::TooSmall { bytes, slot_bytes: stride }),
            slots => u32::try_from(slots).map_err(|_| MemError::TooManySlots { slots, max: u32::MAX as usize }),
        }
    }

    /// Which slots are free.
    pub fn slots(&self) -> &SlotPool {
        &self.slots
    }

    /// Payload bytes of one slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Bytes from one slot to the next: the payload rounded up to 4 KiB.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Address of a slot's first byte, or `None` if there is no such slot.
    pub fn addr(&self, slot: SlotId) -> Option<NonNull<u8>> {
        let index = slot.0 as usize;
        if index >= self.slots.total() {
            return None;
        }
        // SAFETY: `total` slots of `stride` bytes fit into the mapping, so the offset is in bounds.
        Some(unsafe { self.memory.addr().add(index * self.stride) })
    }

    /// The mapping, no longer cut.
    pub fn into_memory(self) -> HostMemory {
        self.memory
    }

    /// The mapping underneath.
    pub fn memory(&self) -> &HostMemory {
        &self.memory
    }
}
