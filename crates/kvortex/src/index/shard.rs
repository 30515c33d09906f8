//! One shard: map, order and leases under one lock.

use hashbrown::HashTable;

use super::batch;
use super::changes::{Changed, Changes};
use super::wheel::Wheel;
use crate::eviction::{Eviction, NodeId, Stamp};
use crate::key::BlockKey;
use crate::terms::{FOREVER, Priority, Terms, Tick};
use crate::tier::host::{SlotClaim, SlotId};

/// Where a block is in the host tier. Only `Ready` is visible.
enum Place {
    /// The node stands for no block.
    Vacant,
    /// Room is promised, the copy has not started. The claim is with the reservation.
    Reserved,
    /// The copy runs. The claim is with the reservation.
    Writing,
    /// The bytes are there.
    Ready(SlotClaim),
}

struct Node {
    key: BlockKey,
    place: Place,
    leases: u32,
    /// Whether the table leads here. A forgotten block that is leased or being written keeps its node until that ends.
    listed: bool,
    priority: Priority,
    /// Whether it is in the wheel, which knows until when it is kept.
    mortal: bool,
}

/// Invariants, checked by [`Shard::validate`]: the table leads to exactly the listed nodes; the order holds exactly the
/// listed ready nodes without leases; an unlisted node that is not vacant is leased or being written; mortal nodes are listed.
pub(super) struct Shard<P> {
    table: HashTable<NodeId>,
    nodes: Vec<Node>,
    vacant: Vec<NodeId>,
    order: P,
    ready: usize,
    leased: usize,
    /// Made for the first block that is to be forgotten at some time.
    wheel: Option<Box<Wheel>>,
    /// Kept if somebody asks for them.
    changes: Option<Box<Changes>>,
}

impl<P: Eviction> Default for Shard<P> {
    fn default() -> Self {
        Self {
            table: HashTable::new(),
            nodes: Vec::new(),
            vacant: Vec::new(),
            order: P::default(),
            ready: 0,
            leased: 0,
            wheel: None,
            changes: None,
        }
    }
}

/// Where a search in a shard starts: no block was found yet.
pub(super) const NOWHERE: NodeId = NodeId::MAX - 1;

/// What a key leads to.
pub(super) enum Found {
    Ready(NodeId),
    Pending(NodeId),
    Nothing,
}

fn table_hash(key: &BlockKey) -> u64 {
    batch::table_hash(batch::hash(key))
}

impl<P: Eviction> Shard<P> {
    /// Blocks that a lookup can see.
    pub(super) const fn ready(&self) -> usize {
        self.ready
    }

    /// Blocks with at least one lease, forgotten ones included.
    pub(super) const fn leased(&self) -> usize {
        self.leased
    }

    /// The stamp of the block to go first; [`Stamp::MAX`] when none may go.
    pub(super) fn first_stamp(&self) -> Stamp {
        self.order.first().map_or(Stamp::MAX, |(_, stamp)| stamp)
    }

    /// Looks a key up. Blocks of one run lie side by side in a shard, so the node after the one found last is tried before
    /// the table: in a large index that is a line already on its way instead of two that nobody expects.
    pub(super) fn find(&self, hash: u64, key: &BlockKey, last: &mut NodeId) -> Found {
        let guess = last.wrapping_add(1);
        let guessed = self.nodes.get(guess as usize).is_some_and(|node| node.listed && node.key == *key);
        let found = if guessed { Some(guess) } else { self.look_up(hash, key) };
        match found {
            Some(node) => {
                *last = node;
                if matches!(self.nodes[node as usize].place, Place::Ready(_)) {
                    Found::Ready(node)
                } else {
                    Found::Pending(node)
                }
            }
            None => Found::Nothing,
        }
    }

    fn look_up(&self, hash: u64, key: &BlockKey) -> Option<NodeId> {
        self.table.find(hash, |&node| self.nodes[node as usize].key == *key).copied()
    }

    /// Inserts a key that is not there, without a block yet.
    pub(super) fn reserve(&mut self, hash: u64, key: BlockKey, (terms, now): (Terms, Tick)) -> NodeId {
        let Terms { priority, until } = terms;
        let fresh = Node { key, place: Place::Reserved, leases: 0, listed: true, priority, mortal: false };
        let node = match self.vacant.pop() {
            Some(node) => {
                self.nodes[node as usize] = fresh;
                node
            }
            None => {
                self.nodes.push(fresh);
                (self.nodes.len() - 1) as NodeId
            }
        };
        let nodes = &self.nodes;
        self.table.insert_unique(hash, node, |&node| table_hash(&nodes[node as usize].key));
        if until != FOREVER {
            self.nodes[node as usize].mortal = true;
            self.wheel.get_or_insert_with(|| Box::new(Wheel::new(now))).add(node, until);
        }
        node
    }

