//! When an engine accepts, ends, lets go and stops.

use std::any::Any;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use super::bytes::{arena, contiguous, marked_load};
use super::{Engine, PATIENCE, WAYS, Way, World, execute};
use crate::copy::{Direction, Done, Step, Transfer};
use crate::error::MemError;
use crate::slots::SlotId;
use crate::span::Region;
use crate::sync::{Arc, thread};

/// Sizes of transfers in bytes: one that a thread copies alone, and one that is worth several.
const SIZES: [usize; 2] = [4096, 6 << 20];

#[cfg(test)]
/// A load of `bytes` into new memory.
pub(in crate::copy) fn load(bytes: usize) -> Transfer {
    load_in(&super::HostWorld, bytes)
}

/// A load of `bytes` into new memory of `world`.
pub(in crate::copy) fn load_in(world: &dyn World, bytes: usize) -> Transfer {
    load_into(world, &world.region(&vec![0; bytes], true))
}

/// A load into all of `region`.
pub(in crate::copy) fn load_into(world: &dyn World, region: &Region) -> Transfer {
    marked_load(world, region, region.len().min(256 << 10), 0).0
}

/// Counts how often it is called.
fn counting(count: &Arc<AtomicUsize>) -> Done {
    let count = Arc::clone(count);
    Box::new(move |result| {
        result.expect("a copy");
        count.fetch_add(1, Ordering::SeqCst);
    })
}

pub(super) fn empty_transfers_end(engine: &Engine, world: &dyn World) {
    for way in WAYS {
        let pages = contiguous(&world.region(&[0; 64], true), 64);
        let transfer = Transfer::new(Direction::Store, arena(world, 1, 64), Vec::new(), pages);
        execute(engine, transfer.expect("a valid store"), way).expect("a copy of nothing");
    }
}

/// Owns memory and tells when it is dropped.
struct Owner {
    memory: Option<Box<dyn Any + Send + Sync>>,
    gone: Arc<AtomicBool>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        drop(self.memory.take());
        // Long enough that a report that does not wait for the drop is seen to come first.
        thread::sleep(Duration::from_millis(2));
        self.gone.store(true, Ordering::SeqCst);
    }
}

fn owned(world: &dyn World, len: usize) -> (Region, Arc<AtomicBool>) {
    let gone = Arc::new(AtomicBool::new(false));
    let (base, memory) = world.memory(len);
    world.write(base, &vec![7; len]);
    let owner = Owner { memory: Some(memory), gone: Arc::clone(&gone) };
    // SAFETY: the memory lives until its owner is dropped, and nothing else uses it.
    let region = unsafe { Region::from_raw(base, len, true, Box::new(owner)) };
    (region.at(world.place()), gone)
}

pub(super) fn memory_is_let_go_before_the_end_is_told(engine: &Engine, world: &dyn World) {
    for bytes in SIZES {
        let (region, gone) = owned(world, bytes);
        let transfer = marked_load(world, &region, bytes.min(256 << 10), 0).0;
        drop(region);
        engine.run(transfer).expect("a load");
        assert!(gone.load(Ordering::SeqCst), "`run` returned while the memory was still held");

        let (region, gone) = owned(world, bytes);
        let transfer = marked_load(world, &region, bytes.min(256 << 10), 0).0;
        drop(region);
        let (sender, receiver) = mpsc::channel();
        let done: Done = Box::new(move |_| sender.send(gone.load(Ordering::SeqCst)).unwrap_or(()));
        engine.submit(transfer, done).expect("accepted");
        let gone = receiver.recv_timeout(PATIENCE).expect("`done` was not called");
        assert!(gone, "`done` was called while the memory was still held");
    }
}

pub(super) fn done_is_called_once_each(engine: &Engine, world: &dyn World) {
    const TRANSFERS: usize = 60;
    let counts: Vec<Arc<AtomicUsize>> = (0..TRANSFERS).map(|_| Arc::default()).collect();
    for (index, count) in counts.iter().enumerate() {
        engine.submit(load_in(world, SIZES[usize::from(index % 8 == 0)]), counting(count)).expect("accepted");
    }
    assert!(engine.stop(PATIENCE), "accepted work did not end");
    let called: Vec<usize> = counts.iter().map(|count| count.load(Ordering::SeqCst)).collect();
    assert_eq!(called, [1; TRANSFERS], "calls of each `done` when `stop` returned");
}

