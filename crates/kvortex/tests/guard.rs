//! A guarded tier keeps the contract, and one that hangs or fails behind the guard costs nobody time or slots.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod folder;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use folder::*;
use kvortex::tier::guard::{Guard, GuardOptions};
use kvortex::tier::suite::{PATIENCE, World, conforms, has, key};
use kvortex::tier::{Landing, Offer, Put, Tier, TierStats, Want};
use kvortex::{BlockMask, Keys};
use kvortex_mem::slots::{SlotClaim, SlotId};

const SHORT: Duration = Duration::from_millis(400);
/// Longer than a first pause.
const PAUSE: Duration = Duration::from_millis(320);

#[test]
fn a_guarded_disk_keeps_the_contract() {
    conforms(&|| {
        let folder = Folder::new("guarded");
        let (world, tier) = fresh(folder.config(64), vec![folder]);
        (world, Box::new(Guard::new(Arc::from(tier), GuardOptions::default())))
    });
}

#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Lands,
    Hangs,
    Fails,
    /// Says so at once, without an error.
    Misses,
    Blocks,
}

/// A tier that does what a test tells it to.
struct Moody {
    mood: Mutex<Mood>,
    asked: AtomicUsize,
    errors: AtomicUsize,
    held: Mutex<Vec<Want>>,
}

impl Moody {
    fn new() -> Arc<Self> {
        let (mood, held) = (Mutex::new(Mood::Lands), Mutex::default());
        Arc::new(Self { mood, asked: AtomicUsize::new(0), errors: AtomicUsize::new(0), held })
    }

    fn turn(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Tier for Moody {
    fn name(&self) -> &'static str {
        "moody"
    }

    fn contains(&self, keys: Keys<'_>, _deadline: Instant) -> BlockMask {
        if *self.mood.lock().unwrap() == Mood::Blocks {
            std::thread::sleep(2 * SHORT);
        }
        let mut mask = BlockMask::new(keys.len());
        (0..keys.len()).for_each(|i| mask.set(i));
        mask
    }

    fn put(&self, offers: Vec<Offer>) -> Vec<Put> {
        vec![Put::Queued; offers.len()]
    }

    fn get(&self, wants: Vec<Want>, _deadline: Instant) {
        self.asked.fetch_add(wants.len(), Ordering::Relaxed);
        match *self.mood.lock().unwrap() {
            Mood::Lands => wants.into_iter().for_each(|want| want.landing.land()),
            Mood::Hangs => self.held.lock().unwrap().extend(wants),
            Mood::Fails => drop(self.errors.fetch_add(wants.len(), Ordering::Relaxed)),
            Mood::Misses | Mood::Blocks => {}
        }
    }

    fn remove(&self, _keys: Keys<'_>, _deadline: Instant) -> usize {
        0
    }

    fn clear(&self) -> bool {
        true
    }

    fn flush(&self, _patience: Duration) -> bool {
        true
    }

    fn stop(&self, _patience: Duration) -> bool {
        true
    }

    fn stats(&self) -> TierStats {
        TierStats { errors: self.errors.load(Ordering::Relaxed) as u64, ..TierStats::default() }
    }
}

/// A slot of the tests' world, and where it is counted that it landed.
struct Place(SlotClaim, Arc<AtomicUsize>);

impl Landing for Place {
    fn slot(&self) -> SlotId {
        self.0.id()
    }

    fn land(self: Box<Self>) {
        self.1.fetch_add(1, Ordering::Relaxed);
    }
}

struct Rig {
    world: World,
    moody: Arc<Moody>,
    guard: Guard,
    landed: Arc<AtomicUsize>,
}

impl Rig {
    fn new(options: GuardOptions) -> Self {
        let moody = Moody::new();
        let guard = Guard::new(Arc::clone(&moody) as Arc<dyn Tier>, options);
        Self { world: World::new(64, BLOCK), moody, guard, landed: Arc::default() }
    }

