//! Which blocks are worth a write.

use std::collections::{HashSet, VecDeque};

use crate::key::BlockKey;

/// The rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Admission {
    /// Every block.
    #[default]
    All,
    /// Blocks that are offered again: a tenth of the writes, and in a tier that is small for its traffic more hits, but fewer
    /// in a large one.
    SecondTouch,
}

/// What was offered once, newest last; as many keys as it was made for.
pub(super) struct Gate {
    rule: Admission,
    seen: HashSet<BlockKey>,
    order: VecDeque<BlockKey>,
    most: usize,
}

impl Gate {
    /// Remembers `most` keys.
    #[must_use]
    pub(super) fn new(rule: Admission, most: usize) -> Self {
        Self { rule, seen: HashSet::new(), order: VecDeque::new(), most: most.max(1) }
    }

    /// Whether a block that is offered may be written.
    pub(super) fn admits(&mut self, key: &BlockKey) -> bool {
        // A key that was admitted stays in the order until its turn: it costs nothing there.
        if self.rule == Admission::All || self.seen.remove(key) {
            return true;
        }
        self.seen.insert(*key);
        self.order.push_back(*key);
        if self.order.len() > self.most
            && let Some(old) = self.order.pop_front()
        {
            self.seen.remove(&old);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(i: u8) -> BlockKey {
        BlockKey::from_bytes([i; 32])
    }

    #[test]
    fn the_second_offer_is_admitted_if_it_comes_soon() {
        let mut gate = Gate::new(Admission::SecondTouch, 2);
        assert!(!gate.admits(&key(1)) && gate.admits(&key(1)));
        assert!(!gate.admits(&key(1)), "it begins again");
        (2..4).for_each(|i| assert!(!gate.admits(&key(i))));
        assert!(!gate.admits(&key(1)), "forgotten");
        assert!(Gate::new(Admission::All, 1).admits(&key(9)));
    }
}
