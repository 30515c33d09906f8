//! Copies by the CPU, split over threads where that pays.

use std::time::{Duration, Instant};

use super::crew::{Accepted, Crew};
use super::job::{Copier, Job, guarded};
use super::scoreboard::{Access, Scoreboard, Use};
use super::{CopyEngine, Direction, Done, Transfer};
use crate::device::RawStream;
use crate::error::MemError;
use crate::span::Pages;
use crate::sync::{Arc, Condvar, Mutex};

/// Transfers of at most this many bytes are copied by the thread that calls `run`, for waking another takes about as long as
/// it saves. Measured with bytes in the cache and two threads on two cores (EPYC, Zen 4; `cargo bench --bench copy -- few`,
/// with this set to 0): 512 KiB take 24 to 28 µs alone and 22 to 26 µs together, 1 MiB 50 and 40 µs, 2 MiB 105 and 68 µs.
/// Schedules are modelled with small transfers, so there all are shared.
const ALONE_BYTES: usize = if cfg!(shuttle) { 0 } else { 512 << 10 };

/// Copies by the CPU.
///
/// A transfer is cut into grains of up to 1 MiB that the threads pull from a shared cursor. Nothing is allocated or
/// dispatched per fragment. Threads start when a transfer first needs them, and end with the engine.
pub struct HostCopy {
    crew: Arc<Crew>,
    copier: Copier,
    unfinished: Arc<Unfinished>,
    pid: u32,
}

/// Submitted transfers that have not ended.
#[derive(Default)]
struct Unfinished {
    /// The last number given out, and who has which.
    uses: Mutex<(u64, Scoreboard)>,
    left: Condvar,
}

/// One of them, until it is dropped.
struct Entry(Arc<Unfinished>, u64);

impl HostCopy {
    /// An engine that copies each transfer with at most `threads` threads (at least one), the caller of `run` among them.
    pub fn new(threads: usize) -> HostCopy {
        HostCopy::with_copier(threads, Transfer::copy)
    }

    fn with_copier(threads: usize, copier: Copier) -> HostCopy {
        let crew = Arc::new(Crew::new(threads.max(1), copier));
        HostCopy { crew, copier, unfinished: Arc::default(), pid: std::process::id() }
    }

    /// Threads that copy one transfer at most.
    pub fn threads(&self) -> usize {
        self.crew.threads()
    }

    fn check_process(&self) -> Result<(), MemError> {
        let child = std::process::id();
        if child == self.pid { Ok(()) } else { Err(MemError::Forked { parent: self.pid, child }) }
    }

    fn run_alone(&self, transfer: Transfer) -> Result<(), MemError> {
        let accepted = Accepted::new(&self.crew)?;
        let (steps, bytes) = (0..transfer.steps().len(), 0..transfer.pages().page_bytes());
        let result = guarded(|| (self.copier)(&transfer, steps, bytes)).map_err(MemError::CopyFailed);
        drop(transfer);
        drop(accepted);
        result
    }

    fn run_together(&self, transfer: Transfer) -> Result<(), MemError> {
        let accepted = Accepted::new(&self.crew)?;
        // Held to the end, so that the memory's owners are dropped on this thread and not on a worker.
        let transfer = Arc::new(transfer);
        let outcome = Arc::new(Outcome::default());
        let signal = Arc::clone(&outcome);
        let job = Job::new(Arc::clone(&transfer), self.threads(), Box::new(move |result| signal.set(result)));
        self.crew.work_with(&Arc::new(job));
        let result = outcome.wait();
        drop(transfer);
        drop(accepted);
        result
    }
}

impl CopyEngine for HostCopy {
    fn run(&self, transfer: Transfer) -> Result<(), MemError> {
        self.check_process()?;
        self.reaches(transfer.pages().place())?;
        if self.threads() == 1 || transfer.bytes() <= ALONE_BYTES {
            self.run_alone(transfer)
        } else {
            self.run_together(transfer)
        }
    }

    fn submit(&self, transfer: Transfer, done: Done) -> Result<(), MemError> {
        self.check_process()?;
        self.reaches(transfer.pages().place())?;
        let accepted = Accepted::new(&self.crew)?;
        let entry = Unfinished::enter(&self.unfinished, &transfer);
        let report: Done = Box::new(move |result| {
            // Declared first, so that they are dropped last, also if `done` panics.
            let (_accepted, _entry) = (accepted, entry);
            done(result);
        });
        self.crew.hand_over(Arc::new(Job::new(Arc::new(transfer), self.threads(), report)))
    }

    /// Waits for the copies: host memory has no order but that of its threads.
    fn fence(&self, _: RawStream, pages: &Pages) -> Result<(), MemError> {
        self.check_process()?;
        self.reaches(pages.place())?;
        self.unfinished.wait_for(pages);
        Ok(())
    }

    fn stop(&self, deadline: Duration) -> bool {
        // In a forked child nothing runs, and the locks may be held for ever.
        self.check_process().is_err() || self.crew.stop(Instant::now().checked_add(deadline))
    }

    fn name(&self) -> &'static str {
        "host"
    }
}

impl Drop for HostCopy {
    fn drop(&mut self) {
        if self.check_process().is_ok() {
            self.crew.close();
        }
    }
}

