//! Blocks on their way up, and who waits for them.

use std::collections::HashMap;
use std::time::Instant;

use super::{Below, Counts, Packed};
use crate::index::{Index, Writing};
use crate::key::{BlockKey, Keys};
use crate::lease::Lease;
use crate::sync::{Arc, Condvar, Mutex, Ordering};
use crate::tier::host::SlotId;
use crate::tier::{Landing, Want};

pub(super) type Coming = Mutex<HashMap<BlockKey, Arc<Wave>>>;

/// Blocks of a prefix that are only in a lower tier, found but not yet asked for. Once started they become visible one by one;
/// until this is released or dropped, those that are there already and those that have come are not evicted.
#[must_use = "dropping this lets the blocks be evicted"]
pub struct Promotion {
    below: Arc<Below>,
    keys: Mutex<Packed>,
    /// Positions of the wanted blocks among the keys that were asked about, ascending.
    wanted: Vec<u32>,
    wave: Arc<Wave>,
    /// Of the same prefix, on what is there already.
    head: Mutex<Option<Lease>>,
}

impl Promotion {
    pub(super) fn new(below: &Arc<Below>, keys: Keys<'_>, wanted: Vec<u32>, head: Lease) -> Self {
        let packed = wanted.iter().map(|&at| *keys.get(at as usize).as_bytes()).collect();
        let wave = Arc::new(Wave::new(Instant::now() + below.deadline));
        Self { below: Arc::clone(below), keys: Mutex::new(packed), wanted, wave, head: Mutex::new(Some(head)) }
    }

    /// The work that starts it; a second time there is nothing left of it.
    pub(super) fn start(&self) -> Ascent {
        let until = Instant::now() + self.below.deadline;
        let keys = std::mem::take(&mut *self.keys.lock());
        self.wave.progress.lock().until = until;
        Ascent { keys, start: Start::of(&self.wave) }
    }

    /// Number of blocks that are wanted from below.
    #[must_use]
    pub fn len(&self) -> usize {
        self.wanted.len()
    }

    /// Whether nothing is wanted; there is no such promotion.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// How many of the first `count` blocks that were asked about are wanted from below.
    #[must_use]
    pub fn among(&self, count: usize) -> usize {
        self.wanted.partition_point(|&at| (at as usize) < count)
    }

    /// Whether blocks may still come in time.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        !self.wave.is_late() && self.wave.is_moving()
    }

    /// Whether its time was over before it had ended.
    #[must_use]
    pub fn is_late(&self) -> bool {
        self.wave.is_late() && self.wave.is_moving()
    }

    /// Seconds that it should take, by how fast blocks came up lately; `None` if that is not known.
    #[must_use]
    pub fn seconds(&self) -> Option<f64> {
        let speed = self.below.counts.speed.lately(Instant::now())?;
        Some((self.len() * self.below.block_bytes) as f64 / speed)
    }

    /// Lets the blocks be evicted, also those that are still to come.
    pub fn release(&self) {
        let head = self.head.lock().take();
        let held = self.wave.progress.lock().held.take();
        drop((head, held));
    }

    /// Returns when the blocks are there or their time is over.
    pub(super) fn wait(&self) {
        self.wave.wait();
    }
}

/// A promotion that is to begin.
pub(super) struct Ascent {
    keys: Packed,
    start: Start,
}

impl Drop for Promotion {
    fn drop(&mut self) {
        self.release();
        // Nobody asks any more. Kept, they would keep those that they waited for, and so on.
        let others = std::mem::take(&mut self.wave.progress.lock().others);
        drop(others);
    }
}

impl Ascent {
    pub(super) fn until(&self) -> Instant {
        self.start.0.until()
    }
}

/// Counts as a block of its wave that has not ended, so that nobody takes one that has not begun for one that is over.
struct Start(Arc<Wave>);

impl Start {
    fn of(wave: &Arc<Wave>) -> Self {
        wave.progress.lock().left += 1;
        Self(Arc::clone(wave))
    }
}

impl Drop for Start {
    fn drop(&mut self) {
        self.0.ended();
    }
}

/// The blocks of one promotion.
pub(super) struct Wave {
    progress: Mutex<Progress>,
    changed: Condvar,
}

struct Progress {
    until: Instant,
    /// Blocks that have not ended.
    left: usize,
    /// Promotions that bring blocks which this one wants too.
    others: Vec<Arc<Wave>>,
    /// On what has landed; `None` once it was released.
    held: Option<Vec<Lease>>,
}

impl Wave {
    fn new(until: Instant) -> Self {
        let progress = Progress { until, left: 0, others: Vec::new(), held: Some(Vec::new()) };
        Self { progress: Mutex::new(progress), changed: Condvar::new() }
    }

