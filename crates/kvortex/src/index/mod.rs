//! Which blocks are here.
//!
//! Sharded by key; each shard is one lock over map, order and leases. No method holds two shard locks at once, so there is
//! no lock order to keep. Claims that become free under a lock are dropped outside of it.

mod batch;
mod changes;
mod reservation;
mod shard;
mod wheel;

pub use changes::Changed;
pub use reservation::{Reservation, Reserved, Writing};

use crate::eviction::{Eviction, Lru, NodeId, Stamp};
use crate::fork::Owner;
use crate::key::Keys;
use crate::lease::{Held, Lease};
use crate::mask::BlockMask;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering};
use crate::terms::Tick;
use crate::tier::host::{SlotClaim, SlotId, SlotPool};
use batch::{Batch, SHARDS};
use shard::{Found, NOWHERE, Shard};

/// Keys looked at in the first step of a prefix search; every next step looks at four times as many. A miss at the first
/// key then costs a few lookups, and a hit of thousands locks each shard a handful of times.
const FIRST_WINDOW: usize = 16;

/// A block that somebody holds a lease on or writes. `rank` is its place in the holder's run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Handle {
    shard: u32,
    node: NodeId,
    rank: u32,
}

/// The index of one namespace.
pub struct Index<P: Eviction = Lru> {
    shards: Box<[Line<Mutex<Shard<P>>>]>,
    /// The stamp of the block to go first, per shard, written under the shard's lock. Read without it, so only a hint.
    first: [AtomicU64; SHARDS],
    clock: AtomicU64,
    /// The latest tick of the callers' clock.
    now: AtomicU64,
    slots: SlotPool,
    owner: Owner,
}

/// Keeps neighbours off each other's cache lines.
#[repr(align(128))]
struct Line<T>(T);

/// Numbers about an index at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexStats {
    /// Blocks that a lookup can see.
    pub ready: usize,
    /// Blocks with at least one lease.
    pub leased: usize,
    /// Bytes of memory that the index holds.
    pub bytes: usize,
}

impl<P: Eviction> Index<P> {
    /// An empty index of blocks in slots of `slots`.
    #[must_use]
    pub fn new(slots: SlotPool) -> Self {
        Self {
            slots,
            shards: (0..SHARDS).map(|_| Line(Mutex::new(Shard::default()))).collect(),
            first: std::array::from_fn(|_| AtomicU64::new(Stamp::MAX)),
            clock: AtomicU64::new(0),
            now: AtomicU64::new(0),
            owner: Owner::this_process(),
        }
    }

    /// Length of the longest ready prefix of `keys`. Takes no lease and changes no order.
    pub fn prefix_len(&self, keys: Keys<'_>) -> usize {
        for window in windows(keys.len()) {
            let end = window.end;
            let cut = self.scan(&keys, window, |_| ());
            if cut < end {
                return cut;
            }
        }
        keys.len()
    }

    /// Which of `keys` are ready. Takes no lease and changes no order.
    pub fn ready_mask(&self, keys: Keys<'_>) -> BlockMask {
        let mut mask = BlockMask::new(keys.len());
        for (shard, probes) in Batch::of(&keys, 0).shards() {
            let shard = self.shards[shard].0.lock();
            let mut last = NOWHERE;
            for probe in probes {
                let position = probe.position as usize;
                if let Found::Ready(_) = shard.find(probe.hash, &keys.get(position), &mut last) {
                    mask.set(position);
                }
            }
        }
        mask
    }

    /// Leases the longest ready prefix of `keys`.
    pub fn lease_prefix(self: &Arc<Self>, keys: Keys<'_>) -> Lease<P> {
        let mut run = Run::default();
        for window in windows(keys.len()) {
            let end = window.end;
            let cut = self.lease_window(&keys, window, &mut run);
            if cut < end {
                self.shorten(&mut run, cut);
                break;
            }
        }
        Lease::new(Held::new(Arc::clone(self), run.handles), run.slots)
    }

