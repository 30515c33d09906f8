//! The index against a model that anyone can check by eye.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::key::BlockKey;
use crate::terms::{FOREVER, Priority, Terms};
use crate::tier::host::SlotPool;

fn key(i: usize) -> [u8; 32] {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&(i as u64).to_le_bytes());
    key
}

fn keys(range: Range<usize>) -> Vec<[u8; 32]> {
    range.map(key).collect()
}

fn new(slots: u32) -> (Arc<Index>, SlotPool) {
    let pool = SlotPool::new(slots);
    (Arc::new(Index::new(pool.clone())), pool)
}

#[derive(Clone, Debug)]
enum Op {
    /// Starts to store a run, on these terms; a life counts from now.
    Reserve(Range<usize>, Terms),
    /// Ends the store that was started as number `.0` of those still open.
    Publish(usize),
    Abandon(usize),
    Lease(Range<usize>),
    LeaseEach(Range<usize>),
    Release(usize),
    Evict(usize),
    Clear,
    /// Lets so many ticks pass.
    Pass(Tick),
    /// Asks what has changed.
    Listen,
}

fn terms() -> impl Strategy<Value = Terms> {
    let priority = prop_oneof![1 => Just(Priority::Low), 3 => Just(Priority::Normal), 1 => Just(Priority::High)];
    (priority, prop_oneof![2 => Just(FOREVER), 1 => 0_u32..40]).prop_map(|(priority, until)| Terms { priority, until })
}

fn run() -> impl Strategy<Value = Range<usize>> {
    (0_usize..60, 0_usize..30).prop_map(|(start, len)| start..start + len)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (run(), terms()).prop_map(|(run, terms)| Op::Reserve(run, terms)),
        4 => (0_usize..4).prop_map(Op::Publish),
        1 => (0_usize..4).prop_map(Op::Abandon),
        3 => run().prop_map(Op::Lease),
        1 => run().prop_map(Op::LeaseEach),
        3 => (0_usize..4).prop_map(Op::Release),
        2 => (0_usize..20).prop_map(Op::Evict),
        1 => Just(Op::Clear),
        2 => (0_u32..10).prop_map(Op::Pass),
        2 => Just(Op::Listen),
    ]
}

/// A block of the model: the number of its store, its slot once it is ready, its leases, when it was last used, and on which
/// terms it is kept.
#[derive(Clone, Debug)]
struct Entry {
    store: usize,
    slot: Option<SlotId>,
    leases: Vec<usize>,
    used: u64,
    terms: Terms,
}

/// Everything in one ordered map and a clock; forgotten blocks that somebody holds are not in it.
#[derive(Default)]
struct Model {
    blocks: BTreeMap<usize, Entry>,
    clock: u64,
    next: usize,
    now: Tick,
}

impl Model {
    fn tick(&mut self, ranks: usize) -> u64 {
        self.clock += ranks as u64;
        self.clock
    }

    fn ready(&self, key: usize) -> bool {
        self.blocks.get(&key).is_some_and(|entry| entry.slot.is_some())
    }

    fn prefix(&self, run: &Range<usize>) -> usize {
        run.clone().take_while(|&key| self.ready(key)).count()
    }

    fn lease(&mut self, keys: impl Iterator<Item = usize>) -> usize {
        self.next += 1;
        for key in keys {
            self.blocks.get_mut(&key).unwrap().leases.push(self.next);
        }
        self.next
    }

    /// Ends a lease; `ranks` gives each key its rank in the run.
    fn release(&mut self, lease: usize, ranks: &[(usize, usize)]) {
        let newest = self.tick(ranks.iter().map(|&(_, rank)| rank + 1).max().unwrap_or(0));
        for &(key, rank) in ranks {
            let Some(entry) = self.blocks.get_mut(&key) else { continue };
            if let Some(at) = entry.leases.iter().position(|&l| l == lease) {
                entry.leases.remove(at);
                if entry.leases.is_empty() {
                    entry.used = newest - rank as u64;
                }
            }
        }
    }

