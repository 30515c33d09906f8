//! One planner and several movers: what becomes visible, and when.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod common;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Key, key};
use kvortex::ranks::{Ended, RankBoard, RankMover, RankPlanner, RankTicket, Seat};
use kvortex::terms::{Priority, Terms, tick_at};
use kvortex::{BlockKey, EngineConfig, Keys, Namespace, SlotId};
use kvortex_mem::MemError;
use kvortex_mem::copy::{CopyEngine, Done, HostCopy, Transfer};
use kvortex_mem::device::RawStream;
use kvortex_mem::span::{Pages, Region};

const BLOCK: usize = 4096;
const SLOTS: usize = 8;

/// Copies that the test ends one by one.
#[derive(Default)]
struct Held(Mutex<Vec<(Transfer, Done)>>);

impl Held {
    /// Ends the copy at `index`: makes it, or fails it.
    fn end(&self, index: usize, ok: bool) {
        let (transfer, done) = self.0.lock().unwrap().remove(index);
        let outcome =
            if ok { HostCopy::new(1).run(transfer) } else { Err(MemError::CopyFailed("the link is down".into())) };
        done(outcome);
    }
}

impl CopyEngine for Held {
    fn run(&self, transfer: Transfer) -> Result<(), MemError> {
        HostCopy::new(1).run(transfer)
    }

    fn submit(&self, transfer: Transfer, done: Done) -> Result<(), MemError> {
        self.0.lock().unwrap().push((transfer, done));
        Ok(())
    }

    fn fence(&self, _: RawStream, _: &Pages) -> Result<(), MemError> {
        Ok(())
    }

    fn stop(&self, _: Duration) -> bool {
        self.0.lock().unwrap().is_empty()
    }

    fn name(&self) -> &'static str {
        "held"
    }
}

struct World {
    planner: RankPlanner,
    movers: Vec<RankMover>,
    held: Vec<Arc<Held>>,
}

fn keys(count: usize) -> Vec<Key> {
    (0..count).map(key).collect()
}

fn engine_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("ranks-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn seat() -> Seat {
    Seat::fit(SLOTS * BLOCK, BLOCK, Namespace::default()).unwrap()
}

fn config() -> EngineConfig {
    EngineConfig { huge_pages: false, ..EngineConfig::new(SLOTS * BLOCK) }
}

fn world(ranks: usize) -> World {
    let (id, held) = (engine_id(), (0..ranks).map(|_| Arc::<Held>::default()).collect::<Vec<_>>());
    let planner = RankPlanner::new(RankBoard::join(&id, ranks).unwrap(), seat(), ranks, (1.0, 0.0)).unwrap();
    assert!(!planner.is_ready().unwrap(), "no rank is there");
    let mover = |rank: usize| {
        let board = RankBoard::join(&id, ranks).unwrap();
        RankMover::with_copies(&config(), (&board, rank), &seat(), held[rank].clone()).unwrap()
    };
    let movers = (0..ranks).map(mover).collect();
    assert!(planner.is_ready().unwrap());
    World { planner, movers, held }
}

fn pages(count: usize, value: u8) -> (Region, Pages) {
    let region = Region::from_vec(vec![value; count * BLOCK]);
    (region.clone(), Pages::contiguous(region, count).unwrap())
}

impl World {
    fn visible(&self, keys: &[[u8; 32]]) -> usize {
        self.planner.poll().unwrap();
        self.planner.lease_prefix(Keys::from_slices(keys)).unwrap().len()
    }

    /// Plans to store `keys` and gives the plan to every rank.
    fn store(&self, keys: &[[u8; 32]], rests_on: &[RankTicket]) -> RankTicket {
        let stored = self.planner.plan_store(Keys::from_slices(keys), rests_on).unwrap();
        let ticket = stored.ticket.expect("something is to be stored");
        for mover in &self.movers {
            mover.submit(ticket, &stored.slots, pages(stored.slots.len(), 1).1).unwrap();
        }
        ticket
    }