    /// Leases every ready block of `keys`; the mask says which.
    pub fn lease_each(self: &Arc<Self>, keys: Keys<'_>) -> (Lease<P>, BlockMask) {
        let mut mask = BlockMask::new(keys.len());
        let mut run = Run { handles: Vec::with_capacity(keys.len()), slots: vec![SlotId(0); keys.len()] };
        for (shard, probes) in Batch::of(&keys, 0).shards() {
            self.change(shard, |locked| {
                let mut last = NOWHERE;
                for probe in probes {
                    let key = keys.get(probe.position as usize);
                    let Found::Ready(node) = locked.find(probe.hash, &key, &mut last) else { continue };
                    let Some(slot) = locked.lease(node) else { continue };
                    mask.set(probe.position as usize);
                    run.hold(&Handle { shard: shard as u32, node, rank: probe.position }, slot);
                }
            });
        }
        let mut positions = 0..keys.len();
        run.slots.retain(|_| positions.next().is_some_and(|position| mask.get(position)));
        (Lease::new(Held::new(Arc::clone(self), run.handles), run.slots), mask)
    }

    /// Forgets up to `count` blocks, those to go first first, and hands their claims out.
    pub fn evict(&self, count: usize) -> Vec<SlotClaim> {
        let mut victims = Vec::with_capacity(count);
        while victims.len() < count {
            let Some(shard) = self.first_to_go() else { break };
            victims.extend(self.change(shard, Shard::evict_first));
        }
        victims
    }

    /// Forgets every block and tells how many were visible. Those leased or being written vanish when that ends.
    pub fn clear(&self) -> usize {
        let mut claims = Vec::new();
        let forgotten = (0..SHARDS).map(|shard| self.change(shard, |locked| locked.clear(&mut claims))).sum();
        self.slots.return_many(claims);
        forgotten
    }

    /// Forgets every block whose life is over at `now` and tells how many those are. Those leased or being written vanish
    /// when that ends. Does nothing unless time has passed.
    pub fn expire(&self, now: Tick) -> usize {
        if self.now.fetch_max(now.into(), Ordering::Relaxed) >= now.into() {
            return 0;
        }
        let mut claims = Vec::new();
        let forgotten = (0..SHARDS).map(|shard| self.change(shard, |locked| locked.expire(now, &mut claims))).sum();
        self.slots.return_many(claims);
        forgotten
    }

    /// Begins to note which blocks become visible and which are forgotten. What is there now counts as just come. Blocks that
    /// a clock takes away are not told of, unless somebody shares them for good.
    pub fn watch(&self) {
        self.shards.iter().for_each(|shard| shard.0.lock().watch());
    }

    /// What has changed since [`watch`](Self::watch) or the last call. Of blocks that came and went in between nothing is
    /// told, so there is never more of it than blocks told of and blocks there.
    pub fn take_changes(&self) -> Changed {
        let mut changed = Changed::default();
        self.shards.iter().for_each(|shard| shard.0.lock().take_changes(&mut changed));
        changed
    }

    /// Numbers at this moment, shard by shard.
    pub fn stats(&self) -> IndexStats {
        let mut stats = IndexStats {
            bytes: size_of::<Self>() + SHARDS * size_of::<Line<Mutex<Shard<P>>>>(),
            ..IndexStats::default()
        };
        for shard in &self.shards {
            let shard = shard.0.lock();
            stats.ready += shard.ready();
            stats.leased += shard.leased();
            stats.bytes += shard.bytes();
        }
        stats
    }

    /// Ends the leases of `handles`, a run in order: the tail gets the smallest stamp.
    pub(crate) fn release(&self, handles: &[Handle]) {
        if self.owner.is_elsewhere() {
            return;
        }
        let newest = self.newest_tick(handles);
        let mut claims = Vec::new();
        for group in handles.chunk_by(|a, b| a.shard == b.shard).rev() {
            self.change(group[0].shard as usize, |locked| {
                for handle in group.iter().rev() {
                    claims.extend(locked.release(handle.node, newest - Stamp::from(handle.rank)));
                }
            });
        }
        self.slots.return_many(claims);
    }

