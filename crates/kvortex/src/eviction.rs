//! Which block goes first.
//!
//! A policy orders the blocks of one shard that may go: ready, and leased by nobody. The index asks every shard for its
//! first and takes the one with the smallest stamp, so that the order is one order over all shards.

use crate::terms::Priority;

/// A node of a shard.
pub type NodeId = u32;

/// How important a block is and when it became evictable, in ticks of the index. Blocks of one run get one stamp each, the
/// tail's the smallest, so that the tail of a prefix goes before its head.
pub type Stamp = u64;

/// The contract of an eviction policy. Every method is O(1); the index calls them under the shard's lock.
///
/// The index admits a node when its block becomes ready or loses its last lease, and withdraws it when the block is
/// leased or forgotten. So a policy never sees a leased block and never has to skip one.
pub trait Eviction: Default + Send {
    /// `node` may go from now on. Stamps of one priority come in nearly ascending order.
    fn admit(&mut self, node: NodeId, stamp: Stamp);
    /// `node` may no longer go. It was admitted and not withdrawn since.
    fn withdraw(&mut self, node: NodeId);
    /// The node to go first, with its stamp.
    fn first(&self) -> Option<(NodeId, Stamp)>;
    /// Bytes of memory that the policy holds.
    fn bytes(&self) -> usize;
}

const NONE: NodeId = NodeId::MAX;

#[derive(Clone, Copy)]
struct Link {
    /// Towards the block that goes earlier.
    older: NodeId,
    /// Towards the block that goes later.
    newer: NodeId,
    stamp: Stamp,
}

/// Least recently used: for each priority a doubly linked list, threaded through an array that is indexed by node.
pub struct Lru {
    links: Vec<Link>,
    lists: [List; Priority::COUNT],
}

#[derive(Clone, Copy)]
struct List {
    oldest: NodeId,
    newest: NodeId,
}

impl Default for Lru {
    fn default() -> Self {
        Self { links: Vec::new(), lists: [List { oldest: NONE, newest: NONE }; Priority::COUNT] }
    }
}

impl Lru {
    fn join(&mut self, list: usize, older: NodeId, newer: NodeId) {
        match self.links.get_mut(older as usize) {
            Some(link) => link.newer = newer,
            None => self.lists[list].oldest = newer,
        }
        match self.links.get_mut(newer as usize) {
            Some(link) => link.older = older,
            None => self.lists[list].newest = older,
        }
    }
}

impl Eviction for Lru {
    fn admit(&mut self, node: NodeId, stamp: Stamp) {
        let end = node as usize + 1;
        if self.links.len() < end {
            self.links.resize(end, Link { older: NONE, newer: NONE, stamp: 0 });
        }
        self.links[node as usize].stamp = stamp;
        let list = Priority::of(stamp);
        self.join(list, self.lists[list].newest, node);
        self.join(list, node, NONE);
    }

    fn withdraw(&mut self, node: NodeId) {
        let Link { older, newer, stamp } = self.links[node as usize];
        self.join(Priority::of(stamp), older, newer);
    }

    fn first(&self) -> Option<(NodeId, Stamp)> {
        let list = self.lists.iter().find(|list| list.oldest != NONE)?;
        self.links.get(list.oldest as usize).map(|link| (list.oldest, link.stamp))
    }

    fn bytes(&self) -> usize {
        self.links.capacity() * size_of::<Link>()
    }
}

/// When to make room, and how much: above `high` slots in use an allocation starts to sweep, and allocations go on
/// sweeping, a bounded number of victims each, until no more than `low` are in use.
#[derive(Clone, Copy, Debug)]
pub struct Watermarks {
    high: usize,
    low: usize,
}

/// Most victims of one allocation that needs fewer itself.
const SWEEP: usize = 64;

impl Watermarks {
    /// Marks for `capacity` slots: `high` is `watermark * capacity`, `low` is `high * (1 - ratio)`.
    #[must_use]
    pub fn new(capacity: usize, watermark: f64, ratio: f64) -> Self {
        let high = (capacity as f64 * watermark) as usize;
        Self { high, low: (high as f64 * (1.0 - ratio)) as usize }
    }

    /// How many victims an allocation of `needed` slots asks for, when `used` are in use, and whether sweeping goes on.
    #[must_use]
    pub fn victims(&self, used: usize, needed: usize, sweeping: bool) -> (usize, bool) {
        let after = used + needed;
        if after <= self.low || (after <= self.high && !sweeping) {
            return (0, false);
        }
        let surplus = after - self.low;
        let victims = surplus.min(needed.max(SWEEP));
        (victims, victims < surplus)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use proptest::prelude::*;

    fn priority() -> impl Strategy<Value = Priority> {
        prop_oneof![Just(Priority::Low), Just(Priority::Normal), Just(Priority::High)]
    }

    fn drain(lru: &mut Lru) -> Vec<NodeId> {
        std::iter::from_fn(|| {
            let (node, _) = lru.first()?;
            lru.withdraw(node);
            Some(node)
        })
        .collect()
    }

    #[test]
    fn sweeps_between_the_marks_and_never_more_than_it_may() {
        let marks = Watermarks::new(1000, 0.8, 0.2);
        assert_eq!(marks.victims(700, 100, false), (0, false), "at the high mark");
        assert_eq!(marks.victims(700, 101, false), (101, true), "above it, as many as needed");
        assert_eq!(marks.victims(800, 1, false), (SWEEP, true), "a small allocation does its share");
        assert_eq!(marks.victims(680, 1, true), (41, false), "and the sweep ends at the low mark");
        assert_eq!(marks.victims(639, 1, true), (0, false));
    }

    proptest! {
        #[test]
        fn an_allocation_waits_for_a_bounded_sweep(used in 0_usize..1000, needed in 0_usize..2000, sweeping: bool) {
            let (victims, _) = Watermarks::new(1000, 0.8, 0.2).victims(used, needed, sweeping);
            prop_assert!(victims <= needed.max(SWEEP));
        }

        #[test]
        fn goes_by_priority_and_in_the_order_of_admission(
            calls in prop::collection::vec((0_u32..20, priority()), 0..200),
        ) {
            let (mut lru, mut model) = (Lru::default(), BTreeMap::new());
            for (tick, (node, priority)) in (0..).zip(calls) {
                let stamp = priority.stamp(tick);
                match model.iter().find(|&(_, &n)| n == node).map(|(&stamp, _)| stamp) {
                    Some(old) => { model.remove(&old); lru.withdraw(node) }
                    None => { model.insert(stamp, node); lru.admit(node, stamp) }
                }
                prop_assert_eq!(lru.first(), model.first_key_value().map(|(&stamp, &node)| (node, stamp)));
            }
            prop_assert_eq!(drain(&mut lru), model.into_values().collect::<Vec<_>>());
        }
    }
}