pub(super) fn a_panic_in_done_harms_nobody(engine: &Engine, world: &dyn World) {
    for _ in 0..8 {
        // Not `panic!`, which would print.
        engine
            .submit(load_in(world, 4096), Box::new(|_| resume_unwind(Box::new("a `done` that panics"))))
            .expect("accepted");
    }
    WAYS.iter().for_each(|&way| execute(engine, load_in(world, 6 << 20), way).expect("a copy after a panic"));
    assert!(engine.stop(PATIENCE), "a panic left work unended");
}

pub(super) fn several_threads_share_an_engine(engine: &Engine, world: &dyn World) {
    let user = |seed: usize| {
        for round in 0..12 {
            let page_bytes = [1000, 300_000][round % 2] + seed;
            let region = world.region(&vec![0; 9 * page_bytes], true);
            let (transfer, expected) = marked_load(world, &region, page_bytes, seed * 100 + round);
            let way = if round % 3 == 0 { Way::Run } else { Way::Submit };
            execute(engine, transfer, way).expect("a load");
            assert!(world.bytes(&region) == expected, "thread {seed} got other bytes");
        }
    };
    std::thread::scope(|scope| {
        let users: Vec<_> = (0..4).map(|seed| scope.spawn(move || user(seed))).collect();
        users.into_iter().for_each(|user| user.join().expect("a user of the engine"));
    });
}

pub(super) fn stop_waits_for_done_to_return(engine: &Engine, world: &dyn World) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = counting(&count);
    let done: Done = Box::new(|result| {
        thread::sleep(Duration::from_millis(50));
        counted(result);
    });
    engine.submit(load_in(world, 4096), done).expect("accepted");
    assert!(engine.stop(PATIENCE), "accepted work did not end");
    assert_eq!(count.load(Ordering::SeqCst), 1, "`stop` waited for the bytes only");
}

pub(super) fn stop_waits_and_then_refuses(engine: &Engine, world: &dyn World) {
    let count = Arc::new(AtomicUsize::new(0));
    for _ in 0..10 {
        engine.submit(load_in(world, 6 << 20), counting(&count)).expect("accepted");
    }
    engine.stop(Duration::ZERO);
    assert!(matches!(engine.run(load_in(world, 4096)), Err(MemError::Stopped)), "`run` after `stop`");
    assert!(matches!(engine.run(load_in(world, 6 << 20)), Err(MemError::Stopped)), "`run` of much after `stop`");
    let (region, gone) = owned(world, 4096);
    let transfer = marked_load(world, &region, 4096, 0).0;
    drop(region);
    let refused = engine.submit(transfer, Box::new(|_| panic!("`done` of a refused transfer was called")));
    assert!(matches!(refused, Err(MemError::Stopped)), "`submit` after `stop`");
    assert!(gone.load(Ordering::SeqCst), "a refused transfer is still held");
    assert!(engine.stop(PATIENCE), "accepted work did not end");
    assert_eq!(count.load(Ordering::SeqCst), 10, "transfers ended when `stop` returned");
    assert!(engine.stop(Duration::ZERO), "stopped twice");
}

pub(super) fn dropping_an_engine_ends_what_it_accepted(engine: Engine, world: &dyn World) {
    let count = Arc::new(AtomicUsize::new(0));
    for _ in 0..10 {
        engine.submit(load_in(world, 6 << 20), counting(&count)).expect("accepted");
    }
    drop(engine);
    assert_eq!(count.load(Ordering::SeqCst), 10, "transfers ended when the engine was gone");
}

pub(super) fn an_engine_may_be_dropped_by_its_own_done(engine: Engine, world: &dyn World) {
    let (sender, receiver) = mpsc::channel();
    let (transfer, last) = (one_step(world), Arc::clone(&engine));
    let done: Done = Box::new(move |_| {
        // Leaves the other owner time to go first.
        thread::sleep(Duration::from_millis(20));
        drop(last);
        sender.send(()).unwrap_or(());
    });
    engine.submit(transfer, done).expect("accepted");
    drop(engine);
    receiver.recv_timeout(PATIENCE).expect("an engine dropped by its own `done` hangs");
}

fn one_step(world: &dyn World) -> Transfer {
    let pages = contiguous(&world.region(&[0; 64], true), 64);
    let steps = vec![Step { slot: SlotId(0), page: 0 }];
    Transfer::new(Direction::Store, arena(world, 1, 64), steps, pages).expect("a valid store")
}
