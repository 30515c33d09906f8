//! Which unfinished copies read or write pages. Errs on the safe side: all pages are taken for the same.

use std::collections::BTreeMap;

use crate::span::Pages;
use crate::sync::Arc;

/// What a copy does with its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Reads,
    Writes,
}

/// Pages that are used.
#[derive(Debug)]
pub(super) struct Access;

impl Access {
    pub(super) fn of(_: &Pages, _: impl Iterator<Item = usize>) -> Access {
        Access
    }
}

/// The unfinished copies.
#[derive(Debug, Default)]
pub(super) struct Scoreboard {
    uses: BTreeMap<u64, Use>,
}

impl Scoreboard {
    pub(super) fn new() -> Scoreboard {
        Scoreboard::default()
    }

    pub(super) fn enter(&mut self, id: u64, _: Arc<Access>, how: Use) {
        self.uses.insert(id, how);
    }

    pub(super) fn leave(&mut self, id: u64) {
        self.uses.remove(&id);
    }

    /// What a use must come after, ascending.
    pub(super) fn before(&self, _: &Access, how: Use) -> Vec<u64> {
        let conflicts = |other: Use| how == Use::Writes || other == Use::Writes;
        self.uses.iter().filter(|&(_, &other)| conflicts(other)).map(|(&id, _)| id).collect()
    }
}
