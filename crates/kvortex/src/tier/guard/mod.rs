//! Keeps a tier that hangs or fails from costing anybody time or slots: a wrapper of any tier, which is a tier itself.
//!
//! A tier is trusted to keep its deadlines, but it may stand on a server or a library that does not. What it was asked for and has
//! not given by the deadline, while nothing else came from it either, is a fault, and so is a batch of which nothing landed while
//! the tier counted errors. After a few faults in a row the tier is not asked: lookups are misses, offers are dropped. After a while
//! one try decides. The slots that a hanging tier can hold on to are bounded.

pub(crate) mod breaker;

use std::time::{Duration, Instant};

use breaker::{Breaker, Turn};

use crate::key::Keys;
use crate::mask::BlockMask;
use crate::sync::{Arc, AtomicU64, AtomicUsize, Mutex, Ordering};
use crate::tier::host::SlotId;
use crate::tier::{Landing, Offer, Put, Tier, TierStats, Want};

/// A call that was given less than this says nothing of the tier.
const SLOW: Duration = Duration::from_millis(50);

/// How much is put up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuardOptions {
    /// Faults in a row after which the tier is not asked for a while.
    pub patience: u32,
    /// Blocks that may be on their way up at once.
    pub most_wanted: usize,
}

impl Default for GuardOptions {
    fn default() -> Self {
        Self { patience: 4, most_wanted: 4096 }
    }
}

/// A guarded tier.
pub struct Guard {
    inner: Arc<dyn Tier>,
    watch: Arc<Watch>,
    options: GuardOptions,
    misses: AtomicU64,
    dropped: AtomicU64,
}

/// What is known of how the tier is doing.
struct Watch {
    name: &'static str,
    breaker: Mutex<Breaker>,
    /// Batches that have not been judged.
    batches: Mutex<Vec<Arc<Batch>>>,
    wanted: AtomicUsize,
    /// Errors of the tier when it was last looked at.
    errors: AtomicU64,
}

/// Blocks that were asked for together.
struct Batch {
    asked: Instant,
    deadline: Instant,
    left: AtomicUsize,
    landed: AtomicUsize,
}

/// A landing that is told of.
struct Watched {
    inner: Option<Box<dyn Landing>>,
    batch: Arc<Batch>,
    watch: Arc<Watch>,
}

impl Landing for Watched {
    fn slot(&self) -> SlotId {
        self.inner.as_ref().map_or(SlotId(u32::MAX), |inner| inner.slot())
    }

