//! Decides what is copied where, and never touches a byte.

use dashmap::DashMap;

use crate::eviction::{Lru, Watermarks};
use crate::index::{Index, IndexStats, Writing};
use crate::key::Keys;
use crate::lease::{Held, Lease};
use crate::mask::BlockMask;
use crate::plan::{Kind, Plan, Step, TicketId};
use crate::sync::{Arc, AtomicBool, AtomicU64, Ordering};
use crate::terms::Terms;
use crate::tier::host::{SlotClaim, SlotId, SlotPool};

/// One per engine: the index, the room, and what open plans rest on.
pub struct Planner {
    index: Arc<Index>,
    slots: SlotPool,
    marks: Watermarks,
    sweeping: AtomicBool,
    open: DashMap<TicketId, Open>,
    next: AtomicU64,
    /// Counts blocks evicted; shared, because counters outlive a planner.
    evicted: Arc<AtomicU64>,
}

/// What must stay until a plan is settled.
enum Open {
    Store { writing: Writing, present: Held<Lru> },
    Load { _lease: Lease },
}

/// A plan to store, and why some blocks are not in it.
pub struct StorePlan {
    /// The copies.
    pub plan: Plan,
    /// Blocks that were ready already.
    pub ready: BlockMask,
    /// How many blocks another plan is storing.
    pub pending: usize,
    /// How many blocks found no room.
    pub refused: usize,
}

impl Planner {
    /// Plans for the slots of `slots`, and counts evictions in `evicted`.
    #[must_use]
    pub fn new(slots: SlotPool, marks: Watermarks, evicted: Arc<AtomicU64>) -> Self {
        Self {
            index: Arc::new(Index::new(slots.clone())),
            slots,
            marks,
            sweeping: AtomicBool::new(false),
            open: DashMap::new(),
            next: AtomicU64::new(1),
            evicted,
        }
    }

    /// Slots that it plans for.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots.total()
    }

    /// The index.
    #[must_use]
    pub const fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Plans to store the blocks that are not there. Room is made by eviction; blocks that find none are left out, the
    /// tail first.
    pub fn plan_store(&self, keys: Keys<'_>) -> StorePlan {
        self.plan_store_on(keys, &[])
    }

    /// As [`plan_store`](Self::plan_store), on terms for each key; without, on the usual ones. They hold for blocks that are
    /// there as well.
    pub fn plan_store_on(&self, keys: Keys<'_>, terms: &[Terms]) -> StorePlan {
        let reserved = self.index.reserve_on(keys, terms);
        let wanted = reserved.reservation.len();
        let writing = reserved.reservation.begin(self.room(wanted));
        let refused = wanted - writing.len();
        let steps = writing.steps().map(|(page, slot)| Step { slot, page }).collect();
        let plan = self.open(Kind::Save, steps, Open::Store { writing, present: reserved.held });
        StorePlan { plan, ready: reserved.ready, pending: reserved.pending, refused }
    }

    /// Plans to load the blocks that are there; the mask says which.
    pub fn plan_load(&self, keys: Keys<'_>) -> (Plan, BlockMask) {
        let (lease, mask) = self.index.lease_each(keys);
        let pages = (0..keys.len() as u32).filter(|&page| mask.get(page as usize));
        let steps = pages.zip(lease.slots()).map(|(page, &slot): (u32, &SlotId)| Step { slot, page }).collect();
        (self.open(Kind::Load, steps, Open::Load { _lease: lease }), mask)
    }

    /// Takes slots for the blocks that are not there, to be filled one by one: position among the keys, and slot. Blocks that
    /// find no room are left out, the tail first.
    pub fn plan_promotion(&self, keys: Keys<'_>) -> Vec<(u32, SlotId, Writing)> {
        let reserved = self.index.reserve(keys);
        let wanted = reserved.reservation.len();
        let writing = reserved.reservation.begin(self.room(wanted));
        writing
            .split()
            .into_iter()
            .filter_map(|single| {
                let (position, slot) = single.steps().next()?;
                Some((position, slot, single))
            })
            .collect()
    }

    /// Plans to load the blocks of `lease`, and holds it until the plan is settled.
    pub fn plan_leased(&self, lease: Lease) -> TicketId {
        self.open(Kind::Load, Vec::new(), Open::Load { _lease: lease }).ticket
    }

    /// Ends a plan: a store that succeeded becomes visible, one that failed leaves nothing; a load's leases end. Returns
    /// how many blocks became visible. A plan is settled once; a second call does nothing.
    pub fn settle(&self, ticket: TicketId, succeeded: bool) -> usize {
        match self.open.remove(&ticket) {
            Some((_, Open::Store { writing, present })) if succeeded => {
                let visible = writing.publish();
                // Only now, so that the head of the prefix is used more recently than the tail that was stored.
                drop(present);
                visible
            }
            _ => 0,
        }
    }

    /// Number of plans that are not settled.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.open.len()
    }

    /// Numbers of the index at this moment.
    #[must_use]
    pub fn index_stats(&self) -> IndexStats {
        self.index.stats()
    }

    /// A number that no other plan has.
    #[must_use]
    pub fn ticket(&self) -> TicketId {
        TicketId(self.next.fetch_add(1, Ordering::Relaxed))
    }

    fn open(&self, kind: Kind, steps: Vec<Step>, open: Open) -> Plan {
        let ticket = self.ticket();
        self.open.insert(ticket, open);
        Plan { ticket, kind, steps }
    }

    /// Claims up to `needed` slots, evicting for what is missing and for the watermarks. When nothing may go it answers at
    /// once with what is free.
    fn room(&self, needed: usize) -> Vec<SlotClaim> {
        if needed == 0 {
            return Vec::new();
        }
        let victims = self.sweep(needed);
        let mut claims = self.slots.claim_many(needed);
        let short = needed - claims.len();
        let mut victims = self.top_up(victims, short);
        let reuse = victims.split_off(victims.len() - short.min(victims.len()));
        claims.extend(reuse);
        self.slots.return_many(victims);
        // Neighbours among them follow each other, and are copied together.
        claims.sort_unstable_by_key(SlotClaim::id);
        claims
    }

    /// Evicts what the watermarks ask for.
    fn sweep(&self, needed: usize) -> Vec<SlotClaim> {
        let used = self.slots.total() - self.slots.free();
        let (count, goes_on) = self.marks.victims(used, needed, self.sweeping.load(Ordering::Relaxed));
        self.sweeping.store(goes_on, Ordering::Relaxed);
        self.evict(count)
    }

    /// Evicts until `victims` cover `short`, as far as anything may go.
    fn top_up(&self, mut victims: Vec<SlotClaim>, short: usize) -> Vec<SlotClaim> {
        if short > victims.len() {
            victims.extend(self.evict(short - victims.len()));
        }
        victims
    }

    fn evict(&self, count: usize) -> Vec<SlotClaim> {
        let victims = self.index.evict(count);
        self.evicted.fetch_add(victims.len() as u64, Ordering::Relaxed);
        victims
    }
}
