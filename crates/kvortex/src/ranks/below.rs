//! The tier below the rows of all ranks, as their planner has it: not opened yet, open, or left.

use std::time::Duration;

use kvortex_mem::arena::Arena;
use parking_lot::RwLock;

use crate::copies;
use crate::error::Result;
use crate::fork::Owner;
use crate::lower::{self, Lower};
use crate::namespace::Namespace;
use crate::planner::Planner;
use crate::sync::Arc;
use crate::tier::disk::DiskConfig;

/// Where a planner's blocks go besides memory.
pub(super) struct Below {
    state: RwLock<State>,
    owner: Owner,
}

enum State {
    /// Waits for the ranks' rows.
    Configured {
        disk: DiskConfig,
        deadline: Duration,
    },
    Open(Arc<Lower>),
    /// Never was, could not be opened, or was left.
    None,
}

impl Default for Below {
    fn default() -> Self {
        Self { state: RwLock::new(State::None), owner: Owner::this_process() }
    }
}

impl Below {
    pub(super) fn configured(disk: DiskConfig, deadline: Duration) -> Self {
        Self { state: RwLock::new(State::Configured { disk, deadline }), ..Self::default() }
    }

    /// Opens it for the rows, and the identity, that `rows` finds. One that cannot be opened is a warning, once.
    pub(super) fn open_once(
        &self,
        rows: impl FnOnce() -> Result<(Vec<Arc<Arena>>, Namespace)>,
        planner: &Arc<Planner>,
    ) {
        if !matches!(*self.state.read(), State::Configured { .. }) {
            return;
        }
        let mut state = self.state.write();
        let State::Configured { disk, deadline } = std::mem::replace(&mut *state, State::None) else { return };
        let opened =
            rows().and_then(|(rows, namespace)| copies::lower_of_rows(disk, deadline, &rows, namespace, planner));
        match opened {
            Ok(lower) => *state = State::Open(Arc::new(lower)),
            Err(error) => log::warn!("the disk tier stays off: {error}"),
        }
    }

    /// What `ask` says of it, if it is open.
    pub(super) fn with<T>(&self, ask: impl FnOnce(&Lower) -> T) -> Option<T> {
        match &*self.state.read() {
            State::Open(lower) => Some(ask(lower)),
            _ => None,
        }
    }

    /// Ends it. True if that was in time.
    pub(super) fn leave(&self, patience: Duration) -> bool {
        let state = std::mem::replace(&mut *self.state.write(), State::None);
        let State::Open(lower) = state else { return true };
        let ended = lower.stop(patience);
        if !ended {
            lower::drop_elsewhere(lower);
        }
        ended
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        if self.owner.is_elsewhere()
            && let State::Open(lower) = self.state.get_mut()
        {
            // As an engine in a forked child: locks inside may be held by threads that are not here.
            let _ = std::mem::ManuallyDrop::new(Arc::clone(lower));
        }
    }
}
