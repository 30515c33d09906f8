//! When blocks of a shard are to be forgotten: one list for each tick of a turn, threaded through an array that is indexed by
//! node. Adding and removing is O(1); a block that outlives a turn is looked at once in each.

use crate::eviction::NodeId;
use crate::terms::Tick;

/// Ticks of a turn, about four minutes.
const TURN: usize = 1024;

const NONE: NodeId = NodeId::MAX;

#[derive(Clone, Copy)]
struct Link {
    before: NodeId,
    after: NodeId,
    until: Tick,
}

/// The mortal blocks of a shard.
pub(super) struct Wheel {
    links: Vec<Link>,
    heads: [NodeId; TURN],
    /// Everything due up to this tick is gone.
    now: Tick,
}

impl Wheel {
    pub(super) const fn new(now: Tick) -> Self {
        Self { links: Vec::new(), heads: [NONE; TURN], now }
    }

    /// `node`, which is not here, is due at `until`, or at the next tick if that has passed.
    pub(super) fn add(&mut self, node: NodeId, until: Tick) {
        let until = until.max(self.now.saturating_add(1));
        let end = node as usize + 1;
        if self.links.len() < end {
            self.links.resize(end, Link { before: NONE, after: NONE, until: 0 });
        }
        let head = std::mem::replace(&mut self.heads[until as usize % TURN], node);
        self.links[node as usize] = Link { before: NONE, after: head, until };
        if let Some(link) = self.links.get_mut(head as usize) {
            link.before = node;
        }
    }

    /// When `node`, which is here, is due.
    pub(super) fn until(&self, node: NodeId) -> Tick {
        self.links[node as usize].until
    }

    /// Takes `node`, which is here, out.
    pub(super) fn remove(&mut self, node: NodeId) {
        let Link { before, after, until } = self.links[node as usize];
        match self.links.get_mut(before as usize) {
            Some(link) => link.after = after,
            None => self.heads[until as usize % TURN] = after,
        }
        if let Some(link) = self.links.get_mut(after as usize) {
            link.before = before;
        }
    }

    /// What is due at `now`; it must be taken out.
    pub(super) fn due(&mut self, now: Tick) -> Vec<NodeId> {
        let passed = now.saturating_sub(self.now);
        let mut due = Vec::new();
        for tick in (0..passed.min(TURN as Tick)).map(|back| now - back) {
            let mut node = self.heads[tick as usize % TURN];
            while let Some(&Link { after, until, .. }) = self.links.get(node as usize) {
                if until <= now {
                    due.push(node);
                }
                node = after;
            }
        }
        self.now = self.now.max(now);
        due
    }

    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + self.links.capacity() * size_of::<Link>()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn everything_is_due_at_its_tick(
            calls in prop::collection::vec((0_u32..20, 0_u32..3000, 0_u32..700), 1..200), start in 0_u32..5000,
        ) {
            let (mut wheel, mut model, mut now) = (Wheel::new(start), BTreeMap::new(), start);
            for (node, life, pass) in calls {
                match model.remove(&node) {
                    Some(until) => {
                        prop_assert_eq!(wheel.until(node), until);
                        wheel.remove(node);
                    }
                    None => {
                        wheel.add(node, now + life);
                        model.insert(node, (now + life).max(now + 1));
                    }
                }
                now += pass;
                let mut due = wheel.due(now);
                due.iter().for_each(|&node| wheel.remove(node));
                due.sort_unstable();
                let expected: Vec<_> = model.iter().filter(|&(_, &until)| until <= now).map(|(&node, _)| node).collect();
                model.retain(|_, &mut until| until > now);
                prop_assert_eq!(due, expected);
            }
        }
    }
}
