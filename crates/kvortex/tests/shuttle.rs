//! Random schedules of the planner and the index. Every slot holds the number of the key whose bytes are in it, written one
//! yield at a time; whoever holds a lease must read the number of its key, before and after any other thread ran.
#![cfg(shuttle)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use kvortex::eviction::Watermarks;
use kvortex::planner::Planner;
use kvortex::terms::{Priority, Terms, Tick};
use kvortex::tier::host::SlotPool;
use kvortex::{BlockKey, Keys};
use shuttle::sync::{Arc, Mutex};
use shuttle::thread;

const SCHEDULES: usize = 1000;
const TORN: u64 = u64::MAX;

struct World {
    planner: Planner,
    slots: SlotPool,
    bytes: Vec<AtomicU64>,
    /// What somebody who only hears of changes takes for visible.
    heard: Mutex<BTreeSet<BlockKey>>,
}

fn world(slots: u32) -> Arc<World> {
    let pool = SlotPool::new(slots);
    let planner = Planner::new(pool.clone(), Watermarks::new(slots as usize, 1.0, 0.0), Default::default());
    planner.index().watch();
    let bytes = (0..slots).map(|_| AtomicU64::new(0)).collect();
    Arc::new(World { planner, slots: pool, bytes, heard: Mutex::default() })
}

fn keys(ids: std::ops::Range<u64>) -> Vec<[u8; 32]> {
    ids.map(|id| {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&id.to_le_bytes());
        key
    })
    .collect()
}

fn id(key: &[u8; 32]) -> u64 {
    key[..8].iter().rev().fold(0, |id, &byte| id << 8 | u64::from(byte))
}

impl World {
    fn save(&self, run: &[[u8; 32]], succeeds: bool) {
        self.save_on(run, Terms::default(), succeeds);
    }

    fn save_on(&self, run: &[[u8; 32]], terms: Terms, succeeds: bool) {
        let planned = self.planner.plan_store_on(Keys::from_slices(run), &vec![terms; run.len()]);
        for step in &planned.plan.steps {
            let bytes = &self.bytes[step.slot.0 as usize];
            bytes.store(TORN, Relaxed);
            thread::yield_now();
            bytes.store(id(&run[step.page as usize]), Relaxed);
        }
        self.planner.settle(planned.plan.ticket, succeeds);
    }

    fn load(&self, run: &[[u8; 32]]) {
        let (plan, mask) = self.planner.plan_load(Keys::from_slices(run));
        assert_eq!(plan.steps.len(), mask.count());
        for _ in 0..2 {
            for step in &plan.steps {
                let found = self.bytes[step.slot.0 as usize].load(Relaxed);
                assert_eq!(found, id(&run[step.page as usize]), "a lease does not keep its bytes");
            }
            thread::yield_now();
        }
        self.planner.settle(plan.ticket, true);
    }

    fn lease_prefix(&self, run: &[[u8; 32]]) {
        let lease = self.planner.index().lease_prefix(Keys::from_slices(run));
        thread::yield_now();
        for (key, slot) in run.iter().zip(lease.slots()) {
            assert_eq!(self.bytes[slot.0 as usize].load(Relaxed), id(key), "a lease does not keep its bytes");
        }
    }

    /// Takes in what has changed.
    fn listen(&self) {
        let mut heard = self.heard.lock().unwrap();
        let changed = self.planner.index().take_changes();
        assert!(changed.removed.iter().all(|key| heard.remove(key)), "removed, but never stored");
        assert!(changed.stored.into_iter().all(|key| heard.insert(key)), "stored twice");
    }

