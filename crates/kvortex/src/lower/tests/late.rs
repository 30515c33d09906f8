//! Reads that end whenever they like, in random schedules: what a lease shows is always what was kept under its key since the
//! last reset, in a slot that nobody writes.

use std::collections::HashSet;
use std::ops::Range;

use proptest::prelude::*;

use super::super::*;
use super::keys;
use crate::eviction::Watermarks;
use crate::lease::Lease;
use crate::mask::BlockMask;
use crate::plan::TicketId;
use crate::sync::Mutex;
use crate::tier::host::{SlotId, SlotPool};
use crate::tier::{Put, Want};

const SLOTS: usize = 8;
const KEYS: u8 = 14;

/// Keeps what it is given until it is cleared, and ends no read by itself.
#[derive(Default)]
struct Slow {
    kept: Mutex<HashSet<[u8; KEY_BYTES]>>,
    asked: Mutex<Vec<Want>>,
}

impl Tier for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn contains(&self, keys: Keys<'_>, _: Instant) -> BlockMask {
        let (kept, mut mask) = (self.kept.lock(), BlockMask::new(keys.len()));
        (0..keys.len()).filter(|&i| kept.contains(keys.get(i).as_bytes())).for_each(|i| mask.set(i));
        mask
    }

    fn put(&self, offers: Vec<Offer>) -> Vec<Put> {
        vec![Put::Refused; offers.len()]
    }

    fn get(&self, wants: Vec<Want>, _: Instant) {
        let kept = self.kept.lock();
        self.asked.lock().extend(wants.into_iter().filter(|want| kept.contains(want.key.as_bytes())));
    }

    fn remove(&self, _: Keys<'_>, _: Instant) -> usize {
        0
    }

    fn clear(&self) -> bool {
        self.kept.lock().clear();
        true
    }

    fn flush(&self, _: Duration) -> bool {
        true
    }

    fn stop(&self, _: Duration) -> bool {
        self.asked.lock().clear();
        true
    }

    fn stats(&self) -> TierStats {
        TierStats::default()
    }
}

/// What may happen. Numbers choose among what there is.
#[derive(Clone, Debug)]
enum Event {
    Ask(Range<u8>),
    Release(usize),
    Forget(usize),
    /// A read ends, well or not.
    Read(usize, bool),
    Store(Range<u8>),
    /// The copies of a store end, well or not.
    Stored(usize, bool),
    Lease(Range<u8>),
    Leave(usize),
    Reset,
}

fn event() -> impl Strategy<Value = Event> {
    let run = || (0..KEYS, 1..KEYS).prop_map(|(first, count)| first..KEYS.min(first + count));
    let prefix = || (1..=KEYS).prop_map(|end| 0..end);
    prop_oneof![
        4 => prefix().prop_map(Event::Ask),
        2 => any::<usize>().prop_map(Event::Release),
        2 => any::<usize>().prop_map(Event::Forget),
        8 => (any::<usize>(), proptest::bool::weighted(0.8)).prop_map(|(at, ok)| Event::Read(at, ok)),
        4 => prop_oneof![run(), prefix()].prop_map(Event::Store),
        4 => (any::<usize>(), proptest::bool::weighted(0.8)).prop_map(|(at, ok)| Event::Stored(at, ok)),
        3 => prefix().prop_map(Event::Lease),
        3 => any::<usize>().prop_map(Event::Leave),
        1 => Just(Event::Reset),
    ]
}

/// A key, and how many resets there had been when its bytes were computed.
type Bytes = ([u8; KEY_BYTES], u64);

struct Stores {
    ticket: TicketId,
    steps: Vec<(Bytes, SlotId)>,
}

struct World {
    lower: Lower,
    slow: Arc<Slow>,
    epoch: u64,
    /// What each slot holds; `None` while it is being written, or was given up then.
    memory: Vec<Option<Bytes>>,
    promotions: Vec<Promotion>,
    /// When each of the reads was asked for.
    reads: Vec<(Want, u64)>,
    stores: Vec<Stores>,
    leases: Vec<(Lease, Vec<Bytes>)>,
    late: usize,
}

fn take<T>(from: &mut Vec<T>, at: usize) -> Option<T> {
    (!from.is_empty()).then(|| from.swap_remove(at % from.len()))
}

impl World {
    fn new() -> Self {
        let (pool, slow) = (SlotPool::new(SLOTS as u32), Arc::<Slow>::default());
        slow.kept.lock().extend(keys(0..KEYS));
        let planner = Planner::new(pool.clone(), Watermarks::new(pool.total(), 1.0, 0.0), Arc::default());
        let lower = Lower::new(slow.clone(), Arc::new(planner), 4096, Duration::from_secs(60)).expect("a thread");
        let (promotions, reads, stores, leases) = Default::default();
        Self { lower, slow, epoch: 0, memory: vec![None; SLOTS], promotions, reads, stores, leases, late: 0 }
    }