    /// Stores `keys` and ends it well on every rank.
    fn keep(&self, keys: &[[u8; 32]]) {
        self.store(keys, &[]);
        self.held.iter().for_each(|held| held.end(0, true));
        assert_eq!(self.visible(keys), keys.len());
    }

    fn plan_load(&self, keys: &[[u8; 32]], background: bool) -> (RankTicket, Vec<SlotId>) {
        let lease = self.planner.lease_prefix(Keys::from_slices(keys)).unwrap();
        assert_eq!(lease.len(), keys.len());
        self.planner.plan_load(lease, background).unwrap()
    }
}

#[test]
fn a_block_is_there_once_every_rank_has_it() {
    let (world, keys) = (world(2), keys(3));
    world.store(&keys, &[]);
    assert_eq!(world.visible(&keys), 0);
    world.held[1].end(0, true);
    assert_eq!(world.visible(&keys), 0, "rank 0 has not");
    world.held[0].end(0, true);
    assert_eq!(world.visible(&keys), 3);
}

#[test]
fn what_fails_on_one_rank_is_on_none() {
    let (world, keys) = (world(2), keys(3));
    world.store(&keys, &[]);
    world.held[0].end(0, true);
    world.held[1].end(0, false);
    assert_eq!(world.visible(&keys), 0);
    assert_eq!(world.planner.in_flight(), 0);
    assert_eq!(world.planner.room().1, 0, "its slots are free");
    world.keep(&keys);
}

#[test]
fn ends_out_of_order_are_told_in_order() {
    let (world, keys) = (world(1), keys(2));
    world.store(&keys[..1], &[]);
    world.store(&keys[1..], &[]);
    world.held[0].end(1, true);
    assert_eq!(world.visible(&keys[1..]), 0, "the one before it goes on");
    world.held[0].end(0, true);
    assert_eq!(world.visible(&keys), 2);
}

#[test]
fn a_plan_that_a_rank_never_saw_has_failed_there() {
    let (world, keys) = (world(2), keys(2));
    let lost = world.planner.plan_store(Keys::from_slices(&keys[..1]), &[]).unwrap();
    world.movers[0].submit(lost.ticket.unwrap(), &lost.slots, pages(1, 1).1).unwrap();
    world.store(&keys[1..], &[]);
    world.held[0].end(0, true);
    world.held.iter().for_each(|held| held.end(0, true));
    assert_eq!(world.visible(&keys[..1]), 0, "rank 1 never had it");
    assert_eq!(world.visible(&keys[1..]), 1);
}

#[test]
fn a_store_is_told_of_with_its_blocks_and_counted() {
    let (world, keys) = (world(2), keys(SLOTS + 2));
    world.planner.watch();
    let named = |changed: &[BlockKey]| changed.iter().map(|key| *key.as_bytes()).collect::<BTreeSet<_>>();
    let kept = world.store(&keys[..3], &[]);
    assert!(world.planner.take_watched().stores.is_empty());
    world.held.iter().for_each(|held| held.end(0, true));
    let lost = world.store(&keys[3..5], &[]);
    world.held.iter().for_each(|held| held.end(0, false));
    world.planner.poll().unwrap();
    let watched = world.planner.take_watched();
    assert_eq!(named(&watched.changed.stored), keys[..3].iter().copied().collect());
    assert_eq!(watched.stores, [Ended { ticket: kept, ok: true }, Ended { ticket: lost, ok: false }]);
    let refused = world.planner.plan_store(Keys::from_slices(&keys), &[]).unwrap().refused;
    assert_eq!(refused, 2);
    world.planner.reset().unwrap();
    assert_eq!(named(&world.planner.take_watched().changed.removed), keys[..3].iter().copied().collect());
    let counts = world.planner.counts();
    assert_eq!((counts.stored, counts.failed_stores, counts.refused, counts.evicted), (3, 1, 2, 0));
    assert_eq!((counts.capacity, counts.used), (8, 8), "a plan to store keeps its slots and those of what it found");
}

