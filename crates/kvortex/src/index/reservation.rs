//! Blocks on their way in. Ownership is the protocol: a reservation becomes a writing becomes ready blocks, each step
//! consumes the one before, and dropping any of them gives the blocks up.

use super::{Found, Handle, Index, NOWHERE, Shard, batch::Batch};
use crate::eviction::{Eviction, Lru, Stamp};
use crate::key::Keys;
use crate::lease::Held;
use crate::mask::BlockMask;
use crate::sync::{Arc, Ordering};
use crate::terms::{Terms, Tick};
use crate::tier::host::{SlotClaim, SlotId};

/// What became of a request for blocks that are to be stored.
pub struct Reserved<P: Eviction = Lru> {
    /// The blocks that were neither there nor on their way.
    pub reservation: Reservation<P>,
    /// Which keys were ready already.
    pub ready: BlockMask,
    /// Keeps those, so that room for the tail of a prefix is not made by evicting its head.
    pub(crate) held: Held<P>,
    /// How many keys somebody else is writing, or came twice.
    pub pending: usize,
}

/// Places in the index for blocks that have no slot yet; invisible.
#[must_use = "dropping a reservation gives its blocks up"]
pub struct Reservation<P: Eviction = Lru>(Places<P>);

/// Blocks whose bytes are being written; invisible, and their slots belong to this object.
#[must_use = "dropping this gives the blocks up"]
pub struct Writing<P: Eviction = Lru> {
    places: Places<P>,
    claims: Vec<SlotClaim>,
}

struct Places<P: Eviction> {
    index: Arc<Index<P>>,
    /// Grouped by shard; ranks count the places in the order of the keys.
    handles: Vec<Handle>,
    /// Positions of the keys, by rank.
    positions: Vec<u32>,
}

impl<P: Eviction> Index<P> {
    /// Inserts the keys that are not there, invisible until they are published.
    pub fn reserve(self: &Arc<Self>, keys: Keys<'_>) -> Reserved<P> {
        self.reserve_on(keys, &[])
    }

    /// As [`reserve`](Self::reserve), on terms for each key; without, on the usual ones. Blocks that are there, or on their
    /// way, are shared from now on.
    pub fn reserve_on(self: &Arc<Self>, keys: Keys<'_>, terms: &[Terms]) -> Reserved<P> {
        let now = self.now.load(Ordering::Relaxed) as Tick;
        let mut ready = BlockMask::new(keys.len());
        let mut pending = 0;
        let (mut handles, mut held) = (Vec::with_capacity(keys.len()), Vec::new());
        for (shard, probes) in Batch::of(&keys, 0).shards() {
            self.change(shard, |locked| {
                let mut last = NOWHERE;
                for probe in probes {
                    let position = probe.position as usize;
                    let handle = |node| Handle { shard: shard as u32, node, rank: probe.position };
                    let terms = terms.get(position).copied().unwrap_or_default();
                    match locked.find(probe.hash, &keys.get(position), &mut last) {
                        Found::Ready(node) => {
                            ready.set(position);
                            locked.lease(node);
                            locked.share(node, terms);
                            held.push(handle(node));
                        }
                        Found::Pending(node) => {
                            locked.share(node, terms);
                            pending += 1;
                        }
                        Found::Nothing => {
                            let node = locked.reserve(probe.hash, keys.get(position), (terms, now));
                            handles.push(handle(node));
                        }
                    }
                }
            });
        }
        let positions = rank_by_position(&mut handles, keys.len());
        let held = Held::new(Arc::clone(self), held);
        Reserved {
            reservation: Reservation(Places { index: Arc::clone(self), handles, positions }),
            ready,
            held,
            pending,
        }
    }
}