    fn evict(&mut self, count: usize) -> Vec<SlotId> {
        let mut slots = Vec::new();
        for _ in 0..count {
            let free = self.blocks.iter().filter(|(_, entry)| entry.slot.is_some() && entry.leases.is_empty());
            let first = free.min_by_key(|(_, entry)| (entry.terms.priority, entry.used));
            let Some(key) = first.map(|(&key, _)| key) else { break };
            slots.extend(self.blocks.remove(&key).and_then(|entry| entry.slot));
        }
        slots
    }
}

impl Model {
    /// A store of `key` shares what is there.
    fn share(&mut self, key: usize, terms: Terms) {
        if let Some(entry) = self.blocks.get_mut(&key) {
            entry.terms.priority = entry.terms.priority.max(terms.priority);
            entry.terms.until = entry.terms.until.max(terms.until);
        }
    }

    fn told(&self, key: usize) -> bool {
        self.ready(key) && self.blocks[&key].terms.until == FOREVER
    }

    fn pass(&mut self, ticks: Tick) -> usize {
        self.now += ticks;
        let before = self.blocks.len();
        self.blocks.retain(|_, entry| entry.terms.until > self.now);
        before - self.blocks.len()
    }
}

struct OpenStore {
    store: usize,
    run: Range<usize>,
    writing: Writing,
    present: Held<Lru>,
    lease: usize,
}

struct OpenLease {
    lease: Lease,
    number: usize,
    ranks: Vec<(usize, usize)>,
}

/// The real index and the model, driven by the same calls.
struct Pair {
    index: Arc<Index>,
    pool: SlotPool,
    model: Model,
    stores: Vec<OpenStore>,
    leases: Vec<OpenLease>,
    /// The blocks that somebody who only hears of changes takes for visible.
    heard: BTreeSet<BlockKey>,
}

