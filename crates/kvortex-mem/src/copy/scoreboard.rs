//! stub
use crate::span::Pages;
use crate::sync::Arc;
use std::collections::BTreeSet;
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Use {
    Reads,
    Writes,
}
pub(super) struct Access;
impl Access {
    pub(super) fn of(_: &Pages, _: impl Iterator<Item = usize>) -> Access {
        Access
    }
}
#[derive(Default)]
pub(super) struct Scoreboard {
    all: BTreeSet<(u64, bool)>,
}
impl Scoreboard {
    pub(super) fn new() -> Self {
        Self::default()
    }
    pub(super) fn enter(&mut self, id: u64, _: Arc<Access>, how: Use) {
        self.all.insert((id, how == Use::Writes));
    }
    pub(super) fn leave(&mut self, id: u64) {
        self.all.retain(|x| x.0 != id);
    }
    pub(super) fn before(&self, _: &Access, how: Use) -> Vec<u64> {
        self.all.iter().filter(|x| x.1 || how == Use::Writes).map(|x| x.0).collect()
    }
}
