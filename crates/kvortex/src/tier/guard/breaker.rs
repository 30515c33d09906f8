//! Whether a tier is worth asking. A fault is told once; what fails is tried again after a while.

use std::time::{Duration, Instant};

/// The pause after a first fault; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// From what nothing comes for so long, that hangs.
pub(crate) const STUCK: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// What fails now and then, this often at least, is told of as one failure.
const QUIET: Duration = Duration::from_secs(5);

/// One kind of operation. After `patience` faults in a row it pauses, then one try decides.
#[derive(Debug)]
pub(crate) struct Breaker {
    patience: u32,
    faults: u32,
    pause: Duration,
    until: Option<Instant>,
    last_success: Option<Instant>,
    /// The log says that it fails.
    told: bool,
    last_fault: Option<Instant>,
}

/// What became of a fault or success, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing new.
    Same,
    /// It fails from now on.
    Failing,
    /// It works again.
    Recovered,
}

impl Breaker {
    /// One that pauses after `patience` faults in a row.
    #[must_use]
    pub(crate) const fn new(patience: u32) -> Self {
        let pause = FIRST_PAUSE;
        Self { patience, faults: 0, pause, until: None, last_success: None, told: false, last_fault: None }
    }

    /// Whether to try.
    #[must_use]
    pub(crate) fn is_open(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() >= until)
    }

    /// Whether the last tries failed.
    #[must_use]
    pub(crate) const fn is_failing(&self) -> bool {
        self.until.is_some()
    }

    /// Whether nothing has succeeded for a while: then what comes too late is a fault, and not only one of many at once.
    #[must_use]
    pub(crate) fn is_stuck(&self) -> bool {
        self.last_success.is_none_or(|last| last.elapsed() > STUCK)
    }

    /// Whether something has succeeded after `start`.
    #[must_use]
    pub(crate) fn has_succeeded_since(&self, start: Instant) -> bool {
        self.last_success.is_some_and(|last| last > start)
    }

    /// A try failed.
    pub(crate) fn fault(&mut self) -> Turn {
        self.last_fault = Some(Instant::now());
        self.faults = self.faults.saturating_add(1);
        if self.faults < self.patience {
            return Turn::Same;
        }
        let turn = if self.told { Turn::Same } else { Turn::Failing };
        self.told = true;
        // Those that began before the pause do not lengthen it.
        if self.is_open() {
            self.until = Some(Instant::now() + self.pause);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
        turn
    }

    /// It hangs: a fault that needs no others.
    pub(crate) fn trip(&mut self) -> Turn {
        self.faults = self.faults.max(self.patience);
        self.fault()
    }

    /// A try succeeded. That it has recovered is told when it has gone well for a while.
    pub(crate) fn success(&mut self) -> Turn {
        let last_fault = self.last_fault;
        let recovered = self.told && last_fault.is_none_or(|last| last.elapsed() >= QUIET);
        let told = self.told && !recovered;
        *self = Self { last_success: Some(Instant::now()), told, last_fault, ..Self::new(self.patience) };
        if recovered { Turn::Recovered } else { Turn::Same }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_pauses_after_its_patience_and_tells_once() {
        let mut breaker = Breaker::new(2);
        assert_eq!((breaker.fault(), breaker.is_open()), (Turn::Same, true));
        assert_eq!((breaker.fault(), breaker.is_open()), (Turn::Failing, false));
        assert_eq!(breaker.fault(), Turn::Same);
        assert_eq!((breaker.success(), breaker.is_open()), (Turn::Same, true));
        breaker.fault();
        assert_eq!((breaker.fault(), breaker.is_open()), (Turn::Same, false));
        breaker.last_fault = Instant::now().checked_sub(QUIET);
        assert_eq!(breaker.success(), Turn::Recovered);
        assert_eq!(breaker.success(), Turn::Same);
        assert_eq!((breaker.trip(), breaker.is_open()), (Turn::Failing, false));
    }

    #[test]
    fn a_pause_ends_by_itself() {
        let mut breaker = Breaker::new(1);
        breaker.fault();
        std::thread::sleep(FIRST_PAUSE + Duration::from_millis(20));
        assert!(breaker.is_open() && breaker.is_failing());
        assert_eq!((breaker.fault(), breaker.is_open()), (Turn::Same, false));
    }
}
