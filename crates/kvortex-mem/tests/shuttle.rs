//! Random schedules of the slot pool and the copy engine. Run with `RUSTFLAGS="--cfg shuttle"`.

#![cfg(shuttle)]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::time::Duration;

use kvortex_mem::MemError;
use kvortex_mem::arena::Arena;
use kvortex_mem::copy::{CopyEngine, Direction, HostCopy, Step, Transfer};
use kvortex_mem::map::{HostMemory, MapOptions};
use kvortex_mem::slots::{SlotId, SlotPool};
use kvortex_mem::span::{Pages, Pattern, Region, Segment};
use kvortex_mem::sync::Arc;
use kvortex_mem::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use kvortex_mem::sync::thread;

const SCHEDULES: usize = 2_000;

/// Marks slots as held and panics if one has two holders.
struct Holders(Vec<AtomicBool>);

impl Holders {
    fn hold(&self, slot: SlotId) {
        assert!(!self.0[slot.0 as usize].swap(true, Ordering::SeqCst), "{slot:?} has two holders");
    }

    fn release(&self, slot: SlotId) {
        assert!(self.0[slot.0 as usize].swap(false, Ordering::SeqCst));
    }
}

#[test]
fn no_slot_ever_has_two_holders() {
    let user = |pool: SlotPool, holders: Arc<Holders>, many: bool| {
        for _ in 0..2 {
            let claims = if many { pool.claim_many(2) } else { pool.claim().into_iter().collect() };
            assert!(pool.free() <= 3);
            claims.iter().for_each(|claim| holders.hold(claim.id()));
            thread::yield_now();
            claims.iter().for_each(|claim| holders.release(claim.id()));
            if many { pool.return_many(claims) } else { drop(claims) }
        }
    };
    let model = move || {
        let pool = SlotPool::new(3);
        let holders = Arc::new(Holders((0..3).map(|_| AtomicBool::new(false)).collect()));
        let spawn = |many| {
            let (pool, holders) = (pool.clone(), Arc::clone(&holders));
            thread::spawn(move || user(pool, holders, many))
        };
        let users = [spawn(false), spawn(true), spawn(true)];
        users.into_iter().for_each(|user| user.join().unwrap());
        assert_eq!((pool.free(), pool.claim_many(9).len()), (3, 3), "no slot is lost");
    };
    shuttle::check_random(model, SCHEDULES);
}

const PAGE: usize = 300 << 10;

/// A load of three pages, each of which is more than a grain, and the region it goes to.
fn load() -> (Transfer, Region) {
    let options = MapOptions { bytes: PAGE, huge_pages: false, numa_node: None, touch_threads: 0 };
    let arena = Arena::cut(HostMemory::map(&options).unwrap(), PAGE).unwrap();
    let region = Region::from_vec(vec![9; 3 * PAGE]);
    let pattern = Arc::new(Pattern::contiguous(PAGE));
    let table = Segment::Table { region: region.clone(), pattern, first: 0, stride: PAGE as isize, count: 3 };
    let steps = (0..3).map(|page| Step { slot: SlotId(0), page }).collect();
    (Transfer::new(Direction::Load, Arc::new(arena), steps, Pages::new(vec![table]).unwrap()).unwrap(), region)
}

fn is_loaded(region: &Region) -> bool {
    region.to_vec() == vec![0; region.len()]
}

#[test]
fn copies_end_exactly_once_and_whole() {
    let model = || {
        let engine = Arc::new(HostCopy::new(2));
        let ended = Arc::new(AtomicUsize::new(0));
        let (transfer, region) = load();
        let count = Arc::clone(&ended);
        let report = move |result: Result<(), MemError>| {
            result.unwrap();
            assert!(is_loaded(&region), "told before all bytes were there");
            count.fetch_add(1, Ordering::SeqCst);
        };
        engine.submit(transfer, Box::new(report)).unwrap();
        let other = Arc::clone(&engine);
        let runner = thread::spawn(move || {
            let (transfer, region) = load();
            other.run(transfer).unwrap();
            assert!(is_loaded(&region), "returned before all bytes were there");
        });
        runner.join().unwrap();
        drop(engine);
        assert_eq!(ended.load(Ordering::SeqCst), 1, "calls of `done` when the engine was gone");
    };
    shuttle::check_random(model, SCHEDULES / 4);
}

fn add_one(count: &AtomicUsize) {
    count.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn stop_leaves_nothing_that_was_accepted() {
    let model = || {
        let engine = Arc::new(HostCopy::new(2));
        let (accepted, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let user = {
            let (engine, accepted, ended) = (Arc::clone(&engine), Arc::clone(&accepted), Arc::clone(&ended));
            thread::spawn(move || {
                for _ in 0..2 {
                    let count = Arc::clone(&ended);
                    let done = Box::new(move |_| add_one(&count));
                    match engine.submit(load().0, done) {
                        Ok(()) => add_one(&accepted),
                        Err(error) => assert!(matches!(error, MemError::Stopped), "{error}"),
                    }
                }
            })
        };
        assert!(engine.stop(Duration::ZERO));
        let ended_at_stop = ended.load(Ordering::SeqCst);
        user.join().unwrap();
        assert_eq!(ended.load(Ordering::SeqCst), ended_at_stop, "a `done` was called after `stop` returned");
        assert_eq!(accepted.load(Ordering::SeqCst), ended_at_stop, "each accepted transfer ended");
    };
    shuttle::check_random(model, SCHEDULES / 4);
}
