//! One accepted transfer, cut into grains.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Done, Transfer};
use crate::error::MemError;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, switch_point};

/// Grains are as large as this where a transfer has plenty of bytes: then the shared cursor does not show.
const MAX_GRAIN: usize = 1 << 20;

/// Grains are not smaller than this where a transfer has few bytes.
const MIN_GRAIN: usize = 128 << 10;

/// Copies a range of steps, and of each page a range of bytes.
pub(super) type Copier = fn(&Transfer, Range<usize>, Range<usize>);

/// A transfer that threads work on together.
pub(super) struct Job {
    /// Taken out by `end`, so that the memory is let go before `done` is called.
    transfer: Mutex<Option<Arc<Transfer>>>,
    cut: Cut,
    next: AtomicUsize,
    /// Threads that have joined and not left; changed under the crew's lock only.
    active: AtomicUsize,
    failure: Mutex<Option<String>>,
    done: Mutex<Option<Done>>,
}

impl Job {
    /// A job for up to `threads` threads.
    pub(super) fn new(transfer: Arc<Transfer>, threads: usize, done: Done) -> Job {
        Job {
            cut: Cut::of(transfer.steps().len(), transfer.pages().page_bytes(), threads),
            transfer: Mutex::new(Some(transfer)),
            next: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            failure: Mutex::new(None),
            done: Mutex::new(Some(done)),
        }
    }

    pub(super) fn grains(&self) -> usize {
        self.cut.grains
    }

    pub(super) fn active(&self) -> usize {
        self.active.load(Ordering::Relaxed)
    }

    pub(super) fn join(&self) {
        self.active.fetch_add(1, Ordering::Relaxed);
    }

    /// Threads that are left.
    pub(super) fn leave(&self) -> usize {
        self.active.fetch_sub(1, Ordering::Relaxed) - 1
    }

    /// Copies grains until none is left. A panic fails the job and leaves its other grains alone.
    pub(super) fn work(&self, copier: Copier) {
        let transfer = self.transfer.lock().clone();
        let Some(transfer) = transfer else { return };
        let outcome = guarded(|| {
            while let Some((steps, bytes)) = self.take() {
                switch_point();
                copier(&transfer, steps, bytes);
            }
        });
        if let Err(reason) = outcome {
            self.next.store(self.cut.grains, Ordering::Relaxed);
            self.failure.lock().get_or_insert(reason);
        }
    }

    /// Lets go of the memory, then reports. To be called once, when no thread works on the job any more.
    pub(super) fn end(&self) {
        let transfer = self.transfer.lock().take();
        if let Err(reason) = guarded(|| drop(transfer)) {
            log::error!("the owner of copied memory panicked when it was let go: {reason}");
        }
        let result = self.failure.lock().take().map_or(Ok(()), |reason| Err(MemError::CopyFailed(reason)));
        let Some(done) = self.done.lock().take() else {
            return;
        };
        if let Err(reason) = guarded(|| done(result)) {
            log::error!("the receiver of a copy's result panicked: {reason}");
        }
    }

    fn take(&self) -> Option<(Range<usize>, Range<usize>)> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < self.cut.grains).then(|| self.cut.grain(index))
    }
}

/// Runs `work`; a panic becomes its message.
pub(crate) fn guarded(work: impl FnOnce()) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| message_of(&*panic))
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("a copying thread panicked: {}", text.unwrap_or("no message"))
}

/// How a transfer is cut: several whole pages per grain, or several grains per page.
#[derive(Debug, PartialEq, Eq)]
struct Cut {
    steps: usize,
    page_bytes: usize,
    steps_per_grain: usize,
    parts_per_page: usize,
    part_bytes: usize,
    grains: usize,
}

impl Cut {
    fn of(steps: usize, page_bytes: usize, threads: usize) -> Cut {
        // Four grains per thread, so that a thread that starts late or is interrupted holds up little.
        let grain = (steps * page_bytes / (threads * 4)).clamp(MIN_GRAIN, MAX_GRAIN);
        let parts = page_bytes.div_ceil(grain).max(1);
        // Parts end at cache lines of the slot, so that no two threads write one line.
        let part_bytes = page_bytes.div_ceil(parts).next_multiple_of(64).max(64);
        let parts_per_page = page_bytes.div_ceil(part_bytes).max(1);
        let steps_per_grain = if parts_per_page > 1 { 1 } else { grain / page_bytes.max(1) }.max(1);
        let grains = steps.div_ceil(steps_per_grain) * parts_per_page;
        Cut { steps, page_bytes, steps_per_grain, parts_per_page, part_bytes, grains }
    }

    /// The steps, and the bytes of each page, of grain `index`.
    fn grain(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let first = index / self.parts_per_page * self.steps_per_grain;
        let start = index % self.parts_per_page * self.part_bytes;
        let steps = first..(first + self.steps_per_grain).min(self.steps);
        (steps, start..(start + self.part_bytes).min(self.page_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn grains_cover_each_byte_once(
            steps in 0usize..40,
            page_bytes in prop_oneof![1usize..5000, 100_000usize..5_000_000],
            threads in 1usize..20,
        ) {
            let cut = Cut::of(steps, page_bytes, threads);
            let mut next = vec![0; steps];
            for index in 0..cut.grains {
                let (range, bytes) = cut.grain(index);
                prop_assert!(!range.is_empty() && !bytes.is_empty(), "no grain is empty");
                prop_assert!(range.len() * bytes.len() <= MAX_GRAIN + 64, "no grain is too large");
                for step in range {
                    prop_assert_eq!(next[step], bytes.start);
                    next[step] = bytes.end;
                }
            }
            prop_assert!(next.iter().all(|&end| end == page_bytes));
        }
    }

    #[test]
    fn every_thread_finds_work_in_a_transfer_that_is_worth_it() {
        for (steps, page_bytes) in [(1, 4 << 20), (4, 1 << 20), (64, 64 << 10), (1000, 1 << 20), (3, 1_500_001)] {
            assert!(Cut::of(steps, page_bytes, 4).grains >= 8, "{steps} x {page_bytes}");
        }
    }
}