impl Pair {
    fn new() -> Self {
        let (index, pool) = new(1000);
        index.watch();
        let heard = BTreeSet::new();
        Self { index, pool, model: Model::default(), stores: Vec::new(), leases: Vec::new(), heard }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Reserve(run, terms) => self.reserve(run, terms),
            Op::Publish(i) if i < self.stores.len() => self.publish(i),
            Op::Abandon(i) if i < self.stores.len() => self.abandon(i),
            Op::Lease(run) => self.lease(run),
            Op::LeaseEach(run) => self.lease_each(run),
            Op::Release(i) if i < self.leases.len() => self.release(i),
            Op::Evict(count) => self.evict(count),
            Op::Clear => self.clear(),
            Op::Pass(ticks) => self.pass(ticks),
            Op::Listen => self.listen(),
            Op::Publish(_) | Op::Abandon(_) | Op::Release(_) => {}
        }
    }

    fn reserve(&mut self, run: Range<usize>, terms: Terms) {
        let until = if terms.until == FOREVER { FOREVER } else { self.model.now + terms.until };
        let each = vec![Terms { until, ..terms }; run.len()];
        let reserved = self.index.reserve_on(Keys::from_slices(&keys(run.clone())), &each);
        let terms = Terms { until: until.max(self.model.now + 1), ..terms };
        run.clone().for_each(|key| self.model.share(key, terms));
        let new: Vec<usize> = run.clone().filter(|key| !self.model.blocks.contains_key(key)).collect();
        let ready: Vec<usize> = run.clone().filter(|&key| self.model.ready(key)).collect();
        assert_eq!(reserved.reservation.len(), new.len());
        assert_eq!(reserved.ready.count(), ready.len());
        assert_eq!(reserved.pending, run.len() - new.len() - ready.len());
        let lease = self.model.lease(ready.into_iter());
        let store = lease;
        for &key in &new {
            self.model.blocks.insert(key, Entry { store, slot: None, leases: Vec::new(), used: 0, terms });
        }
        let writing = reserved.reservation.begin(self.pool.claim_many(new.len()));
        let positions: Vec<usize> = writing.steps().map(|(position, _)| run.start + position as usize).collect();
        assert_eq!(positions, new);
        self.stores.push(OpenStore { store, run, writing, present: reserved.held, lease });
    }

    fn publish(&mut self, i: usize) {
        let OpenStore { store, run, writing, present, lease } = self.stores.swap_remove(i);
        let steps: Vec<_> = writing.steps().collect();
        let newest = self.model.tick(steps.len());
        let mut visible = 0;
        for (rank, (position, slot)) in (0_u64..).zip(steps) {
            let entry = self.model.blocks.get_mut(&(run.start + position as usize));
            if let Some(entry) = entry.filter(|entry| entry.store == store && entry.slot.is_none()) {
                (entry.slot, entry.used) = (Some(slot), newest - rank);
                visible += 1;
            }
        }
        assert_eq!(writing.publish(), visible);
        drop(present);
        self.release_present(lease, &run);
    }

    fn abandon(&mut self, i: usize) {
        let OpenStore { store, run, writing, present, lease } = self.stores.swap_remove(i);
        self.model.blocks.retain(|_, entry| entry.store != store || entry.slot.is_some());
        drop(writing);
        drop(present);
        self.release_present(lease, &run);
    }

    fn release_present(&mut self, lease: usize, run: &Range<usize>) {
        let ranks: Vec<_> = run.clone().enumerate().map(|(rank, key)| (key, rank)).collect();
        let held: Vec<_> = ranks.into_iter().filter(|(key, _)| self.holds(lease, *key)).collect();
        // Blocks that were forgotten while held still took their ticks.
        self.model.release(lease, &held);
    }

    fn holds(&self, lease: usize, key: usize) -> bool {
        self.model.blocks.get(&key).is_some_and(|entry| entry.leases.contains(&lease))
    }

    fn lease(&mut self, run: Range<usize>) {
        let keys = keys(run.clone());
        let expected = self.model.prefix(&run);
        assert_eq!(self.index.prefix_len(Keys::from_slices(&keys)), expected);
        let lease = self.index.lease_prefix(Keys::from_slices(&keys));
        self.took(lease, run.clone().take(expected).enumerate().map(|(rank, key)| (key, rank)).collect());
    }

    fn lease_each(&mut self, run: Range<usize>) {
        let keys = keys(run.clone());
        let (lease, mask) = self.index.lease_each(Keys::from_slices(&keys));
        assert_eq!(mask, self.index.ready_mask(Keys::from_slices(&keys)));
        let here = run.enumerate().filter(|&(_, key)| self.model.ready(key));
        let ranks: Vec<_> = here.map(|(rank, key)| (key, rank)).collect();
        assert!(ranks.iter().all(|&(_, rank)| mask.get(rank)));
        self.took(lease, ranks);
    }

    fn took(&mut self, lease: Lease, ranks: Vec<(usize, usize)>) {
        let number = self.model.lease(ranks.iter().map(|&(key, _)| key));
        let slots: Vec<_> = ranks.iter().map(|(key, _)| self.model.blocks[key].slot.unwrap()).collect();
        assert_eq!(lease.slots(), slots);
        self.leases.push(OpenLease { lease, number, ranks });
    }

    fn release(&mut self, i: usize) {
        let OpenLease { lease, number, ranks } = self.leases.swap_remove(i);
        drop(lease);
        self.model.release(number, &ranks);
    }

    fn evict(&mut self, count: usize) {
        let slots: Vec<_> = self.index.evict(count).iter().map(SlotClaim::id).collect();
        assert_eq!(slots, self.model.evict(count));
    }

    fn clear(&mut self) {
        let ready = self.model.blocks.values().filter(|entry| entry.slot.is_some()).count();
        assert_eq!(self.index.clear(), ready);
        self.model.blocks.clear();
    }

    fn pass(&mut self, ticks: Tick) {
        let gone = self.model.pass(ticks);
        assert_eq!(self.index.expire(self.model.now), gone);
    }

    fn listen(&mut self) {
        let changed = self.index.take_changes();
        assert!(changed.removed.len() <= self.heard.len(), "no more is told than was heard");
        for key in changed.removed {
            assert!(self.heard.remove(&key), "removed, but never stored");
        }
        for key in changed.stored {
            assert!(self.heard.insert(key), "stored twice");
        }
        let visible: BTreeSet<_> =
            (0..90).filter(|&i| self.model.told(i)).map(|i| Keys::from_slices(&[key(i)]).get(0)).collect();
        assert_eq!(self.heard, visible);
    }

    fn check(&self) {
        self.index.validate();
        let all = keys(0..90);
        let mask = self.index.ready_mask(Keys::from_slices(&all));
        assert!((0..90).all(|key| mask.get(key) == self.model.ready(key)));
        assert_eq!(self.index.stats().ready, mask.count());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn agrees_with_the_model(ops in prop::collection::vec(op(), 1..80)) {
        let mut pair = Pair::new();
        for op in ops {
            pair.apply(op);
            pair.check();
        }
        let Pair { index, pool, stores, leases, .. } = pair;
        drop((stores, leases));
        index.clear();
        index.validate();
        prop_assert_eq!(pool.free(), pool.total(), "every slot came back");
    }
}

