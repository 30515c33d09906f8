//! Checksums of what goes to a file.

use twox_hash::XxHash3_128;

use crate::arena::Arena;
use crate::slots::SlotId;

/// XXH3-128, least significant byte first.
pub type Digest = [u8; 16];

/// The digest of `bytes`.
#[must_use]
pub fn digest(bytes: &[u8]) -> Digest {
    XxHash3_128::oneshot(bytes).to_le_bytes()
}

/// The digest of a slot's payload; `None` if there is no such slot. Nobody may be writing the slot.
#[must_use]
pub fn digest_slot(arena: &Arena, slot: SlotId) -> Option<Digest> {
    let addr = arena.addr(slot)?;
    // SAFETY: the payload of a slot lies in the arena's mapping; nobody writes it, as the caller promises.
    Some(digest(unsafe { std::slice::from_raw_parts(addr.as_ptr(), arena.slot_bytes()) }))
}
