//! Which slots of an arena are free. Numbers only: no bytes are reached from here.

use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Arc, Mutex};

/// The number of one slot in its arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

/// The free slots of one arena; clones share them.
///
/// They are handed out round and round in ascending order, so that blocks which come one after the other lie side by side,
/// also when the arena is full: what is evicted first was handed out first. Neighbours are copied together.
#[derive(Debug, Clone)]
pub struct SlotPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    total: u32,
    /// Copy of `State::free`, written under the lock and read without it.
    free: AtomicU32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: u32,
    /// One bit for each slot, set if it is free.
    words: Vec<u64>,
    /// One bit for each word that is not 0.
    summary: Vec<u64>,
    /// Where the search for the next slot begins.
    next: u32,
}

/// The exclusive right to one slot, given back on drop.
///
/// It cannot be copied, so no slot has two holders.
#[derive(Debug)]
pub struct SlotClaim {
    /// None only after [`SlotPool::return_many`] has taken the slot out.
    pool: Option<Arc<Shared>>,
    id: SlotId,
}

impl SlotPool {
    /// A pool of the slots 0 to `count - 1`, all free.
    pub fn new(count: u32) -> SlotPool {
        let state = Mutex::new(State::all_free(count));
        SlotPool { shared: Arc::new(Shared { total: count, free: AtomicU32::new(count), state }) }
    }

    /// One free slot, or `None` if there is none.
    pub fn claim(&self) -> Option<SlotClaim> {
        let id = self.shared.with(State::take);
        id.map(|id| self.claim_of(id))
    }

    /// Up to `n` free slots under one lock; fewer if fewer are free.
    pub fn claim_many(&self, n: usize) -> Vec<SlotClaim> {
        let ids: Vec<u32> = self.shared.with(|state| (0..n).map_while(|_| state.take()).collect());
        ids.into_iter().map(|id| self.claim_of(id)).collect()
    }

    /// Gives back many slots under one lock. Claims of another pool go back to theirs.
    pub fn return_many(&self, claims: Vec<SlotClaim>) {
        let mut own = Vec::with_capacity(claims.len());
        for mut claim in claims {
            if claim.pool.as_ref().is_some_and(|pool| Arc::ptr_eq(pool, &self.shared)) {
                claim.pool = None;
                own.push(claim.id.0);
            }
        }
        self.shared.with(|state| own.into_iter().for_each(|id| state.give(id)));
    }

    /// Slots in all.
    pub fn total(&self) -> usize {
        self.shared.total as usize
    }

    /// Free slots. Takes no lock, so another thread's claim may not be seen yet.
    pub fn free(&self) -> usize {
        self.shared.free.load(Ordering::Relaxed) as usize
    }

    /// Length of the longest run of neighbouring free slots. Looks at every slot: for statistics.
    pub fn largest_free_run(&self) -> usize {
        let words = self.shared.state.lock().words.clone();
        let (mut longest, mut run) = (0, 0);
        for id in 0..self.total() {
            run = if words[id / 64] >> (id % 64) & 1 == 1 { run + 1 } else { 0 };
            longest = longest.max(run);
        }
        longest
    }

    fn claim_of(&self, id: u32) -> SlotClaim {
        SlotClaim { pool: Some(Arc::clone(&self.shared)), id: SlotId(id) }
    }
}

impl SlotClaim {
    /// The slot that is claimed.
    pub fn id(&self) -> SlotId {
        self.id
    }
}

impl Drop for SlotClaim {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.with(|state| state.give(self.id.0));
        }
    }
}

impl Shared {
    /// Runs `change` under the lock and publishes the new free count before the lock is released.
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock();
        let out = change(&mut state);
        self.free.store(state.free, Ordering::Relaxed);
        out
    }
}

impl State {
    fn all_free(count: u32) -> State {
        let words = bits(count as usize);
        State { free: count, summary: bits(words.len()), words, next: 0 }
    }

    fn take(&mut self) -> Option<u32> {
        let id = self.first_from(self.next).or_else(|| self.first_from(0))?;
        let word = &mut self.words[id as usize / 64];
        *word &= !(1 << (id % 64));
        if *word == 0 {
            self.summary[id as usize / 4096] &= !(1 << (id / 64 % 64));
        }
        (self.free, self.next) = (self.free - 1, id + 1);
        Some(id)
    }

    fn give(&mut self, id: u32) {
        let word = &mut self.words[id as usize / 64];
        debug_assert!(*word >> (id % 64) & 1 == 0, "slot {id} is given back twice");
        *word |= 1 << (id % 64);
        self.summary[id as usize / 4096] |= 1 << (id / 64 % 64);
        self.free += 1;
    }

    /// The first free slot that is not below `id`.
    fn first_from(&self, id: u32) -> Option<u32> {
        let (at, bit) = (id as usize / 64, id % 64);
        let here = self.words.get(at)? >> bit << bit;
        if here != 0 {
            return Some(at as u32 * 64 + here.trailing_zeros());
        }
        let (mut group, bit) = ((at + 1) / 64, (at + 1) % 64);
        let mut busy = self.summary.get(group)? >> bit << bit;
        while busy == 0 {
            group += 1;
            busy = *self.summary.get(group)?;
        }
        let at = group * 64 + busy.trailing_zeros() as usize;
        Some(at as u32 * 64 + self.words[at].trailing_zeros())
    }
}

/// Words with `count` bits that are set, and no others.
fn bits(count: usize) -> Vec<u64> {
    let mut words = vec![u64::MAX; count.div_ceil(64)];
    if let Some(last) = words.last_mut().filter(|_| !count.is_multiple_of(64)) {
        *last = (1 << (count % 64)) - 1;
    }
    words
}