    /// Runs `f` under a shard's lock and keeps the hint of its first block true.
    fn change<R>(&self, shard: usize, f: impl FnOnce(&mut Shard<P>) -> R) -> R {
        let mut locked = self.shards[shard].0.lock();
        let result = f(&mut locked);
        self.first[shard].store(locked.first_stamp(), Ordering::Relaxed);
        result
    }

    /// Takes a stretch of ticks, one for every rank of a run, and returns the newest, which is for rank 0.
    fn newest_tick(&self, handles: &[Handle]) -> Stamp {
        let ranks = handles.iter().map(|handle| Stamp::from(handle.rank) + 1).max().unwrap_or(0);
        self.clock.fetch_add(ranks, Ordering::Relaxed) + ranks
    }

    fn first_to_go(&self) -> Option<usize> {
        let stamps = self.first.iter().map(|first| first.load(Ordering::Relaxed));
        let (shard, stamp) = stamps.enumerate().min_by_key(|&(_, stamp)| stamp)?;
        (stamp != Stamp::MAX).then_some(shard)
    }

    /// Looks a window up and returns the position of its first key that is not ready, or the window's end. `found` is told
    /// of every ready block before that, and of some behind it.
    fn scan(&self, keys: &Keys<'_>, window: std::ops::Range<usize>, mut found: impl FnMut(Handle)) -> usize {
        let mut cut = window.end;
        for (shard, probes) in Batch::of(&keys.slice(window.clone()), window.start).shards() {
            let locked = self.shards[shard].0.lock();
            let below = probes.partition_point(|probe| (probe.position as usize) < cut);
            let mut last = NOWHERE;
            for probe in &probes[..below] {
                match locked.find(probe.hash, &keys.get(probe.position as usize), &mut last) {
                    Found::Ready(node) => found(Handle { shard: shard as u32, node, rank: probe.position }),
                    _ => {
                        cut = probe.position as usize;
                        break;
                    }
                }
            }
        }
        cut
    }

    /// Leases the ready prefix of a window. The search comes first and takes nothing, so that blocks behind a hole are not
    /// used more recently for having been looked at.
    fn lease_window(&self, keys: &Keys<'_>, window: std::ops::Range<usize>, run: &mut Run) -> usize {
        let mut found = Vec::with_capacity(window.len());
        let mut cut = self.scan(keys, window, |handle| found.push(handle));
        found.retain(|handle| (handle.rank as usize) < cut);
        run.slots.resize(cut, SlotId(0));
        for group in found.chunk_by(|a, b| a.shard == b.shard) {
            self.change(group[0].shard as usize, |locked| {
                for handle in group {
                    match locked.lease_if(handle.node, &keys.get(handle.rank as usize)) {
                        Some(slot) => run.hold(handle, slot),
                        None => cut = cut.min(handle.rank as usize),
                    }
                }
            });
        }
        cut
    }

    /// Ends the leases of a run from `cut` on.
    fn shorten(&self, run: &mut Run, cut: usize) {
        let (keep, extra): (Vec<_>, Vec<_>) = run.handles.iter().partition(|handle| (handle.rank as usize) < cut);
        run.slots.truncate(cut);
        run.handles = keep;
        self.release(&extra);
    }

    /// Walks the whole index and asserts its invariants, when nobody else uses it.
    #[cfg(any(test, shuttle))]
    pub fn validate(&self) {
        for (shard, first) in self.shards.iter().zip(&self.first) {
            let shard = shard.0.lock();
            shard.validate();
            assert_eq!(shard.first_stamp(), first.load(Ordering::Relaxed));
        }
    }
}

/// Leases while they are collected.
#[derive(Default)]
struct Run {
    handles: Vec<Handle>,
    slots: Vec<SlotId>,
}

impl Run {
    fn hold(&mut self, handle: &Handle, slot: SlotId) {
        self.slots[handle.rank as usize] = slot;
        self.handles.push(*handle);
    }
}

/// Ranges that cover `0..len`, each four times as long as the one before.
fn windows(len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let (mut start, mut size) = (0, FIRST_WINDOW);
    std::iter::from_fn(move || {
        let window = start..len.min(start + size);
        start = window.end;
        size *= 4;
        (!window.is_empty()).then_some(window)
    })
}

#[cfg(test)]
mod tests;
