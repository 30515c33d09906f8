//! Between the host tier and the one below: blocks are written through when they become ready, and promoted when they are asked
//! for. Nothing here holds a request up for longer than the deadline, and a block is visible only once the tier has verified it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::index::Writing;
use crate::key::{BlockKey, KEY_BYTES, Keys};
use crate::mask::BlockMask;
use crate::planner::Planner;
use crate::sync::{Arc, Condvar, Mutex};
use crate::tier::host::SlotId;
use crate::tier::{Landing, Offer, Tier, TierStats, Want};

/// Which blocks a caller can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Those before the first one that is nowhere.
    Prefix,
    /// Any.
    Each,
}

/// The tier below, as the engine uses it.
pub(crate) struct Lower {
    tier: Arc<dyn Tier>,
    deadline: Duration,
    /// What is on its way up, by key: whoever wants the same waits for it instead of reading it again.
    coming: Arc<Coming>,
}

type Coming = Mutex<HashMap<BlockKey, Arc<Wave>>>;

/// The blocks of one promotion.
struct Wave {
    left: Mutex<usize>,
    changed: Condvar,
}

/// A block on its way into its slot.
struct Arrival {
    key: BlockKey,
    slot: SlotId,
    writing: Option<Writing>,
    wave: Arc<Wave>,
    coming: Arc<Coming>,
}

impl Landing for Arrival {
    fn slot(&self) -> SlotId {
        self.slot
    }

    fn land(mut self: Box<Self>) {
        if let Some(writing) = self.writing.take() {
            writing.publish();
        }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        drop(self.writing.take());
        self.coming.lock().remove(&self.key);
        *self.wave.left.lock() -= 1;
        self.wave.changed.notify_all();
    }
}

impl Wave {
    fn wait(&self, until: Instant) {
        let mut left = self.left.lock();
        while *left > 0 && !self.changed.wait_until(&mut left, until).timed_out() {}
    }
}

impl Lower {
    #[cfg(not(shuttle))]
    pub(crate) fn new(tier: Arc<dyn Tier>, deadline: Duration) -> Self {
        Self { tier, deadline, coming: Arc::default() }
    }

    pub(crate) fn stats(&self) -> TierStats {
        self.tier.stats()
    }

    /// Offers what is ready of `keys`. The blocks keep their slots until the tier has them or gives them up.
    pub(crate) fn offer(&self, planner: &Planner, keys: Keys<'_>) {
        let (lease, ready) = planner.index().lease_each(keys);
        let slots = lease.slots().to_vec();
        let keep: Arc<dyn std::any::Any + Send + Sync> = Arc::new(lease);
        let ready = keys.iter().enumerate().filter(|&(i, _)| ready.get(i));
        let offers = ready.zip(slots).map(|((_, key), slot)| Offer { key, slot, keep: Arc::clone(&keep) });
        self.tier.put(offers.collect());
    }

    /// Which of `keys` the tier seems to have.
    pub(crate) fn contains(&self, keys: Keys<'_>) -> BlockMask {
        self.tier.contains(keys, Instant::now() + self.deadline)
    }

    /// Brings up what is wanted of `keys` and only below, and returns when it is there or its time is over.
    pub(crate) fn promote(&self, planner: &Planner, keys: Keys<'_>, reach: Reach) {
        let until = Instant::now() + self.deadline;
        let wanted = self.wanted(planner, keys, reach);
        if wanted.is_empty() {
            return;
        }
        // Or room for the tail of a prefix could be made by evicting its head.
        let (_head, _) = planner.index().lease_each(keys);
        let (wave, others, wants) = self.start(planner, Keys::from_slices(&wanted));
        self.tier.get(wants, until);
        wave.wait(until);
        others.iter().for_each(|other| other.wait(until));
    }

    fn wanted(&self, planner: &Planner, keys: Keys<'_>, reach: Reach) -> Vec<[u8; KEY_BYTES]> {
        let ready = planner.index().ready_mask(keys);
        if ready.count() == keys.len() {
            return Vec::new();
        }
        let below = self.contains(keys);
        let end = match reach {
            Reach::Each => keys.len(),
            Reach::Prefix => (0..keys.len()).find(|&i| !ready.get(i) && !below.get(i)).unwrap_or(keys.len()),
        };
        (0..end).filter(|&i| !ready.get(i) && below.get(i)).map(|i| *keys.get(i).as_bytes()).collect()
    }

    /// Takes slots for what nobody else is bringing; for the rest, whom to wait for.
    fn start(&self, planner: &Planner, keys: Keys<'_>) -> (Arc<Wave>, Vec<Arc<Wave>>, Vec<Want>) {
        let mut coming = self.coming.lock();
        let mut others: Vec<_> = keys.iter().filter_map(|key| coming.get(&key).cloned()).collect();
        others.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let places = planner.plan_promotion(keys);
        let wave = Arc::new(Wave { left: Mutex::new(places.len()), changed: Condvar::new() });
        let want = |(position, slot, writing): (u32, SlotId, Writing)| {
            let key = keys.get(position as usize);
            coming.insert(key, Arc::clone(&wave));
            let (wave, coming) = (Arc::clone(&wave), Arc::clone(&self.coming));
            Want { key, landing: Box::new(Arrival { key, slot, writing: Some(writing), wave, coming }) }
        };
        let wants = places.into_iter().map(want).collect();
        (wave, others, wants)
    }

    /// Forgets everything for good. False if that cannot be promised.
    pub(crate) fn clear(&self) -> bool {
        self.tier.clear()
    }

    /// Waits until what was offered is kept or given up.
    pub(crate) fn flush(&self, patience: Duration) -> bool {
        self.tier.flush(patience)
    }

    pub(crate) fn stop(&self, patience: Duration) -> bool {
        self.tier.stop(patience)
    }
}