    /// Somebody shares a listed block, which is leased or not ready: the higher priority and the longer life hold.
    pub(super) fn share(&mut self, node: NodeId, terms: Terms) {
        let entry = &mut self.nodes[node as usize];
        entry.priority = entry.priority.max(terms.priority);
        let Some(wheel) = self.wheel.as_mut().filter(|_| entry.mortal) else { return };
        if terms.until > wheel.until(node) {
            wheel.remove(node);
            entry.mortal = terms.until != FOREVER;
            if entry.mortal {
                wheel.add(node, terms.until);
            } else if let (Place::Ready(_), Some(changes)) = (&entry.place, &mut self.changes) {
                changes.stored(entry.key);
            }
        }
    }

    /// The copy into a reserved block starts.
    pub(super) fn begin(&mut self, node: NodeId) {
        self.nodes[node as usize].place = Place::Writing;
    }

    /// Makes a block visible, or hands its claim back when it was forgotten meanwhile.
    pub(super) fn publish(&mut self, node: NodeId, claim: SlotClaim, tick: u64) -> Option<SlotClaim> {
        if !self.nodes[node as usize].listed {
            self.vacate(node);
            return Some(claim);
        }
        let entry = &mut self.nodes[node as usize];
        entry.place = Place::Ready(claim);
        self.ready += 1;
        self.order.admit(node, entry.priority.stamp(tick));
        if let Some(changes) = self.changes.as_mut().filter(|_| !entry.mortal) {
            changes.stored(entry.key);
        }
        None
    }

    /// Gives a reserved block up.
    pub(super) fn abandon(&mut self, node: NodeId) {
        if self.nodes[node as usize].listed {
            self.unlist(node);
        }
        self.vacate(node);
    }

    /// Takes a lease on a ready block and tells its slot.
    pub(super) fn lease(&mut self, node: NodeId) -> Option<SlotId> {
        let entry = &mut self.nodes[node as usize];
        let Place::Ready(claim) = &entry.place else { return None };
        let slot = claim.id();
        entry.leases += 1;
        if entry.leases == 1 {
            self.leased += 1;
            self.order.withdraw(node);
        }
        Some(slot)
    }

    /// As [`lease`](Self::lease), if the node, found earlier, still stands for `key`.
    pub(super) fn lease_if(&mut self, node: NodeId, key: &BlockKey) -> Option<SlotId> {
        let entry = &self.nodes[node as usize];
        if entry.listed && entry.key == *key { self.lease(node) } else { None }
    }

    /// Ends a lease. A forgotten block goes with its last one: its claim comes back.
    pub(super) fn release(&mut self, node: NodeId, tick: u64) -> Option<SlotClaim> {
        let entry = &mut self.nodes[node as usize];
        entry.leases -= 1;
        if entry.leases > 0 {
            return None;
        }
        self.leased -= 1;
        if entry.listed {
            self.order.admit(node, entry.priority.stamp(tick));
            return None;
        }
        self.vacate(node)
    }

    /// Forgets the block that is first to go.
    pub(super) fn evict_first(&mut self) -> Option<SlotClaim> {
        let (node, _) = self.order.first()?;
        self.forget(node)
    }

    /// Forgets what is due at `now`. What is leased or being written vanishes when that ends.
    pub(super) fn expire(&mut self, now: Tick, claims: &mut Vec<SlotClaim>) -> usize {
        let due = self.wheel.as_mut().map(|wheel| wheel.due(now)).unwrap_or_default();
        for &node in &due {
            claims.extend(self.forget(node));
        }
        due.len()
    }

    /// Forgets a listed block, whose claim comes back unless it is leased or being written.
    fn forget(&mut self, node: NodeId) -> Option<SlotClaim> {
        let entry = &self.nodes[node as usize];
        let (ready, free) = (matches!(entry.place, Place::Ready(_)), entry.leases == 0);
        if ready {
            self.ready -= 1;
            if let Some(changes) = self.changes.as_mut().filter(|_| !entry.mortal) {
                changes.removed(entry.key);
            }
        }
        self.unlist(node);
        if !(ready && free) {
            return None;
        }
        self.order.withdraw(node);
        self.vacate(node)
    }

