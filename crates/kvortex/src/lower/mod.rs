//! Between the host tier and the one below: blocks are written through when they become ready, and promoted when they are asked
//! for. Nothing here holds a request up for longer than the deadline, and a block is visible only once the tier has verified it.
#![cfg_attr(shuttle, expect(dead_code, reason = "there are no files in a model, so nothing is below"))]

mod desk;
mod promotion;
mod speed;
mod waiting;

use std::time::{Duration, Instant};

use crate::key::{KEY_BYTES, Keys};
use crate::mask::BlockMask;
use crate::planner::Planner;
use crate::sync::{Arc, AtomicU64, Ordering};
use crate::tier::{Offer, Tier, TierStats};

#[cfg(not(shuttle))]
use desk::Desk;
use desk::Job;
pub use promotion::Promotion;
use promotion::{Ascent, Coming};
use speed::Speed;
use waiting::Waiting;

/// Which blocks a caller can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Those before the first one that is nowhere.
    Prefix,
    /// Any.
    Each,
}

/// Keys looked at in the first step of a search; every next step looks at four times as many.
const FIRST_WINDOW: usize = 16;

/// One in so many slots is left for other blocks while some are on their way up, and may be held by blocks that wait to be
/// offered.
const SHARE: usize = 4;

/// The tier below, as planners use it.
pub(crate) struct Lower {
    below: Arc<Below>,
    /// Where callers who must not wait hand their work to.
    desk: desk::Desk,
    waiting: Waiting,
}

/// What is below, and on its way.
struct Below {
    tier: Arc<dyn Tier>,
    planner: Arc<Planner>,
    /// Bytes of a block, all rows.
    block_bytes: usize,
    deadline: Duration,
    /// What is on its way up, by key: whoever wants the same waits for it instead of reading it again.
    coming: Arc<Coming>,
    /// Held while blocks begin to go down or up, and throughout a reset, so that none that was there before comes after.
    gate: parking_lot::Mutex<()>,
    /// Counts resets. What was leased before one is not offered after it.
    epoch: AtomicU64,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    promoted: AtomicU64,
    /// Wanted, and not there when their promotion ended.
    lost: AtomicU64,
    /// Never offered, since too many waited.
    unoffered: AtomicU64,
    speed: Speed,
}

/// Numbers of what goes up and down, since the tier was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LowerStats {
    /// Of the tier itself.
    pub tier: TierStats,
    /// Blocks that came up.
    pub promoted_blocks: u64,
    /// Their bytes, of all rows.
    pub promoted_bytes: u64,
    /// Blocks that were to come up and did not.
    pub lost_blocks: u64,
    /// Blocks that were not even offered to the tier, since too many waited.
    pub unoffered_blocks: u64,
    /// How fast blocks came up lately, in bytes a second; `None` if that is not known.
    pub bytes_per_second: Option<f64>,
}

impl Lower {
    #[cfg(not(shuttle))]
    pub(crate) fn new(
        tier: Arc<dyn Tier>,
        planner: Arc<Planner>,
        block_bytes: usize,
        deadline: Duration,
    ) -> crate::error::Result<Self> {
        let offered = (planner.slots() / SHARE).max(1);
        let below = Arc::new(Below {
            tier,
            planner,
            block_bytes,
            deadline,
            coming: Arc::default(),
            gate: parking_lot::Mutex::default(),
            epoch: AtomicU64::new(0),
            counts: Arc::default(),
        });
        Ok(Self { desk: Desk::open(&below, offered)?, below, waiting: Waiting::default() })
    }

    pub(crate) fn stats(&self) -> LowerStats {
        let Below { tier, counts, block_bytes, .. } = &*self.below;
        let promoted_blocks = counts.promoted.load(Ordering::Relaxed);
        LowerStats {
            tier: tier.stats(),
            promoted_blocks,
            promoted_bytes: promoted_blocks * *block_bytes as u64,
            lost_blocks: counts.lost.load(Ordering::Relaxed),
            unoffered_blocks: counts.unoffered.load(Ordering::Relaxed),
            bytes_per_second: counts.speed.lately(Instant::now()),
        }
    }

    /// Has what is ready of `keys` offered to the tier. The blocks keep their slots until the tier has them or gives them up.
    pub(crate) fn offer(&self, keys: Keys<'_>) {
        let epoch = self.below.epoch.load(Ordering::Acquire);
        let (lease, ready) = self.below.planner.index().lease_each(keys);
        let slots = lease.slots().to_vec();
        let keep: Arc<dyn std::any::Any + Send + Sync> = Arc::new(lease);
        let ready = keys.iter().enumerate().filter(|&(i, _)| ready.get(i));
        let offers = ready.zip(slots).map(|((_, key), slot)| Offer { key, slot, keep: Arc::clone(&keep) });
        self.desk.hand(Job::Offer { offers: offers.collect(), epoch });
    }

    /// Which of `keys` the tier seems to have.
    pub(crate) fn contains(&self, keys: Keys<'_>) -> BlockMask {
        self.below.contains(keys)
    }

    /// Brings up what is wanted of `keys` and only below, and returns when it is there or its time is over.
    pub(crate) fn promote(&self, keys: Keys<'_>, reach: Reach) {
        if let Some(promotion) = self.find(keys, reach) {
            self.below.begin(promotion.start());
            promotion.wait();
        }
    }