fn store(index: &Arc<Index>, pool: &SlotPool, run: Range<usize>) {
    let reserved = index.reserve(Keys::from_slices(&keys(run.clone())));
    reserved.reservation.begin(pool.claim_many(run.len())).publish();
}

#[test]
fn the_tail_of_a_prefix_goes_before_its_head_over_all_shards() {
    let (index, pool) = new(1000);
    store(&index, &pool, 0..500);
    for left in (0..500).rev() {
        assert_eq!(index.evict(1).len(), 1);
        assert_eq!(index.prefix_len(Keys::from_slices(&keys(0..500))), left);
    }
    assert!(index.evict(1).is_empty());
}

#[test]
fn a_lookup_shortened_by_a_hole_leases_nothing_behind_it() {
    let (index, pool) = new(2000);
    store(&index, &pool, 0..700);
    store(&index, &pool, 701..2000);
    let lease = index.lease_prefix(Keys::from_slices(&keys(0..2000)));
    assert_eq!((lease.len(), index.stats().leased), (700, 700));
    drop(lease);
    assert_eq!(index.stats().leased, 0);
    index.validate();
}

#[test]
fn when_all_is_leased_nothing_is_evicted() {
    let (index, pool) = new(100);
    store(&index, &pool, 0..100);
    let lease = index.lease_prefix(Keys::from_slices(&keys(0..100)));
    assert!(index.evict(5).is_empty());
    drop(lease);
    assert_eq!(index.evict(5).len(), 5);
}

#[test]
fn the_lower_priority_goes_first_however_recently_it_was_used() {
    let (index, pool) = new(100);
    let kept = |run: Range<usize>, priority| {
        let terms = vec![Terms { priority, ..Terms::default() }; run.len()];
        let reserved = index.reserve_on(Keys::from_slices(&keys(run.clone())), &terms);
        reserved.reservation.begin(pool.claim_many(run.len())).publish();
    };
    kept(0..10, Priority::High);
    kept(10..20, Priority::Normal);
    kept(20..30, Priority::Low);
    drop(index.lease_prefix(Keys::from_slices(&keys(20..30))));
    index.evict(10);
    assert_eq!(index.ready_mask(Keys::from_slices(&keys(0..30))).count(), 20);
    assert_eq!(index.prefix_len(Keys::from_slices(&keys(20..30))), 0);
    // Shared at a higher priority, a block stays longer; at a lower one it is what it was.
    kept(10..15, Priority::High);
    kept(0..10, Priority::Low);
    index.evict(5);
    assert_eq!(index.prefix_len(Keys::from_slices(&keys(0..20))), 15);
}