    fn land(mut self: Box<Self>) {
        self.batch.landed.fetch_add(1, Ordering::Relaxed);
        self.watch.tell(true);
        if let Some(inner) = self.inner.take() {
            inner.land();
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        drop(self.inner.take());
        self.watch.wanted.fetch_sub(1, Ordering::AcqRel);
        self.batch.left.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Watch {
    fn tell(&self, well: bool) {
        let turn = if well { self.breaker.lock().success() } else { self.breaker.lock().fault() };
        match turn {
            Turn::Same => {}
            Turn::Failing => log::warn!("the {} tier fails: it is left alone for a while, and tried again", self.name),
            Turn::Recovered => log::info!("the {} tier works again", self.name),
        }
    }

    /// Counts what has gone wrong since the last look.
    fn judge(&self, tier: &dyn Tier) {
        let (mut late, mut empty) = (0, false);
        self.batches.lock().retain(|batch| {
            let over = batch.left.load(Ordering::Acquire) == 0;
            if over {
                empty |= batch.landed.load(Ordering::Relaxed) == 0;
            } else if batch.is_late() {
                late += usize::from(!self.breaker.lock().has_succeeded_since(batch.asked));
            }
            !over && !batch.is_late()
        });
        (0..late).for_each(|_| self.tell(false));
        if empty {
            let errors = tier.stats().errors;
            if self.errors.swap(errors, Ordering::Relaxed) < errors {
                self.tell(false);
            }
        }
    }
}

impl Batch {
    fn is_late(&self) -> bool {
        Instant::now() > self.deadline && self.asked.elapsed() > SLOW
    }
}

impl Guard {
    /// Stands before `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn Tier>, options: GuardOptions) -> Self {
        let watch = Watch {
            name: inner.name(),
            breaker: Mutex::new(Breaker::new(options.patience)),
            batches: Mutex::default(),
            wanted: AtomicUsize::new(0),
            errors: AtomicU64::new(0),
        };
        Self { inner, watch: Arc::new(watch), options, misses: AtomicU64::new(0), dropped: AtomicU64::new(0) }
    }

    /// Whether the tier is to be asked now.
    fn asks(&self) -> bool {
        self.watch.judge(&*self.inner);
        self.watch.breaker.lock().is_open()
    }

    /// Makes a call that must be back by `deadline`.
    fn in_time<T>(&self, deadline: Instant, call: impl FnOnce() -> T) -> Option<T> {
        let batch = Batch { asked: Instant::now(), deadline, left: AtomicUsize::new(0), landed: AtomicUsize::new(0) };
        let answer = call();
        if batch.is_late() {
            self.watch.tell(false);
            return None;
        }
        Some(answer)
    }

    /// How many of `count` blocks may still be asked for.
    fn reserve(&self, count: usize) -> usize {
        let most = self.options.most_wanted;
        let take = |wanted: usize| Some(wanted + count.min(most.saturating_sub(wanted)));
        let before = self.watch.wanted.fetch_update(Ordering::AcqRel, Ordering::Acquire, take);
        before.map_or(0, |before| count.min(most.saturating_sub(before)))
    }

    fn watched(&self, wants: Vec<Want>, deadline: Instant) -> Vec<Want> {
        let (left, landed) = (AtomicUsize::new(wants.len()), AtomicUsize::new(0));
        let batch = Arc::new(Batch { asked: Instant::now(), deadline, left, landed });
        self.watch.batches.lock().push(Arc::clone(&batch));
        let watch = |Want { key, landing }| {
            let (batch, watch) = (Arc::clone(&batch), Arc::clone(&self.watch));
            Want { key, landing: Box::new(Watched { inner: Some(landing), batch, watch }) }
        };
        wants.into_iter().map(watch).collect()
    }
}

impl Tier for Guard {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn contains(&self, keys: Keys<'_>, deadline: Instant) -> BlockMask {
        let found = if self.asks() { self.in_time(deadline, || self.inner.contains(keys, deadline)) } else { None };
        found.unwrap_or_else(|| BlockMask::new(keys.len()))
    }

    fn put(&self, offers: Vec<Offer>) -> Vec<Put> {
        if self.asks() {
            return self.inner.put(offers);
        }
        self.dropped.fetch_add(offers.len() as u64, Ordering::Relaxed);
        vec![Put::Dropped; offers.len()]
    }

    fn get(&self, mut wants: Vec<Want>, deadline: Instant) {
        let count = if self.asks() { self.reserve(wants.len()) } else { 0 };
        self.misses.fetch_add((wants.len() - count) as u64, Ordering::Relaxed);
        wants.truncate(count);
        if count > 0 {
            let wants = self.watched(wants, deadline);
            self.in_time(deadline, || self.inner.get(wants, deadline));
        }
    }

    fn remove(&self, keys: Keys<'_>, deadline: Instant) -> usize {
        self.inner.remove(keys, deadline)
    }

    fn clear(&self) -> bool {
        self.inner.clear()
    }

    fn flush(&self, patience: Duration) -> bool {
        self.inner.flush(patience)
    }

    fn stop(&self, patience: Duration) -> bool {
        self.inner.stop(patience)
    }

    fn stats(&self) -> TierStats {
        let mut stats = self.inner.stats();
        stats.misses += self.misses.load(Ordering::Relaxed);
        stats.dropped += self.dropped.load(Ordering::Relaxed);
        stats.failing |= self.watch.breaker.lock().is_failing();
        stats
    }
}
