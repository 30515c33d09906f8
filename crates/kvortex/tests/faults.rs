//! Copies that fail in every way that a copy engine can fail: nothing of them becomes visible and nothing leaks.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::*;
use kvortex::{Engine, Error, Keys};
use kvortex_mem::MemError;
use kvortex_mem::copy::{CopyEngine, Done, HostCopy, Transfer};
use kvortex_mem::device::RawStream;
use kvortex_mem::span::Pages;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// `run` and `done` say that the copy failed.
    Fail,
    /// Half of the work is done first. (The copies are made, then reported as failed.)
    FailLate,
    Panic,
    /// The transfer is not accepted.
    Refuse,
    /// `done` is dropped without a call.
    Forget,
    /// Kept until the test lets go.
    Hold,
}

struct Faulty {
    real: HostCopy,
    fault: Mutex<Fault>,
    held: Mutex<Vec<(Transfer, Done)>>,
    calls: AtomicUsize,
}

impl Faulty {
    fn new() -> Arc<Self> {
        let (real, fault) = (HostCopy::new(2), Mutex::new(Fault::None));
        Arc::new(Self { real, fault, held: Mutex::default(), calls: AtomicUsize::new(0) })
    }

    fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    fn fault(&self) -> Fault {
        self.calls.fetch_add(1, Ordering::Relaxed);
        *self.fault.lock().unwrap()
    }

    fn let_go(&self) {
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        held.into_iter().for_each(|(transfer, done)| self.real.submit(transfer, done).unwrap());
    }
}

fn failure() -> MemError {
    MemError::CopyFailed("the link is down".into())
}

impl CopyEngine for Faulty {
    fn run(&self, transfer: Transfer) -> Result<(), MemError> {
        match self.fault() {
            Fault::None | Fault::Hold => self.real.run(transfer),
            Fault::Fail | Fault::Refuse | Fault::Forget => Err(failure()),
            Fault::FailLate => self.real.run(transfer).and(Err(failure())),
            Fault::Panic => panic!("a copy engine broke"),
        }
    }

    fn submit(&self, transfer: Transfer, done: Done) -> Result<(), MemError> {
        match self.fault() {
            Fault::None => self.real.submit(transfer, done)?,
            Fault::Fail => done(Err(failure())),
            Fault::FailLate => self.real.submit(transfer, Box::new(|_| done(Err(failure()))))?,
            Fault::Panic => panic!("a copy engine broke"),
            Fault::Refuse => return Err(failure()),
            Fault::Forget => drop(done),
            Fault::Hold => self.held.lock().unwrap().push((transfer, done)),
        }
        Ok(())
    }

    fn fence(&self, stream: RawStream, pages: &Pages) -> Result<(), MemError> {
        self.real.fence(stream, pages)
    }

    fn stop(&self, deadline: Duration) -> bool {
        self.real.stop(deadline) && self.held.lock().unwrap().is_empty()
    }

    fn name(&self) -> &'static str {
        "faulty"
    }
}

fn faulty(blocks: usize) -> (Engine, Arc<Faulty>) {
    let copies = Faulty::new();
    (Engine::with_copies(config(blocks), copies.clone()).unwrap(), copies)
}

const FAULTS: [Fault; 5] = [Fault::Fail, Fault::FailLate, Fault::Panic, Fault::Refuse, Fault::Forget];

/// Calls that may panic, as a copy engine that panics makes them.
fn quietly<T>(call: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).ok()
}

fn assert_nothing_left(engine: &Engine, kept: usize) {
    let stats = engine.stats();
    assert_eq!((stats.blocks, stats.bytes_used, stats.in_flight, stats.leased_blocks), (kept, kept * BLOCK, 0, 0));
}

