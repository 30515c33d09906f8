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
    outcome: Mutex<Option<Result<Report>>>,
    landed: Condvar,
}

impl Ticket {
    pub(crate) fn new(id: TicketId) -> Self {
        Self(Arc::new(Flight { id, outcome: Mutex::new(None), landed: Condvar::new() }))
    }

    /// The number of its plan.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.0.id.0
    }

    /// Whether it is over, well or not.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.0.outcome.lock().is_some()
    }

    pub(crate) fn land(&self, outcome: Result<Report>) {
        *self.0.outcome.lock() = Some(outcome);
        self.0.landed.notify_all();
    }

    /// Waits until it is over; for ever without a timeout. Any number of callers may wait, before and after.
    ///
    /// # Errors
    /// What the save or load failed with; [`Error::Timeout`] when it goes on.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Report> {
        let start = Instant::now();
        let deadline = timeout.and_then(|timeout| start.checked_add(timeout));
        let mut outcome = self.0.outcome.lock();
        loop {
            if let Some(outcome) = outcome.as_ref() {
                return outcome.clone();
            }
            match deadline {
                Some(deadline) if Instant::now() >= deadline => {
                    return Err(Error::Timeout { ticket: self.id(), waited_ms: start.elapsed().as_millis() });
                }
                Some(deadline) => drop(self.0.landed.wait_until(&mut outcome, deadline)),
                None => self.0.landed.wait(&mut outcome),
            }
        }
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ticket({}, done: {})", self.id(), self.is_done())
    }
}