    /// After all threads: nothing is in flight, and forgetting everything frees every slot.
    fn assert_clean(&self) {
        assert_eq!(self.planner.in_flight(), 0);
        self.planner.index().validate();
        let stats = self.planner.index_stats();
        assert_eq!(stats.leased, 0);
        assert_eq!(self.slots.total() - self.slots.free(), stats.ready, "a slot leaked");
        self.listen();
        let heard: Vec<_> = self.heard.lock().unwrap().iter().map(|key| *key.as_bytes()).collect();
        // Whatever is mortal goes; the rest was told of.
        self.planner.index().expire(Tick::MAX - 1);
        assert_eq!(heard.len(), self.planner.index_stats().ready);
        assert!(self.planner.index().ready_mask(Keys::from_slices(&heard)).all(), "what was heard is not there");
        self.planner.index().clear();
        assert_eq!(self.slots.free(), self.slots.total());
    }
}

fn schedules(slots: u32, threads: &'static [fn(&World)]) {
    let schedules = std::env::var("KVORTEX_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(SCHEDULES);
    shuttle::check_random(
        move || {
            let world = world(slots);
            let run = |act: &'static fn(&World)| {
                let world = Arc::clone(&world);
                thread::spawn(move || act(&world))
            };
            let threads: Vec<_> = threads.iter().map(run).collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            world.assert_clean();
        },
        schedules,
    );
}

#[test]
fn two_savers_of_one_run_and_a_reader() {
    schedules(8, &[|w| w.save(&keys(0..4), true), |w| w.save(&keys(2..6), true), |w| w.load(&keys(0..6))]);
}

#[test]
fn eviction_against_leases() {
    schedules(
        4,
        &[
            |w| {
                w.save(&keys(0..3), true);
                w.load(&keys(0..3));
            },
            |w| w.save(&keys(10..13), true),
            |w| {
                w.lease_prefix(&keys(0..3));
                w.save(&keys(20..22), true);
                w.load(&keys(20..22));
            },
        ],
    );
}

#[test]
fn reset_against_writers_and_readers() {
    schedules(
        6,
        &[
            |w| {
                w.save(&keys(0..4), true);
                w.load(&keys(0..4));
            },
            |w| {
                w.planner.index().clear();
                w.save(&keys(0..4), true);
            },
            |w| w.lease_prefix(&keys(0..4)),
        ],
    );
}

#[test]
fn failing_saves_against_saves_of_the_same_keys() {
    schedules(
        4,
        &[
            |w| w.save(&keys(0..3), false),
            |w| w.save(&keys(1..4), true),
            |w| {
                w.load(&keys(0..4));
                w.planner.index().evict(2);
            },
        ],
    );
}

#[test]
fn expiry_against_writers_readers_and_eviction() {
    schedules(
        4,
        &[
            |w| {
                w.save_on(&keys(0..3), Terms { priority: Priority::Low, until: 2 }, true);
                w.planner.index().expire(3);
            },
            |w| {
                w.load(&keys(0..3));
                w.planner.index().expire(2);
                w.save_on(&keys(1..4), Terms { until: 5, ..Terms::default() }, true);
            },
            |w| {
                w.save_on(&keys(0..2), Terms { priority: Priority::High, until: 4 }, true);
                w.lease_prefix(&keys(0..3));
                w.planner.index().expire(5);
            },
        ],
    );
}

#[test]
fn changes_are_heard_while_others_save_evict_and_reset() {
    schedules(
        3,
        &[
            |w| {
                w.save_on(&keys(0..3), Terms { until: 2, ..Terms::default() }, true);
                w.save(&keys(1..3), true);
            },
            |w| {
                w.save(&keys(10..12), true);
                w.planner.index().expire(2);
                w.planner.index().clear();
            },
            |w| {
                for _ in 0..3 {
                    w.listen();
                    thread::yield_now();
                }
            },
        ],
    );
}

#[test]
fn a_full_pool_under_three_savers() {
    schedules(
        3,
        &[
            |w| w.save(&keys(0..3), true),
            |w| w.save(&keys(10..13), true),
            |w| {
                w.save(&keys(20..22), true);
                w.load(&keys(20..22));
            },
        ],
    );
}
