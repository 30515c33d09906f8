//! A tier that cannot be had yet: another process has not let go of its folder, say, or there is no room to begin. Until it can, it
//! is a tier that has nothing and takes nothing.

use std::time::{Duration, Instant};

use kvortex_mem::error::MemError;

use super::{Offer, Put, Tier, TierStats, Want};
use crate::error::{Error, Result};
use crate::key::Keys;
use crate::mask::BlockMask;
use crate::sync::{Arc, Condvar, Mutex};

/// How often it is tried.
const RETRY: Duration = Duration::from_secs(1);

/// What `make` makes, now or, if a folder cannot be used now, as soon as it can. That it is late is logged once.
///
/// # Errors
/// What `make` says, but for folders.
pub fn open<F>(name: &'static str, make: F) -> Result<Arc<dyn Tier>>
where
    F: Fn() -> Result<Arc<dyn Tier>> + Send + 'static,
{
    match make() {
        Err(Error::Mem(error)) if matches!(*error, MemError::Disk { .. }) => {
            log::warn!("the {name} tier is not there yet, and tried again: {error}");
            let shared = Arc::new(Shared { state: Mutex::new(State::Wanted), changed: Condvar::new() });
            let late = Late { name, shared: Arc::clone(&shared) };
            let try_on = move || shared.try_on(name, &make);
            std::thread::Builder::new().name("kvortex-late".to_owned()).spawn(try_on).map_err(MemError::Thread)?;
            Ok(Arc::new(late))
        }
        made => made,
    }
}

struct Late {
    name: &'static str,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

enum State {
    Wanted,
    There(Arc<dyn Tier>),
    /// It is not wanted any more.
    Off,
}

impl Shared {
    fn try_on(&self, name: &str, make: &dyn Fn() -> Result<Arc<dyn Tier>>) {
        while self.is_wanted_after(RETRY) {
            let Ok(tier) = make() else { continue };
            let mut state = self.state.lock();
            if matches!(*state, State::Wanted) {
                *state = State::There(tier);
                log::info!("the {name} tier is there");
            }
            return;
        }
    }

    /// Whether it is still wanted after a while.
    fn is_wanted_after(&self, pause: Duration) -> bool {
        let end = Instant::now() + pause;
        let mut state = self.state.lock();
        while matches!(*state, State::Wanted) && !self.changed.wait_until(&mut state, end).timed_out() {}
        matches!(*state, State::Wanted)
    }

    /// Gives it up if it is not there.
    fn give_up(&self) {
        let mut state = self.state.lock();
        if matches!(*state, State::Wanted) {
            *state = State::Off;
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl Late {
    fn tier(&self) -> Option<Arc<dyn Tier>> {
        match &*self.shared.state.lock() {
            State::There(tier) => Some(Arc::clone(tier)),
            State::Wanted | State::Off => None,
        }
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        self.shared.give_up();
    }
}

impl Tier for Late {
    fn name(&self) -> &'static str {
        self.name
    }

    fn contains(&self, keys: Keys<'_>, deadline: Instant) -> BlockMask {
        self.tier().map_or_else(|| BlockMask::new(keys.len()), |tier| tier.contains(keys, deadline))
    }

    fn put(&self, offers: Vec<Offer>) -> Vec<Put> {
        match self.tier() {
            Some(tier) => tier.put(offers),
            None => vec![Put::Dropped; offers.len()],
        }
    }

    fn get(&self, wants: Vec<Want>, deadline: Instant) {
        if let Some(tier) = self.tier() {
            tier.get(wants, deadline);
        }
    }

    fn remove(&self, keys: Keys<'_>, deadline: Instant) -> usize {
        self.tier().map_or(0, |tier| tier.remove(keys, deadline))
    }

    /// What it may find when it comes cannot be forgotten now, so it does not come any more.
    fn clear(&self) -> bool {
        self.tier().map_or_else(
            || {
                self.shared.give_up();
                // It may have come just now.
                self.tier().is_some_and(|tier| tier.clear())
            },
            |tier| tier.clear(),
        )
    }

    fn flush(&self, patience: Duration) -> bool {
        self.tier().is_none_or(|tier| tier.flush(patience))
    }

    fn stop(&self, patience: Duration) -> bool {
        self.shared.give_up();
        self.tier().is_none_or(|tier| tier.stop(patience))
    }

    fn stats(&self) -> TierStats {
        self.tier().map_or(TierStats { failing: true, ..TierStats::default() }, |tier| tier.stats())
    }
}
