//! How fast blocks come up.

use std::time::{Duration, Instant};

use crate::sync::Mutex;

/// What is left of an earlier measurement's weight after each further one.
const KEEP: f64 = 0.8;

/// How long a measurement is believed.
const FRESH: Duration = Duration::from_secs(10);

/// A mean over the last transfers, each by its size.
#[derive(Default)]
pub(super) struct Speed(Mutex<Option<Mean>>);

#[derive(Clone, Copy)]
struct Mean {
    bytes: f64,
    seconds: f64,
    at: Instant,
}

impl Speed {
    pub(super) fn add(&self, bytes: f64, time: Duration, now: Instant) {
        let mut mean = self.0.lock();
        let (old_bytes, old_seconds) = mean.map_or((0.0, 0.0), |mean| (KEEP * mean.bytes, KEEP * mean.seconds));
        *mean = Some(Mean { bytes: old_bytes + bytes, seconds: old_seconds + time.as_secs_f64().max(1e-6), at: now });
    }

    /// Bytes a second, unless the last measurement is so old that it says nothing any more.
    pub(super) fn lately(&self, now: Instant) -> Option<f64> {
        let mean = (*self.0.lock())?;
        (now.saturating_duration_since(mean.at) < FRESH).then(|| mean.bytes / mean.seconds)
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn it_follows_what_was_measured_last_and_forgets_what_is_old() {
        let (speed, start) = (Speed::default(), Instant::now());
        assert_eq!(speed.lately(start), None);
        speed.add(1e9, Duration::from_secs(1), start);
        assert_eq!(speed.lately(start), Some(1e9));
        speed.add(1e3, Duration::from_micros(100), start);
        assert!(speed.lately(start).is_some_and(|speed| speed > 9e8), "a little says little");
        (0..30).for_each(|_| speed.add(1e8, Duration::from_secs(1), start));
        assert!(speed.lately(start).is_some_and(|speed| (0.99e8..1.1e8).contains(&speed)));
        assert!(speed.lately(start + FRESH / 2).is_some());
        assert_eq!(speed.lately(start + FRESH), None);
    }
}