impl Unfinished {
    fn enter(this: &Arc<Unfinished>, transfer: &Transfer) -> Entry {
        let access = Access::of(transfer.pages(), transfer.steps().iter().map(|step| step.page as usize));
        let how = if transfer.direction() == Direction::Store { Use::Reads } else { Use::Writes };
        let mut uses = this.uses.lock();
        uses.0 += 1;
        let id = uses.0;
        uses.1.enter(id, Arc::new(access), how);
        Entry(Arc::clone(this), id)
    }

    /// Returns when nothing that was unfinished reads or writes `pages` any more.
    fn wait_for(&self, pages: &Pages) {
        let mut uses = self.uses.lock();
        if uses.1.is_empty() {
            return;
        }
        let access = Access::of(pages, 0..pages.count());
        let awaited = uses.1.before(&access, Use::Writes);
        while awaited.iter().any(|&id| uses.1.contains(id)) {
            self.left.wait(&mut uses);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.0.uses.lock().1.leave(self.1);
        self.0.left.notify_all();
    }
}

/// The result of a transfer that its caller waits for.
#[derive(Default)]
pub(super) struct Outcome {
    result: Mutex<Option<Result<(), MemError>>>,
    ready: Condvar,
}

impl Outcome {
    pub(super) fn set(&self, result: Result<(), MemError>) {
        *self.result.lock() = Some(result);
        self.ready.notify_one();
    }

    pub(super) fn wait(&self) -> Result<(), MemError> {
        let mut result = self.result.lock();
        loop {
            match result.take() {
                Some(result) => return result,
                None => self.ready.wait(&mut result),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::suite;

    use std::ops::Range;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use crate::copy::suite::{HostWorld, load, load_into};
    use crate::span::{Place, Region};

    #[test]
    fn one_thread_conforms() {
        suite::conforms(|| Arc::new(HostCopy::new(1)));
    }

    #[test]
    fn two_threads_conform() {
        suite::conforms(|| Arc::new(HostCopy::new(2)));
    }

    #[test]
    fn five_threads_conform() {
        suite::conforms(|| Arc::new(HostCopy::new(5)));
    }

    #[test]
    fn memory_of_a_device_is_refused() {
        let region = Region::from_vec(vec![0; 4096]).at(Place::Device(0));
        let refused = HostCopy::new(1).run(load_into(&HostWorld, &region));
        assert!(matches!(refused, Err(MemError::WrongPlace { .. })), "{refused:?}");
    }

    fn panics(_: &Transfer, _: Range<usize>, _: Range<usize>) {
        // Not `panic!`, which would print.
        std::panic::resume_unwind(Box::new("a broken copy"));
    }

    fn panics_at_the_end(transfer: &Transfer, steps: Range<usize>, bytes: Range<usize>) {
        if steps.end == transfer.steps().len() {
            panics(transfer, steps, bytes);
        }
    }

    #[test]
    fn a_panic_fails_the_copy_and_leaves_the_engine_working() {
        for copier in [panics as Copier, panics_at_the_end] {
            for (threads, bytes) in [(1, 4096), (1, 8 << 20), (3, 4096), (3, 8 << 20)] {
                let engine = HostCopy::with_copier(threads, copier);
                for _ in 0..3 {
                    let error = engine.run(load(bytes)).unwrap_err();
                    assert!(matches!(&error, MemError::CopyFailed(why) if why.contains("a broken copy")), "{error}");
                    let (sender, receiver) = mpsc::channel();
                    engine.submit(load(bytes), Box::new(move |result| sender.send(result).unwrap())).unwrap();
                    assert!(matches!(receiver.recv().unwrap(), Err(MemError::CopyFailed(_))));
                }
                assert!(engine.stop(Duration::from_secs(10)));
            }
        }
    }

    #[test]
    fn a_fence_waits_for_the_copies_of_its_pages_and_for_no_others() {
        fn slow(transfer: &Transfer, steps: Range<usize>, bytes: Range<usize>) {
            std::thread::sleep(Duration::from_millis(50));
            transfer.copy(steps, bytes);
        }
        let engine = HostCopy::with_copier(2, slow);
        let (region, other) = (Region::from_vec(vec![0; 4096]), Region::from_vec(vec![0; 4096]));
        let ended = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&ended);
        engine.submit(load_into(&HostWorld, &region), Box::new(move |_| flag.store(true, Ordering::SeqCst))).unwrap();
        engine.fence(RawStream(0), &Pages::contiguous(other, 1).unwrap()).unwrap();
        assert!(!ended.load(Ordering::SeqCst), "other pages");
        engine.fence(RawStream(0), &Pages::contiguous(region.clone(), 1).unwrap()).unwrap();
        assert!(ended.load(Ordering::SeqCst), "its end was told before");
        engine.fence(RawStream(0), &Pages::contiguous(region, 1).unwrap()).unwrap();
    }

    #[test]
    fn no_thread_starts_before_it_is_needed() {
        let engine = HostCopy::new(4);
        assert_eq!(engine.crew.workers(), 0);
        engine.run(load(4096)).unwrap();
        assert_eq!(engine.crew.workers(), 0, "a small copy is the caller's");
        engine.run(load(8 << 20)).unwrap();
        assert_eq!(engine.crew.workers(), 3, "the caller is the fourth");
    }

    #[test]
    fn an_engine_has_at_least_one_thread() {
        assert_eq!(HostCopy::new(0).threads(), 1);
        HostCopy::new(0).run(load(8 << 20)).unwrap();
    }
}