    fn planner(&self) -> &Planner {
        &self.lower.below.planner
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Ask(run) => self.ask(&keys(run)),
            Event::Release(at) if !self.promotions.is_empty() => self.promotions[at % self.promotions.len()].release(),
            Event::Forget(at) => drop(take(&mut self.promotions, at)),
            Event::Read(at, ok) => self.read(at, ok),
            Event::Store(run) => self.store(&keys(run)),
            Event::Stored(at, ok) => self.stored(at, ok),
            Event::Lease(run) => self.lease(&keys(run)),
            Event::Leave(at) => drop(take(&mut self.leases, at)),
            Event::Reset => {
                self.lower.reset();
                self.epoch += 1;
            }
            Event::Release(_) => {}
        }
        self.check();
    }

    fn ask(&mut self, run: &[[u8; KEY_BYTES]]) {
        let Some(promotion) = self.lower.find(Keys::from_slices(run), Reach::Prefix) else { return };
        self.lower.below.begin(promotion.start());
        self.promotions.push(promotion);
        let asked = std::mem::take(&mut *self.slow.asked.lock());
        for want in asked {
            self.write(want.landing.slot());
            self.reads.push((want, self.epoch));
        }
    }

    fn read(&mut self, at: usize, ok: bool) {
        let Some((want, epoch)) = take(&mut self.reads, at) else { return };
        if ok {
            self.late += usize::from(epoch < self.epoch);
            self.memory[want.landing.slot().0 as usize] = Some((*want.key.as_bytes(), epoch));
            want.landing.land();
        }
    }

    fn store(&mut self, run: &[[u8; KEY_BYTES]]) {
        let plan = self.planner().plan_store(Keys::from_slices(run)).plan;
        plan.steps.iter().for_each(|step| self.write(step.slot));
        let steps = plan.steps.iter().map(|step| ((run[step.page as usize], self.epoch), step.slot)).collect();
        self.stores.push(Stores { ticket: plan.ticket, steps });
    }

    fn stored(&mut self, at: usize, ok: bool) {
        let Some(Stores { ticket, steps }) = take(&mut self.stores, at) else { return };
        for &(bytes, slot) in steps.iter().filter(|_| ok) {
            self.memory[slot.0 as usize] = Some(bytes);
        }
        self.planner().settle(ticket, ok);
        let lasting = steps.iter().filter(|((_, epoch), _)| ok && *epoch == self.epoch);
        self.slow.kept.lock().extend(lasting.map(|((key, _), _)| *key));
    }

    fn lease(&mut self, run: &[[u8; KEY_BYTES]]) {
        let lease = self.planner().index().lease_prefix(Keys::from_slices(run));
        let shown = run[..lease.len()].iter().map(|key| (*key, self.epoch)).collect();
        self.leases.push((lease, shown));
    }

    /// Somebody begins to write a slot, which nobody else writes or reads.
    fn write(&mut self, slot: SlotId) {
        let copied = self.stores.iter().flat_map(|store| &store.steps).map(|(_, other)| *other);
        let read = self.reads.iter().map(|(want, _)| want.landing.slot());
        let leased = self.leases.iter().flat_map(|(lease, _)| lease.slots()).copied();
        assert!(!copied.chain(read).chain(leased).any(|other| other == slot), "{slot:?} is somebody else's");
        self.memory[slot.0 as usize] = None;
    }

    /// All leases, and all that a new one would show.
    fn check(&self) {
        let all = keys(0..KEYS);
        let (lease, there) = self.planner().index().lease_each(Keys::from_slices(&all));
        let visible = (0..all.len()).filter(|&i| there.get(i)).map(|i| (all[i], self.epoch)).collect();
        for (lease, shown) in self.leases.iter().chain([&(lease, visible)]) {
            for (slot, bytes) in lease.slots().iter().zip(shown) {
                assert_eq!(self.memory[slot.0 as usize], Some(*bytes), "{slot:?} holds something else");
            }
        }
    }

    /// All that is under way ends.
    fn end(mut self) -> usize {
        while !self.reads.is_empty() {
            self.read(0, true);
            self.check();
        }
        (0..self.stores.len()).for_each(|_| self.stored(0, true));
        self.leases.clear();
        self.check();
        self.promotions.clear();
        assert_eq!(self.planner().index_stats().leased, 0);
        assert_eq!(self.planner().in_flight(), 0);
        assert!(self.lower.below.coming.lock().is_empty());
        self.planner().index().validate();
        self.late
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn what_ends_late_is_never_shown_as_something_else(events in prop::collection::vec(event(), 1..120)) {
        let mut world = World::new();
        events.into_iter().for_each(|event| world.happen(event));
        world.end();
    }
}

#[test]
fn these_schedules_have_reads_that_outlive_a_reset() {
    let mut world = World::new();
    world.happen(Event::Ask(0..4));
    world.happen(Event::Read(0, true));
    world.happen(Event::Reset);
    world.happen(Event::Store(0..4));
    assert_eq!(world.reads.len(), 3);
    assert_eq!(world.end(), 3);
}
