//! Loads that wait for their blocks to come up while their callers go on.

use std::time::{Duration, Instant};

use super::Promotion;
use crate::sync::{Arc, Condvar, Mutex};

/// How often those that wait are looked at.
const TICK: Duration = Duration::from_millis(1);

/// What goes on once its blocks are there.
type Go = Box<dyn FnOnce() + Send>;

/// Loads that wait, and a thread as long as there are any.
#[derive(Default)]
pub(super) struct Waiting(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    loads: Vec<(Promotion, Go)>,
    /// A thread looks after them.
    served: bool,
    /// They go on with what is there.
    hurried: bool,
}

impl Waiting {
    /// Calls `go` on another thread when the blocks of `promotion` are there or its time is over. Without a thread it goes at once.
    pub(super) fn add(&self, promotion: Promotion, go: Go) {
        let mut state = self.0.state.lock();
        state.loads.push((promotion, go));
        if std::mem::replace(&mut state.served, true) {
            return;
        }
        drop(state);
        let shared = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().name("kvortex-up".to_owned()).spawn(move || shared.serve());
        if thread.is_err() {
            self.0.state.lock().hurried = true;
            self.0.serve();
            self.0.state.lock().hurried = false;
        }
    }

    /// Waits until all of them have gone on; with `hurry` they do so at once, now and from now on. True if that was in time.
    pub(super) fn settle(&self, end: Instant, hurry: bool) -> bool {
        let mut state = self.0.state.lock();
        state.hurried |= hurry;
        while state.served {
            if self.0.changed.wait_until(&mut state, end).timed_out() {
                return !state.served;
            }
        }
        true
    }
}

impl Shared {
    /// Until nothing waits.
    fn serve(&self) {
        while let Some(ready) = self.ready() {
            for (promotion, go) in ready {
                go();
                // Only now: what has come stays until the load has a lease of its own.
                drop(promotion);
            }
        }
    }

    /// Those that need not wait any more, after a while if there are none yet; `None` once nothing waits.
    fn ready(&self) -> Option<Vec<(Promotion, Go)>> {
        let mut state = self.state.lock();
        if state.loads.is_empty() {
            state.served = false;
            drop(state);
            self.changed.notify_all();
            return None;
        }
        let hurried = state.hurried;
        let (ready, waiting) =
            std::mem::take(&mut state.loads).into_iter().partition(|(promotion, _)| hurried || !promotion.is_pending());
        state.loads = waiting;
        let ready: Vec<_> = ready;
        if ready.is_empty() {
            let _ = self.changed.wait_until(&mut state, Instant::now() + TICK);
        }
        Some(ready)
    }
}