#[test]
fn terms_say_what_goes_first_and_when() {
    let (world, keys) = (world(1), keys(SLOTS + 2));
    let terms = |priority, until_ms, count| vec![Terms::new(priority, until_ms); count];
    let keep = |run: &[Key], terms: &[Terms]| {
        let stored = world.planner.plan_store_on(Keys::from_slices(run), terms, &[]).unwrap();
        world.movers[0].submit(stored.ticket.unwrap(), &stored.slots, pages(run.len(), 1).1).unwrap();
        world.held[0].end(0, true);
        assert_eq!(world.visible(run), run.len());
    };
    keep(&keys[..4], &terms(Priority::Normal, None, 4));
    keep(&keys[4..6], &terms(Priority::Low, None, 2));
    keep(&keys[6..SLOTS], &terms(Priority::High, Some(1000), SLOTS - 6));
    keep(&keys[SLOTS..], &terms(Priority::Normal, None, 2));
    assert_eq!((world.visible(&keys[..4]), world.visible(&keys[4..6])), (4, 0), "the low ones went");
    assert_eq!(world.planner.expire(tick_at(999)).unwrap(), 0);
    assert_eq!(world.planner.expire(tick_at(1000)).unwrap(), SLOTS - 6);
    assert_eq!(world.visible(&keys[6..SLOTS]), 0);
    let counts = world.planner.counts();
    assert_eq!((counts.evicted, counts.expired, counts.used), (2, SLOTS as u64 - 6, 6));
}

#[test]
fn a_plan_goes_once_and_in_order() {
    let (world, keys) = (world(1), keys(2));
    let ticket = world.store(&keys[..1], &[]);
    let again = world.movers[0].submit(ticket, &[SlotId(0)], pages(1, 1).1).unwrap_err().to_string();
    assert!(again.contains("pass each plan once, in order"), "{again}");
}

#[test]
fn nothing_rests_on_a_load_that_failed() {
    for background in [false, true] {
        let (world, keys) = (world(2), keys(6));
        world.keep(&keys[..2]);
        let (ticket, slots) = world.plan_load(&keys[..2], background);
        for mover in &world.movers {
            mover.submit(ticket, &slots, pages(2, 0).1).unwrap();
        }
        let rests_on: &[RankTicket] = if background { &[ticket] } else { &[] };
        world.store(&keys[2..4], rests_on);
        world.held.iter().for_each(|held| held.end(1, true));
        assert_eq!(world.visible(&keys[2..4]), 0, "the load goes on");
        world.held[0].end(0, true);
        world.held[1].end(0, false);
        assert_eq!(world.planner.poll().unwrap(), [Ended { ticket, ok: false }]);
        assert_eq!(world.visible(&keys[2..4]), 0);
        let later = world.planner.plan_store(Keys::from_slices(&keys[4..]), rests_on).unwrap();
        assert_eq!((later.ticket, later.refused), (None, 2), "what comes later rests on it too");
        assert_eq!(world.visible(&keys[..2]), 2, "what was kept is still right");
    }
}

#[test]
fn a_store_waits_for_the_loads_it_rests_on() {
    let (world, keys) = (world(1), keys(4));
    world.keep(&keys[..2]);
    let (ticket, slots) = world.plan_load(&keys[..2], false);
    world.movers[0].submit(ticket, &slots, pages(2, 0).1).unwrap();
    world.store(&keys[2..], &[]);
    world.held[0].end(1, true);
    assert_eq!(world.visible(&keys), 2);
    world.held[0].end(0, true);
    assert_eq!(world.visible(&keys), 4);
}

