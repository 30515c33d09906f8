//! The handle of something submitted.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::plan::{Report, TicketId};
use crate::sync::{Arc, Condvar, Mutex};

/// A save or load that goes on by itself. Clones are handles of the same one; dropping them all does not stop it.
#[derive(Clone)]
pub struct Ticket(Arc<Flight>);

struct Flight {
    id: TicketId,
    state: Mutex<State>,
    landed: Condvar,
}

#[derive(Default)]
struct State {
    outcome: Option<Result<Report>>,
    /// Told whether it went well, once.
    followers: Vec<Follower>,
}

type Follower = Box<dyn FnOnce(bool) + Send>;

impl Ticket {
    pub(crate) fn new(id: TicketId) -> Self {
        Self(Arc::new(Flight { id, state: Mutex::default(), landed: Condvar::new() }))
    }

    /// The number of its plan.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.0.id.0
    }

    /// Whether it is over, well or not.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.0.state.lock().outcome.is_some()
    }

    pub(crate) fn land(&self, outcome: Result<Report>) {
        let ok = outcome.is_ok();
        let followers = {
            let mut state = self.0.state.lock();
            state.outcome = Some(outcome);
            std::mem::take(&mut state.followers)
        };
        self.0.landed.notify_all();
        followers.into_iter().for_each(|follower| follower(ok));
    }

    /// Tells `follower` whether it went well: now if it is over, else on the thread that ends it.
    pub(crate) fn follow(&self, follower: impl FnOnce(bool) + Send + 'static) {
        let mut state = self.0.state.lock();
        let over = state.outcome.as_ref().map(Result::is_ok);
        match over {
            None => state.followers.push(Box::new(follower)),
            Some(ok) => {
                drop(state);
                follower(ok);
            }
        }
    }

    /// Waits until it is over; for ever without a timeout. Any number of callers may wait, before and after.
    ///
    /// # Errors
    /// What the save or load failed with; [`Error::Timeout`] when it goes on.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Report> {
        let start = Instant::now();
        let deadline = timeout.and_then(|timeout| start.checked_add(timeout));
        let mut state = self.0.state.lock();
        loop {
            if let Some(outcome) = state.outcome.as_ref() {
                return outcome.clone();
            }
            match deadline {
                Some(deadline) if Instant::now() >= deadline => {
                    return Err(Error::Timeout { ticket: self.id(), waited_ms: start.elapsed().as_millis() });
                }
                Some(deadline) => drop(self.0.landed.wait_until(&mut state, deadline)),
                None => self.0.landed.wait(&mut state),
            }
        }
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ticket({}, done: {})", self.id(), self.is_done())
    }
}
