//! Which addresses may be used.

use std::collections::BTreeMap;

/// Where a range comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Allocated,
    Pooled(u64),
    Registered,
}

struct Range {
    len: usize,
    kind: Kind,
    /// Keeps device memory alive; registered memory is its owner's.
    memory: Option<Box<[u128]>>,
}

/// Ranges that do not overlap, by their first address.
#[derive(Default)]
pub(super) struct Ranges(BTreeMap<usize, Range>);

/// What new device memory holds.
const POISON: u128 = u128::from_ne_bytes([0xCD; 16]);

/// Device memory starts at multiples of this.
const ALIGNMENT: usize = 256;

impl Ranges {
    /// New device memory.
    pub(super) fn allocate(&mut self, bytes: usize, kind: Kind) -> usize {
        let memory = vec![POISON; (bytes + ALIGNMENT).div_ceil(16)].into_boxed_slice();
        let addr = (memory.as_ptr() as usize).next_multiple_of(ALIGNMENT);
        self.0.insert(addr, Range { len: bytes, kind, memory: Some(memory) });
        addr
    }

    /// False if the range overlaps another.
    pub(super) fn register(&mut self, addr: usize, len: usize) -> bool {
        let before = self.0.range(..addr + len).next_back();
        if before.is_some_and(|(&start, range)| start + range.len > addr) {
            return false;
        }
        self.0.insert(addr, Range { len, kind: Kind::Registered, memory: None });
        true
    }

    /// Forgets the range that starts at `addr`: its kind and length.
    pub(super) fn remove(&mut self, addr: usize) -> Option<(Kind, usize)> {
        let range = self.0.remove(&addr)?;
        if let Some(mut memory) = range.memory {
            memory.fill(0xDD);
        }
        Some((range.kind, range.len))
    }

    /// The kind of the one range that holds all these bytes.
    pub(super) fn holding(&self, addr: usize, bytes: usize) -> Option<Kind> {
        let (&start, range) = self.0.range(..=addr).next_back()?;
        (addr - start + bytes <= range.len).then_some(range.kind)
    }
}
