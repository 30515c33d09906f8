//! The thread that talks to the tier for those who must not wait: pollers, landings, a scheduler.

use std::collections::VecDeque;
use std::time::Instant;

use super::Below;
use super::promotion::Ascent;
use crate::sync::{Arc, Condvar, Mutex, Ordering};
use crate::tier::Offer;

/// Something to be done soon.
pub(super) enum Job {
    /// Offer blocks that were leased in this epoch.
    Offer {
        /// The blocks.
        offers: Vec<Offer>,
        /// Which.
        epoch: u64,
    },
    /// Start a promotion.
    Promote(Ascent),
}

/// Takes work and returns at once.
pub(super) struct Desk {
    shared: Arc<Shared>,
    below: Arc<Below>,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// While so many blocks wait to be offered no more are taken.
    most: usize,
}

#[derive(Default)]
struct Queue {
    promotions: VecDeque<Ascent>,
    offers: VecDeque<(Vec<Offer>, u64)>,
    /// In the offers that wait.
    blocks: usize,
    busy: bool,
    closed: bool,
    over: bool,
}

impl Queue {
    fn is_idle(&self) -> bool {
        self.promotions.is_empty() && self.offers.is_empty() && !self.busy
    }

    /// What is to be done next: somebody waits for promotions.
    fn next(&mut self) -> Option<Job> {
        if let Some(ascent) = self.promotions.pop_front() {
            return Some(Job::Promote(ascent));
        }
        let (offers, epoch) = self.offers.pop_front()?;
        self.blocks -= offers.len();
        Some(Job::Offer { offers, epoch })
    }
}

impl Desk {
    #[cfg(not(shuttle))]
    pub(super) fn open(below: &Arc<Below>, most: usize) -> crate::error::Result<Self> {
        use kvortex_mem::error::MemError;

        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new(), most });
        let desk = Self { shared: Arc::clone(&shared), below: Arc::clone(below) };
        let below = Arc::clone(below);
        let thread = std::thread::Builder::new().name("kvortex-lower".to_owned());
        thread.spawn(move || shared.serve(&below)).map_err(MemError::Thread)?;
        Ok(desk)
    }

    /// Takes a job. Blocks are not offered, and counted, while as many wait as may.
    pub(super) fn hand(&self, job: Job) {
        let mut queue = self.shared.queue.lock();
        let refused = match job {
            _ if queue.closed => Some(job),
            Job::Promote(ascent) => {
                queue.promotions.push_back(ascent);
                None
            }
            Job::Offer { .. } if queue.blocks >= self.shared.most => Some(job),
            Job::Offer { offers, epoch } => {
                queue.blocks += offers.len();
                queue.offers.push_back((offers, epoch));
                None
            }
        };
        drop(queue);
        self.shared.changed.notify_all();
        if let Some(Job::Offer { offers, .. }) = &refused {
            self.below.counts.unoffered.fetch_add(offers.len() as u64, Ordering::Relaxed);
        }
    }

    /// Waits until all that was handed in so far is done. True if that was in time.
    pub(super) fn flush(&self, end: Instant) -> bool {
        let mut queue = self.shared.queue.lock();
        while !queue.is_idle() {
            if self.shared.changed.wait_until(&mut queue, end).timed_out() {
                return queue.is_idle();
            }
        }
        true
    }

    /// Takes nothing more. True if what was handed in is done in time.
    pub(super) fn close(&self, end: Instant) -> bool {
        let mut queue = self.shared.queue.lock();
        queue.closed = true;
        self.shared.changed.notify_all();
        while !queue.over {
            if self.shared.changed.wait_until(&mut queue, end).timed_out() {
                return queue.over;
            }
        }
        true
    }
}

impl Shared {
    /// Until the desk is closed and nothing is left.
    fn serve(&self, below: &Arc<Below>) {
        while let Some(job) = self.take() {
            match job {
                Job::Offer { offers, epoch } => below.put(offers, epoch),
                Job::Promote(ascent) => below.begin(ascent),
            }
            self.queue.lock().busy = false;
            self.changed.notify_all();
        }
        self.queue.lock().over = true;
        self.changed.notify_all();
    }

    fn take(&self) -> Option<Job> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.next() {
                queue.busy = true;
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            self.changed.wait(&mut queue);
        }
    }
}
