//! One mapping handed out in pieces of any size.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::MemError;
use crate::map::{HostMemory, Pinned};
use crate::sync::Mutex;

/// The alignment that suits GPU copies and cache lines of every machine.
pub const DEFAULT_ALIGNMENT: usize = 128;

const MIN_ALIGNMENT: usize = 8;

/// Pieces of any size from one mapping: best fit, free neighbours joined at once. Safe to share between threads.
///
/// The name tells what it is for: with a GPU its memory is pinned. Without one it serves plain memory, and
/// [`PinnedHostPool::pinned`] says so.
#[derive(Debug)]
pub struct PinnedHostPool {
    memory: HostMemory,
    alignment: usize,
    /// First aligned address of the mapping.
    base: usize,
    capacity: usize,
    state: Mutex<State>,
}

/// Offsets are relative to the pool's base; all offsets and lengths but `Live::bytes` are multiples of the alignment.
///
/// Every byte of the capacity is in exactly one of `free` and `live`; no two entries of `free` touch; `by_len` holds the
/// entries of `free` the other way round.
#[derive(Debug, Default)]
struct State {
    free: BTreeMap<usize, usize>,
    by_len: BTreeSet<(usize, usize)>,
    live: BTreeMap<usize, Live>,
    /// Former starts of allocations that lie in free memory now: what tells a double free from a foreign pointer.
    freed: BTreeSet<usize>,
    used: usize,
    peak: usize,
    allocations: u64,
    failures: u64,
    closed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Live {
    /// As asked for.
    bytes: usize,
    /// As taken.
    len: usize,
}

/// One piece handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Allocation {
    /// Address of the first byte.
    pub addr: usize,
    /// Bytes as asked for.
    pub bytes: usize,
}

/// What a pool holds. Bytes count what is taken, that is, each allocation rounded up to the alignment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PoolStats {
    /// Bytes in all.
    pub capacity: usize,
    /// Bytes allocated.
    pub used: usize,
    /// Bytes free.
    pub free: usize,
    /// The most bytes ever allocated at once.
    pub peak: usize,
    /// Bytes of the longest free run.
    pub largest_free: usize,
    /// 1 - `largest_free` / `free`, or 0 if nothing is free.
    pub fragmentation: f64,
    /// Allocations alive.
    pub live: usize,
    /// Allocations ever made.
    pub allocations: u64,
    /// Requests refused for want of memory.
    pub failures: u64,
}

impl PinnedHostPool {
    /// A pool over all of `memory`. `alignment` is a power of two of at least 8; [`DEFAULT_ALIGNMENT`] suits most.
    pub fn new(memory: HostMemory, alignment: usize) -> Result<PinnedHostPool, MemError> {
        if !alignment.is_power_of_two() || alignment < MIN_ALIGNMENT {
            return Err(MemError::BadAlignment { alignment, min: MIN_ALIGNMENT });
        }
        let start = memory.addr().as_ptr() as usize;
        let too_small = || MemError::TooSmall { bytes: memory.len(), slot_bytes: alignment };
        let base = start.checked_next_multiple_of(alignment).ok_or_else(too_small)?;
        let usable = memory.len().saturating_sub(base - start);
        let capacity = usable - usable % alignment;
        if capacity == 0 {
            return Err(too_small());
        }
        let mut state = State::default();
        state.insert_free(0, capacity);
        Ok(PinnedHostPool { memory, alignment, base, capacity, state: Mutex::new(state) })
    }

    /// A piece of at least `bytes` bytes, aligned. Its contents are what the last user left.
    pub fn allocate(&self, bytes: usize) -> Result<Allocation, MemError> {
        if bytes == 0 {
            return Err(MemError::ZeroBytes { what: "an allocation" });
        }
        let len = bytes.checked_next_multiple_of(self.alignment).unwrap_or(usize::MAX);
        let mut state = self.state.lock();
        if state.closed {
            return Err(MemError::Stopped);
        }
        match state.allocate(bytes, len) {
            Some(offset) => Ok(Allocation { addr: self.base + offset, bytes }),
            None => Err(state.refuse(bytes, self.capacity)),
        }
    }