#[test]
fn a_failed_save_leaves_nothing() {
    let (engine, copies) = faulty(20);
    save(&engine, &keys(0..5));
    for fault in FAULTS {
        copies.set(fault);
        let all = keys(0..10);
        let outcome = quietly(|| engine.save(Keys::from_slices(&all), pages(&filled(&all), 10)));
        assert!(matches!(outcome, None | Some(Err(Error::Transfer { .. }))), "{fault:?}: {outcome:?}");
        assert_nothing_left(&engine, 5);
    }
    copies.set(Fault::None);
    assert_eq!(load(&engine, &keys(0..10)).mask.prefix(), 5);
    assert_eq!(save(&engine, &keys(0..10)).blocks, 5);
    assert_eq!(load(&engine, &keys(0..10)).mask.prefix(), 10);
}

#[test]
fn a_failed_load_is_never_counted_as_loaded() {
    let (engine, copies) = faulty(20);
    let all = keys(0..10);
    save(&engine, &all);
    for fault in FAULTS {
        copies.set(fault);
        let outcome = quietly(|| engine.load(Keys::from_slices(&all), pages(&poisoned(10), 10)));
        assert!(matches!(outcome, None | Some(Err(Error::Transfer { .. }))), "{fault:?}: {outcome:?}");
        assert_nothing_left(&engine, 10);
    }
    assert_eq!(engine.stats().hits, 0);
    copies.set(Fault::None);
    assert_eq!(load(&engine, &all).blocks, 10);
}

#[test]
fn a_failed_ticket_says_so_and_never_hangs() {
    let (engine, copies) = faulty(20);
    for fault in FAULTS {
        copies.set(fault);
        let all = keys(0..10);
        let started = quietly(|| engine.save_async(Keys::from_slices(&all), pages(&filled(&all), 10)));
        if let Some(Ok(ticket)) = started {
            let outcome = ticket.wait(Some(Duration::from_secs(10)));
            assert!(matches!(outcome, Err(Error::Transfer { .. } | Error::Closed)), "{fault:?}: {outcome:?}");
        }
        assert_nothing_left(&engine, 0);
    }
}

#[test]
fn blocks_being_written_are_invisible_and_keep_their_slots() {
    let (engine, copies) = faulty(10);
    copies.set(Fault::Hold);
    let all = keys(0..4);
    let ticket = engine.save_async(Keys::from_slices(&all), pages(&filled(&all), 4)).unwrap();
    assert!(matches!(ticket.wait(Some(Duration::from_millis(1))), Err(Error::Timeout { .. })));
    copies.set(Fault::None);
    assert_eq!(engine.match_prefix(Keys::from_slices(&all)).unwrap(), 0);
    let again = save(&engine, &all);
    assert_eq!((again.blocks, again.present), (0, 4), "somebody else writes them");
    assert!(!again.mask.any(), "and they are not held yet");
    assert_eq!(save(&engine, &keys(10..20)).blocks, 6, "their slots are not given away");
    copies.let_go();
    assert_eq!(ticket.wait(None).unwrap().mask.count(), 4);
    assert_eq!(load(&engine, &all).blocks, 4);
}

#[test]
fn a_reset_reaches_blocks_that_are_being_written() {
    let (engine, copies) = faulty(10);
    copies.set(Fault::Hold);
    let all = keys(0..4);
    let ticket = engine.save_async(Keys::from_slices(&all), pages(&filled(&all), 4)).unwrap();
    engine.reset().unwrap();
    copies.set(Fault::None);
    assert_eq!(engine.stats().bytes_used, 4 * BLOCK, "the copy still writes there");
    copies.let_go();
    let report = ticket.wait(None).unwrap();
    assert!(!report.mask.any(), "copied, but not held");
    assert_nothing_left(&engine, 0);
    assert_eq!(save(&engine, &all).blocks, 4);
}

#[test]
fn a_leased_load_keeps_its_blocks_from_eviction() {
    let (engine, copies) = faulty(10);
    let all = keys(0..8);
    save(&engine, &all);
    copies.set(Fault::Hold);
    let target = poisoned(8);
    let ticket = engine.load_async(Keys::from_slices(&all), pages(&target, 8)).unwrap();
    copies.set(Fault::None);
    for i in 1..10 {
        save(&engine, &keys(i * 100..i * 100 + 10));
    }
    engine.reset().unwrap();
    for i in 11..20 {
        save(&engine, &keys(i * 100..i * 100 + 10));
    }
    copies.let_go();
    check(&all, &target, &ticket.wait(None).unwrap());
}

