//! Which block goes first.
//!
//! A policy orders the blocks of one shard that may go: ready, and leased by nobody. The index asks every shard for its
//! first and takes the one with the smallest stamp, so that the order is one order over all shards.

/// A node of a shard.
pub type NodeId = u32;

/// When a block became evictable, in ticks of the index. Blocks of one run get one stamp each, the tail's the smallest,
/// so that the tail of a prefix goes before its head.
pub type Stamp = u64;

/// The contract of an eviction policy. Every method is O(1); the index calls them under the shard's lock.
///
/// The index admits a node when its block becomes ready or loses its last lease, and withdraws it when the block is
/// leased or forgotten. So a policy never sees a leased block and never has to skip one.
pub trait Eviction: Default + Send {
    /// `node` may go from now on. Stamps come in nearly ascending order.
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

/// Least recently used: a doubly linked list threaded through an array that is indexed by node.
pub struct Lru {
    links: Vec<Link>,
    oldest: NodeId,
    newest: NodeId,
}

impl Default for Lru {
    fn default() -> Self {
        Self { links: Vec::new(), oldest: NONE, newest: NONE }
    }
}

impl Lru {
    fn join(&mut self, older: NodeId, newer: NodeId) {
        match self.links.get_mut(older as usize) {
            Some(link) => link.newer = newer,
            None => self.oldest = newer,
        }
        match self.links.get_mut(newer as usize) {
            Some(link) => link.older = older,
            None => self.newest = older,
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
        self.join(self.newest, node);
        self.join(node, NONE);
    }

    fn withdraw(&mut self, node: NodeId) {
        let Link { older, newer, .. } = self.links[node as usize];
        self.join(older, newer);
    }

    fn first(&self) -> Option<(NodeId, Stamp)> {
        self.links.get(self.oldest as usize).map(|link| (self.oldest, link.stamp))
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
    use super::*;
    use proptest::prelude::*;

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
        fn goes_in_the_order_of_admission(calls in prop::collection::vec(0_u32..20, 0..200)) {
            let (mut lru, mut model) = (Lru::default(), Vec::new());
            for (stamp, node) in calls.into_iter().enumerate() {
                match model.iter().position(|&n| n == node) {
                    Some(at) => { model.remove(at); lru.withdraw(node) }
                    None => { model.push(node); lru.admit(node, stamp as Stamp) }
                }
                prop_assert_eq!(lru.first().map(|(node, _)| node), model.first().copied());
            }
            prop_assert_eq!(drain(&mut lru), model);
        }
    }
}