    pub(super) fn until(&self) -> Instant {
        self.progress.lock().until
    }

    pub(super) fn is_late(&self) -> bool {
        Instant::now() >= self.until()
    }

    /// Whether a block of it, or one that it waits for, has not ended.
    fn is_moving(&self) -> bool {
        let progress = self.progress.lock();
        let others = progress.others.clone();
        let own = progress.left > 0;
        drop(progress);
        own || others.iter().any(|other| other.progress.lock().left > 0)
    }

    fn wait(&self) {
        let until = self.until();
        self.wait_own(until);
        let others = self.progress.lock().others.clone();
        others.iter().for_each(|other| other.wait_own(until));
    }

    fn wait_own(&self, until: Instant) {
        let mut progress = self.progress.lock();
        while progress.left > 0 && !self.changed.wait_until(&mut progress, until).timed_out() {}
    }

    /// Keeps a lease, unless nobody wants it any more. Ended outside of the lock.
    fn hold(&self, lease: Lease) {
        let mut progress = self.progress.lock();
        let rest = match &mut progress.held {
            Some(held) => {
                held.push(lease);
                None
            }
            None => Some(lease),
        };
        drop(progress);
        drop(rest);
    }

    fn ended(&self) {
        self.progress.lock().left -= 1;
        self.changed.notify_all();
    }
}

/// The blocks of one call to the tier: how many came, and in what time.
struct Batch {
    counts: Arc<Counts>,
    begun: Instant,
    block_bytes: usize,
    blocks: usize,
    landed: Mutex<usize>,
}

impl Drop for Batch {
    fn drop(&mut self) {
        let landed = *self.landed.get_mut();
        self.counts.promoted.fetch_add(landed as u64, Ordering::Relaxed);
        self.counts.lost.fetch_add((self.blocks - landed) as u64, Ordering::Relaxed);
        if landed > 0 {
            let now = Instant::now();
            self.counts.speed.add((landed * self.block_bytes) as f64, now - self.begun, now);
        }
    }
}

/// A block on its way into its slot.
struct Arrival {
    key: BlockKey,
    slot: SlotId,
    writing: Option<Writing>,
    index: Arc<Index>,
    wave: Arc<Wave>,
    coming: Arc<Coming>,
    batch: Arc<Batch>,
}

impl Landing for Arrival {
    fn slot(&self) -> SlotId {
        self.slot
    }

    fn land(mut self: Box<Self>) {
        let Some(writing) = self.writing.take() else { return };
        if writing.publish() > 0 {
            let packed = [*self.key.as_bytes()];
            let (lease, _) = self.index.lease_each(Keys::from_slices(&packed));
            self.wave.hold(lease);
            *self.batch.landed.lock() += 1;
        }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        drop(self.writing.take());
        // From here on somebody else may bring it, and be in the list.
        let mut coming = self.coming.lock();
        if coming.get(&self.key).is_some_and(|wave| Arc::ptr_eq(wave, &self.wave)) {
            coming.remove(&self.key);
        }
        drop(coming);
        self.wave.ended();
    }
}

/// Takes slots for up to `most` blocks of `ascent` that nobody else is bringing; of the rest, notes whom to wait for.
pub(super) fn wants(below: &Below, ascent: &Ascent, most: usize) -> Vec<Want> {
    let Ascent { keys, start } = ascent;
    let keys = Keys::from_slices(&keys[..most.min(keys.len())]);
    let wave = &start.0;
    let mut coming = below.coming.lock();
    let mut others: Vec<_> = keys.iter().filter_map(|key| coming.get(&key).cloned()).collect();
    others.dedup_by(|a, b| Arc::ptr_eq(a, b));
    let places = below.planner.plan_promotion(keys);
    {
        let mut progress = wave.progress.lock();
        progress.left += places.len();
        if progress.held.is_some() {
            progress.others = others;
        }
    }
    let batch = Arc::new(Batch {
        counts: Arc::clone(&below.counts),
        begun: Instant::now(),
        block_bytes: below.block_bytes,
        blocks: places.len(),
        landed: Mutex::default(),
    });
    let want = |(position, slot, writing): (u32, SlotId, Writing)| {
        let key = keys.get(position as usize);
        coming.insert(key, Arc::clone(wave));
        let arrival = Arrival {
            key,
            slot,
            writing: Some(writing),
            index: Arc::clone(below.planner.index()),
            wave: Arc::clone(wave),
            coming: Arc::clone(&below.coming),
            batch: Arc::clone(&batch),
        };
        Want { key, landing: Box::new(arrival) }
    };
    places.into_iter().map(want).collect()
}