#[test]
fn a_load_brings_the_bytes_and_keeps_its_lease_until_every_rank_has_them() {
    let (world, keys) = (world(2), keys(2));
    world.keep(&keys);
    let (ticket, slots) = world.plan_load(&keys, true);
    assert_eq!(world.planner.index_stats().leased, 2);
    let targets: Vec<_> = world.movers.iter().map(|_| pages(2, 0)).collect();
    for (mover, (_, pages)) in world.movers.iter().zip(&targets) {
        mover.submit(ticket, &slots, pages.clone()).unwrap();
    }
    world.held[0].end(0, true);
    assert_eq!(world.planner.poll().unwrap(), []);
    assert_eq!(world.planner.index_stats().leased, 2);
    world.held[1].end(0, true);
    assert_eq!(world.planner.poll().unwrap(), [Ended { ticket, ok: true }]);
    assert_eq!(world.planner.index_stats().leased, 0);
    assert!(targets.iter().all(|(region, _)| region.to_vec().iter().all(|&byte| byte == 1)));
    assert_eq!(world.movers[0].take_ended(ticket.lane()), [Ended { ticket, ok: true }]);
}

#[test]
fn a_load_inside_a_step_is_in_place_when_the_call_returns() {
    let (world, keys) = (world(1), keys(2));
    world.keep(&keys);
    let (ticket, slots) = world.plan_load(&keys, false);
    let (region, target) = pages(2, 0);
    world.movers[0].load(ticket, &slots, target).unwrap();
    assert!(region.to_vec().iter().all(|&byte| byte == 1));
    assert_eq!(world.planner.poll().unwrap(), [Ended { ticket, ok: true }]);
}

#[test]
fn what_was_being_stored_at_a_reset_stays_forgotten() {
    let (world, keys) = (world(1), keys(3));
    world.keep(&keys[..1]);
    world.store(&keys[1..], &[]);
    assert_eq!(world.planner.reset().unwrap(), 1);
    world.held[0].end(0, true);
    assert_eq!((world.visible(&keys[..1]), world.visible(&keys[1..])), (0, 0));
    assert_eq!(world.planner.room().1, 0);
}

#[test]
fn more_failures_than_a_board_remembers_fail_everything_that_ended() {
    let (world, keys) = (world(1), keys(1));
    for _ in 0..200 {
        world.store(&keys, &[]);
        world.held[0].end(0, false);
        assert_eq!(world.visible(&keys), 0);
    }
    let lost = world.planner.plan_store(Keys::from_slices(&keys), &[]).unwrap().ticket.unwrap();
    assert_eq!(world.planner.in_flight(), 1);
    let beyond = RankTicket::from_id(lost.id() + 4 * 100).unwrap();
    world.movers[0].submit(beyond, &[SlotId(0)], pages(1, 1).1).unwrap();
    assert_eq!(world.visible(&keys), 0);
    assert_eq!(world.planner.in_flight(), 0);
}

#[test]
fn a_place_is_taken_once_and_all_must_agree() {
    let id = engine_id();
    let board = RankBoard::join(&id, 1).unwrap();
    let planner = RankPlanner::new(board.clone(), seat(), 1, (1.0, 0.0)).unwrap();
    let second = RankPlanner::new(board.clone(), seat(), 1, (1.0, 0.0)).err().unwrap().to_string();
    assert!(second.contains("is the planner of this engine already"), "{second}");
    let other = Seat { namespace: Namespace::builder().field("model", kvortex::Value::Bool(true)).finish(), ..seat() };
    let copies: Arc<dyn CopyEngine> = Arc::new(HostCopy::new(1));
    let _mover = RankMover::with_copies(&config(), (&board, 0), &other, copies.clone()).unwrap();
    let differs = planner.is_ready().unwrap_err().to_string();
    assert!(differs.contains("all ranks need the same configuration"), "{differs}");
    for rank in [0, 1] {
        assert!(RankMover::with_copies(&config(), (&board, rank), &seat(), copies.clone()).is_err());
    }
}