    /// Gives back the allocation that starts at `addr`.
    ///
    /// [`MemError::DoubleFree`] if one did and was given back; [`MemError::ForeignPointer`] for every other address, one in
    /// the middle of an allocation among them.
    pub fn free(&self, addr: usize) -> Result<(), MemError> {
        let offset = addr.checked_sub(self.base).ok_or(MemError::ForeignPointer { addr })?;
        let mut state = self.state.lock();
        if state.release(offset) {
            return Ok(());
        }
        let again = state.freed.contains(&offset);
        Err(if again { MemError::DoubleFree { addr } } else { MemError::ForeignPointer { addr } })
    }

    /// How full the pool is.
    pub fn stats(&self) -> PoolStats {
        let state = self.state.lock();
        let (free, largest_free) = (self.capacity - state.used, state.largest_free());
        PoolStats {
            capacity: self.capacity,
            used: state.used,
            free,
            peak: state.peak,
            largest_free,
            fragmentation: if free == 0 { 0.0 } else { 1.0 - largest_free as f64 / free as f64 },
            live: state.live.len(),
            allocations: state.allocations,
            failures: state.failures,
        }
    }

    /// What is allocated now, by address.
    pub fn live(&self) -> Vec<Allocation> {
        self.state.lock().live(self.base)
    }

    /// Alignment of every allocation in bytes.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Whether the pool's memory is pinned for a GPU.
    pub fn pinned(&self) -> Pinned {
        self.memory.pinned()
    }

    /// Refuses allocations from now on and returns what is still allocated, logged as a leak. It may still be freed.
    pub fn close(&self) -> Vec<Allocation> {
        let leaked = {
            let mut state = self.state.lock();
            state.closed = true;
            state.live(self.base)
        };
        report_leak(&leaked);
        leaked
    }
}

impl Drop for PinnedHostPool {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        if !state.closed {
            report_leak(&state.live(self.base));
        }
    }
}

fn report_leak(leaked: &[Allocation]) {
    const NAMED: usize = 8;
    if leaked.is_empty() {
        return;
    }
    let bytes: usize = leaked.iter().map(|allocation| allocation.bytes).sum();
    let named: Vec<String> =
        leaked.iter().take(NAMED).map(|leak| format!("{:#x} ({} bytes)", leak.addr, leak.bytes)).collect();
    let more = if leaked.len() > NAMED { ", ..." } else { "" };
    log::warn!(
        "host pool closed with {} allocations of {bytes} bytes still in use: {}{more}",
        leaked.len(),
        named.join(", ")
    );
}

impl State {
    /// Takes the shortest free run that is long enough, the lowest of those.
    fn allocate(&mut self, bytes: usize, len: usize) -> Option<usize> {
        let &(run, offset) = self.by_len.range((len, 0)..).next()?;
        self.remove_free(offset, run);
        if run > len {
            self.insert_free(offset + len, run - len);
        }
        while let Some(&inside) = self.freed.range(offset..offset + len).next() {
            self.freed.remove(&inside);
        }
        self.live.insert(offset, Live { bytes, len });
        self.used += len;
        self.peak = self.peak.max(self.used);
        self.allocations += 1;
        Some(offset)
    }

    fn refuse(&mut self, requested: usize, capacity: usize) -> MemError {
        self.failures += 1;
        MemError::OutOfMemory { requested, free: capacity - self.used, largest: self.largest_free() }
    }

    /// False if no allocation starts at `offset`.
    fn release(&mut self, offset: usize) -> bool {
        let Some(Live { len, .. }) = self.live.remove(&offset) else {
            return false;
        };
        self.used -= len;
        self.freed.insert(offset);
        let (mut start, mut end) = (offset, offset + len);
        if let Some((&left, &left_len)) = self.free.range(..offset).next_back()
            && left + left_len == offset
        {
            self.remove_free(left, left_len);
            start = left;
        }
        if let Some(&right_len) = self.free.get(&end) {
            self.remove_free(end, right_len);
            end += right_len;
        }
        self.insert_free(start, end - start);
        true
    }

    fn insert_free(&mut self, offset: usize, len: usize) {
        self.free.insert(offset, len);
        self.by_len.insert((len, offset));
    }

    fn remove_free(&mut self, offset: usize, len: usize) {
        self.free.remove(&offset);
        self.by_len.remove(&(len, offset));
    }

    fn largest_free(&self) -> usize {
        self.by_len.last().map_or(0, |&(len, _)| len)
    }

    fn live(&self, base: usize) -> Vec<Allocation> {
        self.live.iter().map(|(&offset, live)| Allocation { addr: base + offset, bytes: live.bytes }).collect()
    }
}