/// Turns the positions in `handles` into ranks and returns the positions by rank.
fn rank_by_position(handles: &mut [Handle], len: usize) -> Vec<u32> {
    let mut new = BlockMask::new(len);
    handles.iter().for_each(|handle| new.set(handle.rank as usize));
    let positions: Vec<u32> = (0..len as u32).filter(|&position| new.get(position as usize)).collect();
    let mut ranks = vec![0; len];
    (0..).zip(&positions).for_each(|(rank, &position)| ranks[position as usize] = rank);
    handles.iter_mut().for_each(|handle| handle.rank = ranks[handle.rank as usize]);
    positions
}

impl<P: Eviction> Reservation<P> {
    /// Number of blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.positions.len()
    }

    /// Whether there is no block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.positions.is_empty()
    }

    /// Gives each block a slot and starts the copy. Blocks beyond the claims are given up: the tail, which is worth least.
    /// Claims beyond the blocks go back.
    pub fn begin(mut self, mut claims: Vec<SlotClaim>) -> Writing<P> {
        self.0.truncate(claims.len());
        self.0.index.slots.return_many(claims.split_off(self.0.positions.len()));
        self.0.for_each_shard(|locked, handle| locked.begin(handle.node));
        Writing { places: self.0, claims }
    }
}

impl<P: Eviction> Writing<P> {
    /// Number of blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.claims.len()
    }

    /// Whether there is no block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    /// Position among the keys, and slot, of each block.
    pub fn steps(&self) -> impl ExactSizeIterator<Item = (u32, SlotId)> {
        self.places.positions.iter().zip(&self.claims).map(|(&position, claim)| (position, claim.id()))
    }

    /// Each block by itself, in the order of the keys, so that one may become visible and another be given up.
    pub fn split(mut self) -> Vec<Self> {
        let mut claims: Vec<_> = std::mem::take(&mut self.claims).into_iter().map(Some).collect();
        let handles = std::mem::take(&mut self.places.handles);
        let single = |handle: &Handle| {
            let rank = handle.rank as usize;
            let (handles, positions) = (vec![Handle { rank: 0, ..*handle }], vec![self.places.positions[rank]]);
            let places = Places { index: Arc::clone(&self.places.index), handles, positions };
            claims[rank].take().map(|claim| Self { places, claims: vec![claim] })
        };
        let mut singles: Vec<_> = handles.iter().filter_map(single).collect();
        singles.sort_unstable_by_key(|single| single.places.positions[0]);
        singles
    }

    /// Makes the blocks visible. Returns how many are: those forgotten meanwhile are not.
    pub fn publish(mut self) -> usize {
        let newest = self.places.index.newest_tick(&self.places.handles);
        let mut claims: Vec<_> = std::mem::take(&mut self.claims).into_iter().map(Some).collect();
        let mut forgotten = Vec::new();
        self.places.for_each_shard(|locked, handle| {
            if let Some(claim) = claims[handle.rank as usize].take() {
                forgotten.extend(locked.publish(handle.node, claim, newest - Stamp::from(handle.rank)));
            }
        });
        self.places.handles.clear();
        let visible = claims.len() - forgotten.len();
        self.places.index.slots.return_many(forgotten);
        visible
    }
}

impl<P: Eviction> Places<P> {
    /// Visits every place, the tail first, each shard locked once.
    fn for_each_shard(&self, mut visit: impl FnMut(&mut Shard<P>, &Handle)) {
        for group in self.handles.chunk_by(|a, b| a.shard == b.shard) {
            self.index.change(group[0].shard as usize, |locked| {
                group.iter().rev().for_each(|handle| visit(locked, handle));
            });
        }
    }

    fn truncate(&mut self, len: usize) {
        if len >= self.positions.len() {
            return;
        }
        let (keep, extra) = self.handles.iter().partition(|handle| (handle.rank as usize) < len);
        self.handles = extra;
        self.abandon();
        self.handles = keep;
        self.positions.truncate(len);
    }

    fn abandon(&mut self) {
        self.for_each_shard(|locked, handle| locked.abandon(handle.node));
        self.handles.clear();
    }
}

impl<P: Eviction> Drop for Places<P> {
    fn drop(&mut self) {
        if !self.index.owner.is_elsewhere() {
            self.abandon();
        }
    }
}