    /// What is wanted of `keys` and only below; `None` if there is nothing. Costs a look at the first keys if those are nowhere.
    pub(crate) fn find(&self, keys: Keys<'_>, reach: Reach) -> Option<Promotion> {
        let (wanted, end) = self.below.wanted(keys, reach);
        if wanted.is_empty() {
            return None;
        }
        // Or room for the tail of a prefix could be made by evicting its head.
        let (head, _) = self.below.planner.index().lease_each(keys.slice(0..end));
        Some(Promotion::new(&self.below, keys, wanted, head))
    }

    /// Has a promotion started by the thread that does so.
    pub(crate) fn start(&self, promotion: &Promotion) {
        self.desk.hand(Job::Promote(promotion.start()));
    }

    /// Starts a promotion, and has `go` called on another thread when its blocks are there or its time is over.
    pub(crate) fn after(&self, promotion: Promotion, go: impl FnOnce() + Send + 'static) {
        self.start(&promotion);
        self.waiting.add(promotion, Box::new(go));
    }

    /// Waits until all that [`after`](Self::after) was asked to call has been; with `hurry` that is at once.
    pub(crate) fn settle(&self, end: Instant, hurry: bool) -> bool {
        self.waiting.settle(end, hurry)
    }

    /// Forgets every block, in memory and below, for good. How many were visible, and false if it cannot be promised that none
    /// is found below again.
    pub(crate) fn reset(&self) -> (usize, bool) {
        let below = &self.below;
        let _gate = below.gate.lock();
        // First, so that whoever sees the new epoch finds nothing that was there before.
        let forgotten = below.planner.index().clear();
        below.epoch.fetch_add(1, Ordering::AcqRel);
        (forgotten, below.tier.clear())
    }

    /// Waits until what was ready so far is kept or given up.
    pub(crate) fn flush(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        self.desk.flush(end) && self.below.tier.flush(end.saturating_duration_since(Instant::now()))
    }

    /// Takes nothing more, and waits for what is under way.
    pub(crate) fn stop(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let over = self.desk.close(end);
        self.below.tier.stop(end.saturating_duration_since(Instant::now())) && over
    }
}

impl Drop for Lower {
    fn drop(&mut self) {
        self.stop(Duration::from_secs(5));
    }
}

/// Drops what may still wait for a tier that was stopped and has not ended, while the caller goes on.
pub(crate) fn drop_elsewhere<T: Send + 'static>(what: T) {
    // Without a thread it is dropped here.
    let _ = std::thread::Builder::new().name("kvortex-end".to_owned()).spawn(move || drop(what));
}

impl Below {
    fn contains(&self, keys: Keys<'_>) -> BlockMask {
        self.tier.contains(keys, Instant::now() + self.deadline)
    }

    /// Positions of blocks that are only below, and where the part of `keys` ends that is of use.
    fn wanted(&self, keys: Keys<'_>, reach: Reach) -> (Vec<u32>, usize) {
        let (mut wanted, mut end, mut size) = (Vec::new(), 0, FIRST_WINDOW);
        while end < keys.len() {
            let window = end..keys.len().min(end + size);
            let part = keys.slice(window.clone());
            let ready = self.planner.index().ready_mask(part);
            let below = if ready.count() == part.len() { ready.clone() } else { self.contains(part) };
            for i in 0..part.len() {
                if !ready.get(i) && below.get(i) {
                    wanted.push((window.start + i) as u32);
                } else if !ready.get(i) && reach == Reach::Prefix {
                    return (wanted, window.start + i);
                }
            }
            (end, size) = (window.end, 4 * size);
        }
        (wanted, end)
    }

    /// Blocks that may begin to come up now: room in memory, and what the tier should manage by the deadline.
    fn most(&self) -> usize {
        let slots = self.planner.slots();
        let room = (slots - slots / SHARE).saturating_sub(self.coming.lock().len());
        let by_deadline = self.counts.speed.lately(Instant::now()).map(|speed| {
            let bytes = 2.0 * speed * self.deadline.as_secs_f64();
            (bytes / self.block_bytes as f64) as usize
        });
        by_deadline.map_or(room, |most| room.min(most.max(FIRST_WINDOW)))
    }

    /// Offers blocks, unless all was forgotten since they were leased.
    fn put(&self, offers: Vec<Offer>, epoch: u64) {
        let _gate = self.gate.lock();
        if self.epoch.load(Ordering::Acquire) == epoch {
            self.tier.put(offers);
        }
    }

    /// Starts to read the blocks of a promotion, head first; what finds no room is left out. A reset that hangs holds it up until
    /// its deadline and no longer.
    fn begin(&self, ascent: Ascent) {
        let until = ascent.until();
        if let Some(_gate) = self.gate.try_lock_until(until)
            && Instant::now() < until
        {
            let wants = promotion::wants(self, &ascent, self.most());
            self.tier.get(wants, until);
        }
        // Only now: it is not over before its blocks are known.
        drop(ascent);
    }
}

/// The keys of a promotion, taken along.
type Packed = Vec<[u8; KEY_BYTES]>;

#[cfg(all(test, not(shuttle)))]
mod tests;