    /// Begins to keep changes; what is there has just come. Mortal blocks are never told of: nobody may hear in time when they
    /// are over.
    pub(super) fn watch(&mut self) {
        let mut changes = Changes::default();
        self.told().for_each(|key| changes.stored(key));
        self.changes = Some(Box::new(changes));
    }

    /// Moves the changes to `to`.
    pub(super) fn take_changes(&mut self, to: &mut Changed) {
        if let Some(changes) = &mut self.changes {
            changes.drain(to);
        }
    }

    /// What changes are told of: visible blocks that nobody's clock takes away.
    fn told(&self) -> impl Iterator<Item = BlockKey> {
        let told = |node: &&Node| node.listed && !node.mortal && matches!(node.place, Place::Ready(_));
        self.nodes.iter().filter(told).map(|node| node.key)
    }

    /// Forgets every block. Those leased or being written vanish when that ends.
    pub(super) fn clear(&mut self, claims: &mut Vec<SlotClaim>) -> usize {
        if let Some(mut changes) = self.changes.take() {
            self.told().for_each(|key| changes.removed(key));
            self.changes = Some(changes);
        }
        self.table.clear();
        self.wheel = None;
        let forgotten = std::mem::take(&mut self.ready);
        while let Some((node, _)) = self.order.first() {
            self.order.withdraw(node);
            claims.extend(self.vacate(node));
        }
        self.nodes.iter_mut().for_each(|node| (node.listed, node.mortal) = (false, false));
        forgotten
    }

    /// Bytes of memory that the shard holds.
    pub(super) fn bytes(&self) -> usize {
        let nodes = self.nodes.capacity() * size_of::<Node>();
        let vacant = self.vacant.capacity() * size_of::<NodeId>();
        let extra = self.wheel.as_ref().map_or(0, |wheel| wheel.bytes());
        let extra = extra + self.changes.as_ref().map_or(0, |changes| changes.bytes());
        nodes + vacant + self.table.allocation_size() + self.order.bytes() + extra
    }

    fn unlist(&mut self, node: NodeId) {
        let entry = &mut self.nodes[node as usize];
        entry.listed = false;
        if let Some(wheel) = self.wheel.as_mut().filter(|_| entry.mortal) {
            wheel.remove(node);
            entry.mortal = false;
        }
        if let Ok(found) = self.table.find_entry(table_hash(&entry.key), |&n| n == node) {
            found.remove();
        }
    }

    fn vacate(&mut self, node: NodeId) -> Option<SlotClaim> {
        self.vacant.push(node);
        let entry = &mut self.nodes[node as usize];
        entry.listed = false;
        match std::mem::replace(&mut entry.place, Place::Vacant) {
            Place::Ready(claim) => Some(claim),
            _ => None,
        }
    }

    /// Walks the whole shard and asserts its invariants.
    #[cfg(any(test, shuttle))]
    pub(super) fn validate(&self) {
        let is = |i: usize, f: fn(&Place) -> bool| f(&self.nodes[i].place);
        let all = || 0..self.nodes.len();
        let count = |f: &dyn Fn(usize) -> bool| all().filter(|&i| f(i)).count();
        let ready = |i| is(i, |place| matches!(place, Place::Ready(_)));
        let vacant = |i| is(i, |place| matches!(place, Place::Vacant));
        assert_eq!(self.table.len(), count(&|i| self.nodes[i].listed));
        assert_eq!(self.vacant.len(), count(&vacant));
        assert_eq!(self.ready, count(&|i| ready(i) && self.nodes[i].listed));
        assert_eq!(self.leased, count(&|i| self.nodes[i].leases > 0));
        for i in all() {
            let node = &self.nodes[i];
            let found = self.table.find(table_hash(&node.key), |&n| n as usize == i).is_some();
            assert_eq!(found, node.listed, "table and node {i} disagree");
            assert!(!(vacant(i) && (node.listed || node.leases > 0)), "vacant node {i} is in use");
            assert!(!ready(i) || node.listed || node.leases > 0, "nobody will free node {i}");
            assert!(!node.mortal || node.listed, "node {i} is forgotten and would be once more");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The memory formula of docs/architecture.md rests on it.
    #[test]
    fn a_node_is_one_cache_line() {
        assert_eq!(size_of::<Node>(), 64);
    }
}