#[test]
fn what_expires_under_a_lease_is_a_miss_and_its_slot_stays_until_the_lease_ends() {
    let (index, pool) = new(10);
    let run = keys(0..4);
    let reserved = index.reserve_on(Keys::from_slices(&run), &[Terms { until: 5, ..Terms::default() }; 4]);
    reserved.reservation.begin(pool.claim_many(4)).publish();
    let lease = index.lease_prefix(Keys::from_slices(&run));
    assert_eq!((index.expire(4), lease.len()), (0, 4));
    assert_eq!(index.expire(5), 4);
    assert_eq!((index.prefix_len(Keys::from_slices(&run)), pool.free()), (0, 6));
    drop(lease);
    assert_eq!((pool.free(), index.expire(5)), (10, 0));
    index.validate();
}

#[test]
fn watching_begins_with_what_is_there() {
    let (index, pool) = new(10);
    store(&index, &pool, 0..3);
    index.watch();
    let changed = index.take_changes();
    assert_eq!((changed.stored.len(), changed.removed.len()), (3, 0));
    index.clear();
    store(&index, &pool, 2..3);
    assert_eq!(index.take_changes().removed.len(), 2, "what came again did not change");
    assert_eq!(index.take_changes(), Changed::default());
}

/// A key that comes twice in one call gets one block.
#[test]
fn a_key_that_comes_twice_is_stored_once() {
    let (index, pool) = new(10);
    let twice = [key(1), key(2), key(1)];
    let reserved = index.reserve(Keys::from_slices(&twice));
    assert_eq!((reserved.reservation.len(), reserved.pending), (2, 1));
    reserved.reservation.begin(pool.claim_many(2)).publish();
    let (lease, mask) = index.lease_each(Keys::from_slices(&twice));
    assert!(mask.all());
    assert_eq!(lease.slots()[0], lease.slots()[2]);
    drop(lease);
    assert_eq!(index.evict(10).len(), 2);
}

#[test]
fn too_few_slots_leave_the_tail_out() {
    let (index, pool) = new(3);
    let reserved = index.reserve(Keys::from_slices(&keys(0..5)));
    let writing = reserved.reservation.begin(pool.claim_many(5));
    assert_eq!(writing.steps().map(|(position, _)| position).collect::<Vec<_>>(), [0, 1, 2]);
    writing.publish();
    assert_eq!(index.prefix_len(Keys::from_slices(&keys(0..5))), 3);
    index.validate();
}

/// The formula of docs/architecture.md: a node of 64 bytes, an LRU link of 16 and 5 bytes of table for each place, where
/// vectors and tables have at most about twice the places that are used.
#[test]
fn memory_per_block_follows_the_formula() {
    let empty = new(1).0.stats().bytes;
    for blocks in [10_000, 65_536, 100_000, 150_000] {
        let (index, pool) = new(blocks);
        store(&index, &pool, 0..blocks as usize);
        let per_block = (index.stats().bytes - empty) as f64 / f64::from(blocks);
        assert!((64.0 + 16.0 + 5.0..=2.0 * (64.0 + 16.0) + 5.0 * 16.0 / 7.0).contains(&per_block), "{per_block}");
    }
}

#[test]
fn memory_does_not_grow_with_churn() {
    let (index, pool) = new(2000);
    let mut bytes = Vec::new();
    for round in 0..50 {
        drop(index.evict(1000));
        store(&index, &pool, round * 1000..round * 1000 + 1000);
        bytes.push(index.stats().bytes);
    }
    assert!(bytes[49] <= bytes[5] * 11 / 10, "{bytes:?}");
}