#[test]
fn shutdown_is_bounded_and_a_held_copy_keeps_its_memory() {
    let (engine, copies) = faulty(10);
    copies.set(Fault::Hold);
    let all = keys(0..4);
    let ticket = engine.save_async(Keys::from_slices(&all), pages(&filled(&all), 4)).unwrap();
    assert!(!engine.shutdown(Duration::from_millis(20)));
    drop(engine);
    let held = std::mem::take(&mut *copies.held.lock().unwrap());
    for (transfer, done) in held {
        let outcome = HostCopy::new(1).run(transfer);
        done(outcome);
    }
    assert_eq!(ticket.wait(None).unwrap().blocks, 4);
}

/// A load of one block whose copy is held, and a save that rests on it and whose own copy is done.
fn resting_save(engine: &Engine, copies: &Faulty) -> (kvortex::Ticket, kvortex::Ticket) {
    let (first, second) = (keys([0]), keys([1]));
    save(engine, &first);
    copies.set(Fault::Hold);
    let load = engine.load_async(Keys::from_slices(&first), pages(&poisoned(1), 1)).unwrap();
    copies.set(Fault::None);
    let pages = pages(&filled(&second), 1);
    let save = engine.save_after(Keys::from_slices(&second), pages, std::slice::from_ref(&load)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(!save.is_done(), "a save is over before the load that it rests on");
    assert_eq!(engine.check(Keys::from_slices(&second)).unwrap().count(), 0);
    (load, save)
}

#[test]
fn a_save_becomes_visible_with_the_load_that_it_rests_on() {
    let (engine, copies) = faulty(8);
    let (load, save) = resting_save(&engine, &copies);
    copies.let_go();
    load.wait(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(save.wait(Some(Duration::from_secs(10))).unwrap().blocks, 1);
    assert_eq!(engine.check(Keys::from_slices(&keys([1]))).unwrap().count(), 1);
}

#[test]
fn a_save_that_rests_on_a_failed_load_is_never_visible() {
    let (engine, copies) = faulty(8);
    let (load, save) = resting_save(&engine, &copies);
    copies.held.lock().unwrap().drain(..).for_each(|(_, done)| done(Err(failure())));
    load.wait(Some(Duration::from_secs(10))).unwrap_err();
    let error = save.wait(Some(Duration::from_secs(10))).unwrap_err();
    assert!(error.to_string().contains("rests on"), "{error}");
    assert_eq!(engine.check(Keys::from_slices(&keys([1]))).unwrap().count(), 0);
    assert_eq!(engine.stats().blocks, 1, "the discarded block is still counted");
}

#[test]
fn a_refused_save_that_rests_on_a_load_is_settled_at_once() {
    let (engine, copies) = faulty(8);
    let first = keys([0]);
    save(&engine, &first);
    copies.set(Fault::Hold);
    let load = engine.load_async(Keys::from_slices(&first), pages(&poisoned(1), 1)).unwrap();
    for fault in [Fault::Refuse, Fault::Forget] {
        copies.set(fault);
        let second = keys([1]);
        let rests = std::slice::from_ref(&load);
        let refused = engine.save_after(Keys::from_slices(&second), pages(&filled(&second), 1), rests);
        let ended = refused.and_then(|ticket| ticket.wait(Some(Duration::from_secs(10))));
        assert!(ended.is_err(), "{fault:?}");
        copies.set(Fault::None);
        assert_eq!(save(&engine, &second).blocks, 1, "{fault:?} left its block reserved");
        engine.reset().unwrap();
    }
    copies.let_go();
    load.wait(Some(Duration::from_secs(10))).unwrap();
}