    /// Asks for blocks; how many the tier behind was asked for.
    fn get(&self, count: usize) -> usize {
        let before = self.moody.asked();
        let claims = self.world.arena.slots().claim_many(count);
        let want = |(i, claim)| Want { key: key(i), landing: Box::new(Place(claim, Arc::clone(&self.landed))) };
        let start = Instant::now();
        self.guard.get(claims.into_iter().enumerate().map(want).collect(), start + SHORT);
        assert!(start.elapsed() < SHORT, "a get returns at once");
        self.moody.asked() - before
    }

    fn free(&self) -> usize {
        self.world.arena.slots().free()
    }
}

#[test]
fn a_tier_that_hangs_is_left_alone_and_tried_again() {
    let rig = Rig::new(GuardOptions { patience: 1, most_wanted: 8 });
    assert_eq!((rig.get(4), rig.free()), (4, 64));
    rig.moody.turn(Mood::Hangs);
    assert_eq!((rig.get(4), rig.free()), (4, 60), "it holds what it was asked for");
    assert_eq!(rig.get(6), 4, "and no more than it may");
    assert_eq!(rig.free(), 56);
    std::thread::sleep(2 * SHORT);
    assert_eq!((rig.get(4), rig.free()), (0, 56), "it is not asked, and the slots are back");
    assert!(rig.guard.stats().failing);
    assert_eq!(has(&rig.guard, 0..2), [false, false]);
    assert_eq!(rig.world.put(&rig.guard, [1]), [Put::Dropped]);
    rig.moody.turn(Mood::Lands);
    drop(std::mem::take(&mut *rig.moody.held.lock().unwrap()));
    assert_eq!(rig.free(), 64);
    std::thread::sleep(PAUSE);
    assert_eq!(rig.get(4), 4);
    assert!(!rig.guard.stats().failing);
    assert_eq!(rig.landed.load(Ordering::Relaxed), 8);
    assert_eq!(has(&rig.guard, 0..2), [true, true]);
    assert_eq!((rig.guard.stats().misses, rig.guard.stats().dropped), (2 + 4, 1));
}

#[test]
fn a_tier_that_fails_is_left_alone_after_its_patience() {
    let rig = Rig::new(GuardOptions { patience: 3, most_wanted: 64 });
    rig.moody.turn(Mood::Fails);
    assert_eq!((0..6).map(|_| rig.get(2)).collect::<Vec<_>>(), [2, 2, 2, 0, 0, 0]);
    std::thread::sleep(PAUSE);
    assert_eq!(rig.get(2), 2, "one try");
    assert_eq!(rig.get(2), 0, "decides");
    assert_eq!(rig.free(), 64);
}

#[test]
fn a_miss_is_no_fault_and_a_success_between_faults_forgives() {
    let rig = Rig::new(GuardOptions { patience: 2, most_wanted: 64 });
    rig.moody.turn(Mood::Misses);
    (0..10).for_each(|_| assert_eq!(rig.get(2), 2));
    for mood in [Mood::Fails, Mood::Lands, Mood::Fails, Mood::Lands, Mood::Fails, Mood::Lands] {
        rig.moody.turn(mood);
        assert_eq!(rig.get(2), 2);
    }
    assert!(!rig.guard.stats().failing);
}

#[test]
fn a_lookup_that_comes_too_late_is_a_miss_and_a_fault() {
    let rig = Rig::new(GuardOptions { patience: 1, most_wanted: 64 });
    rig.moody.turn(Mood::Blocks);
    let keys = [*key(1).as_bytes()];
    let ask = |time| rig.guard.contains(Keys::from_slices(&keys), Instant::now() + time).count();
    assert_eq!(ask(PATIENCE), 1);
    assert_eq!(ask(SHORT), 0);
    let start = Instant::now();
    assert_eq!(ask(SHORT), 0);
    assert!(start.elapsed() < SHORT, "it is not asked any more");
}
