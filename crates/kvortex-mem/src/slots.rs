//! Which slots of an arena are free. Numbers only: no bytes are reached from here.

use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Arc, Mutex};

/// The number of one slot in its arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

/// The free slots of one arena; clones share them.
///
/// Fresh slots are handed out in ascending order; a slot that was given back is handed out again before any fresh one, the
/// latest first, because its bytes are the likeliest to be in a cache.
#[derive(Debug, Clone)]
pub struct SlotPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    total: u32,
    /// Copy of `State::free()`, written under the lock and read without it.
    free: AtomicU32,
    state: Mutex<State>,
}

/// A slot is free exactly if it is in `returned` or not below `fresh`; `returned` holds no number twice.
#[derive(Debug)]
struct State {
    fresh: u32,
    returned: Vec<u32>,
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
        let state = Mutex::new(State { fresh: 0, returned: Vec::new() });
        SlotPool { shared: Arc::new(Shared { total: count, free: AtomicU32::new(count), state }) }
    }

    /// One free slot, or `None` if there is none.
    pub fn claim(&self) -> Option<SlotClaim> {
        let id = self.shared.with(|state, total| state.take(total));
        id.map(|id| self.claim_of(id))
    }

    /// Up to `n` free slots under one lock; fewer if fewer are free.
    pub fn claim_many(&self, n: usize) -> Vec<SlotClaim> {
        let ids = self.shared.with(|state, total| {
            let n = n.min(state.free(total) as usize);
            let mut ids = Vec::with_capacity(n);
            ids.extend((0..n).map_while(|_| state.take(total)));
            ids
        });
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
        // Reversed, because the last one in is the first one out: neighbours come back in ascending order.
        self.shared.with(|state, _| state.returned.extend(own.into_iter().rev()));
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
        let (fresh, returned) = {
            let state = self.shared.state.lock();
            (state.fresh, state.returned.clone())
        };
        longest_run(self.shared.total, fresh, &returned)
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
            pool.with(|state, _| state.returned.push(self.id.0));
        }
    }
}

impl Shared {
    /// Runs `change` under the lock and publishes the new free count before the lock is released.
    fn with<T>(&self, change: impl FnOnce(&mut State, u32) -> T) -> T {
        let mut state = self.state.lock();
        let out = change(&mut state, self.total);
        self.free.store(state.free(self.total), Ordering::Relaxed);
        out
    }
}

impl State {
    fn free(&self, total: u32) -> u32 {
        debug_assert!(self.returned.len() <= self.fresh as usize);
        // `returned` holds distinct numbers below `fresh`, so its length fits.
        total - self.fresh + self.returned.len() as u32
    }

    fn take(&mut self, total: u32) -> Option<u32> {
        if let Some(id) = self.returned.pop() {
            return Some(id);
        }
        let id = self.fresh;
        (id < total).then(|| {
            self.fresh += 1;
            id
        })
    }
}

fn longest_run(total: u32, fresh: u32, returned: &[u32]) -> usize {
    let mut used = vec![true; fresh as usize];
    for &id in returned {
        used[id as usize] = false;
    }
    let (mut longest, mut run) = (0, 0);
    for &taken in &used {
        run = if taken { 0 } else { run + 1 };
        longest = longest.max(run);
    }
    longest.max(run + (total - fresh) as usize)
}
