//! The worker threads and the jobs they share.

use std::collections::VecDeque;
use std::time::Instant;

use super::job::{Copier, Job};
use crate::error::MemError;
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Arc, Condvar, Mutex};

/// Worker threads that start when needed and take the oldest job that has room.
pub(super) struct Crew {
    threads: usize,
    copier: Copier,
    state: Mutex<State>,
    /// Signalled when there is a job to join, and when the crew closes.
    work: Condvar,
    /// Signalled when accepted work has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// Jobs that may have grains left, oldest first.
    open: VecDeque<Arc<Job>>,
    /// Transfers whose end has not been reported yet.
    accepted: usize,
    stopped: bool,
    /// Workers end once no job is open.
    closing: bool,
    workers: Vec<JoinHandle<()>>,
}

/// Counts one transfer as accepted until it is dropped.
pub(super) struct Accepted(Arc<Crew>);

impl Accepted {
    pub(super) fn new(crew: &Arc<Crew>) -> Result<Accepted, MemError> {
        let mut state = crew.state.lock();
        if state.stopped {
            return Err(MemError::Stopped);
        }
        state.accepted += 1;
        Ok(Accepted(Arc::clone(crew)))
    }
}

impl Drop for Accepted {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.accepted -= 1;
        if state.accepted == 0 && state.stopped {
            self.0.ended.notify_all();
        }
    }
}

impl Crew {
    /// A crew of at most `threads` workers; none has started.
    pub(super) fn new(threads: usize, copier: Copier) -> Crew {
        let (work, ended) = (Condvar::default(), Condvar::default());
        Crew { threads, copier, state: Mutex::default(), work, ended }
    }

    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    #[cfg(test)]
    pub(super) fn workers(&self) -> usize {
        self.state.lock().workers.len()
    }

    /// Works on `job` on this thread, together with the workers. The job may end on a worker after this returns.
    pub(super) fn work_with(self: &Arc<Self>, job: &Arc<Job>) {
        let helpers = self.threads.min(job.grains()).saturating_sub(1);
        job.join();
        // Without a worker this thread copies everything.
        if let Err(error) = self.open(job, helpers) {
            log::warn!("{error}");
        }
        job.work(self.copier);
        self.leave(job);
    }

    /// Leaves `job` to the workers.
    pub(super) fn hand_over(self: &Arc<Self>, job: Arc<Job>) -> Result<(), MemError> {
        let opened = self.open(&job, self.threads.min(job.grains()).max(1));
        if opened.is_err() && self.withdraw(&job) {
            return opened;
        }
        Ok(())
    }

    /// Refuses new work and waits for what was accepted; true if all of it has ended.
    pub(super) fn stop(&self, until: Option<Instant>) -> bool {
        let mut state = self.state.lock();
        state.stopped = true;
        while state.accepted > 0 {
            match until {
                None => self.ended.wait(&mut state),
                Some(until) if self.ended.wait_until(&mut state, until).timed_out() => {
                    return state.accepted == 0;
                }
                Some(_) => {}
            }
        }
        true
    }

    /// Lets the workers finish what was accepted and waits for them, except for this thread if it is one of them.
    pub(super) fn close(&self) {
        let workers = {
            let mut state = self.state.lock();
            (state.stopped, state.closing) = (true, true);
            std::mem::take(&mut state.workers)
        };
        self.work.notify_all();
        let own = thread::current().id();
        for worker in workers {
            if worker.thread().id() != own && worker.join().is_err() {
                log::error!("a copy thread ended by a panic");
            }
        }
    }

    /// Shows `job` to the workers and sees to it that `helpers` of them can come. An error means that there are none at all.
    fn open(self: &Arc<Self>, job: &Arc<Job>, helpers: usize) -> Result<(), MemError> {
        let mut state = self.state.lock();
        let wanted = self.threads.min(helpers + state.open.len());
        state.open.push_back(Arc::clone(job));
        let started = self.start_workers(&mut state, wanted);
        let alone = state.workers.is_empty();
        drop(state);
        for _ in 0..helpers {
            self.work.notify_one();
        }
        if alone { started } else { Ok(()) }
    }

    fn start_workers(self: &Arc<Self>, state: &mut State, wanted: usize) -> Result<(), MemError> {
        while state.workers.len() < wanted {
            let crew = Arc::clone(self);
            let name = format!("kvortex-copy-{}", state.workers.len());
            let worker = thread::Builder::new().name(name).spawn(move || crew.serve()).map_err(MemError::Thread)?;
            state.workers.push(worker);
        }
        Ok(())
    }

    fn serve(&self) {
        while let Some(job) = self.join_next() {
            job.work(self.copier);
            self.leave(&job);
        }
    }

    /// Waits for a job with room and joins it; `None` when the crew closes.
    fn join_next(&self) -> Option<Arc<Job>> {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.open.iter().find(|job| job.active() < self.threads) {
                job.join();
                return Some(Arc::clone(job));
            }
            if state.closing {
                return None;
            }
            self.work.wait(&mut state);
        }
    }

    /// Leaves a job that has no grains left. The last to leave ends it.
    fn leave(&self, job: &Arc<Job>) {
        let last = {
            let mut state = self.state.lock();
            // Nobody joins from now on, so exactly one thread sees the count reach 0.
            state.open.retain(|other| !Arc::ptr_eq(other, job));
            job.leave() == 0
        };
        if last {
            job.end();
        }
    }

    /// Takes back a job that no worker has joined; false if one has.
    fn withdraw(&self, job: &Arc<Job>) -> bool {
        let mut state = self.state.lock();
        let before = state.open.len();
        state.open.retain(|other| !Arc::ptr_eq(other, job));
        state.open.len() < before && job.active() == 0
    }
}
