//! Every call to the system fails in turn, once or from then on: no byte is wrong, nothing hangs, it is said once, and when the
//! cause is gone the tier keeps and serves again by itself.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod folder;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use folder::*;
use kvortex::tier::disk::{DiskConfig, DiskTier};
use kvortex::tier::suite::{PATIENCE, World, has};
use kvortex::tier::{Put, Tier};
use kvortex_mem::file::{Call, Effect, Fault, FaultPlan};
use parking_lot::Mutex;

const EINTR: i32 = 4;
const ERRNOS: [(i32, &str); 7] =
    [(5, "EIO"), (13, "EACCES"), (22, "EINVAL"), (24, "EMFILE"), (28, "ENOSPC"), (30, "EROFS"), (116, "ESTALE")];
/// Cases that run at once: most of a case is waiting for a pause to end.
const AT_ONCE: usize = 16;
/// Of reads, of writes, of the file's growth, of flushes, of the rest.
const MOST_WARNINGS: usize = 5;

/// Warnings, each with the path of its folder in it.
struct Warnings(Mutex<Vec<String>>);

static WARNINGS: Warnings = Warnings(Mutex::new(Vec::new()));

impl log::Log for Warnings {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            self.0.lock().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&WARNINGS).unwrap();
        log::set_max_level(log::LevelFilter::Warn);
    });
}

fn warnings(folder: &Folder) -> Vec<String> {
    let path = folder.path.display().to_string();
    WARNINGS.0.lock().iter().filter(|line| line.contains(&path)).cloned().collect()
}

/// What a tier does for a while. Whatever fails on the way, it answers, and no byte is wrong.
fn busy(world: &World, tier: &dyn Tier) {
    let _ = world.put(tier, 0..6);
    assert!(tier.flush(PATIENCE));
    world.get(tier, &[0, 1, 2, 3, 4, 5], PATIENCE);
    let _ = world.put(tier, 6..12);
    assert!(tier.flush(PATIENCE));
    world.get(tier, &[4, 8, 11, 99], PATIENCE);
}

/// A block is kept and served again.
fn recovers(world: &World, tier: &dyn Tier, id: usize) {
    let start = Instant::now();
    while world.put(tier, [id])[0] != Put::Present || !has(tier, [id])[0] || !world.get(tier, &[id], PATIENCE)[0] {
        tier.flush(PATIENCE);
        assert!(start.elapsed() < Duration::from_secs(5), "it does not recover: {:?}", tier.stats());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A small tier by threads or by a ring.
fn small(folder: &Folder, plan: &Arc<FaultPlan>, ring: bool) -> DiskConfig {
    let mut config = folder.faulty(8, plan);
    config.io.ring = ring;
    config
}

/// Opens a tier, keeps it busy and lets it recover; how many blocks were found damaged.
fn life(folder: &Folder, plan: &Arc<FaultPlan>, ring: bool) -> u64 {
    let (world, mut corrupt) = (World::new(64, BLOCK), 0);
    if let Ok(tier) = DiskTier::open(small(folder, plan, ring), &world.arena, IDENTITY) {
        busy(&world, &tier);
        plan.clear();
        recovers(&world, &tier, 50);
        assert!(tier.clear());
        recovers(&world, &tier, 51);
        corrupt = tier.stats().corrupt;
        assert!(tier.stop(PATIENCE));
    }
    assert_eq!(world.arena.slots().free(), world.arena.slots().total());
    corrupt
}

/// How often `life` makes each call before its plan is cleared.
fn counted(ring: bool) -> Vec<(Call, u64)> {
    let (folder, plan) = (Folder::quick("count"), Arc::new(FaultPlan::default()));
    let world = World::new(64, BLOCK);
    let tier = DiskTier::open(small(&folder, &plan, ring), &world.arena, IDENTITY).unwrap();
    busy(&world, &tier);
    Call::ALL.into_iter().chain([Call::Ring]).map(|call| (call, plan.count(call))).collect()
}

fn case(fault: Fault, ring: bool) {
    let folder = Folder::quick("nth");
    let plan = Arc::new(FaultPlan::default());
    plan.set(&[fault]);
    assert_eq!(life(&folder, &plan, ring), 0, "{fault:?} was taken for a success, and only the digest told");
    let said = warnings(&folder);
    assert!(said.len() <= MOST_WARNINGS, "{fault:?} is told {} times: {said:#?}", said.len());
    // What it left behind serves right bytes or none.
    life(&folder, &Arc::new(FaultPlan::default()), ring);
}

/// Runs the cases, many at once, and tells which of them failed.
fn all(cases: &[Fault], ring: bool) {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(&fault) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            if std::panic::catch_unwind(|| case(fault, ring)).is_err() {
                failed.lock().push(fault);
            }
        }
    };
    std::thread::scope(|scope| (0..AT_ONCE).for_each(|_| drop(scope.spawn(work))));
    let failed = failed.into_inner();
    assert!(failed.is_empty(), "{} of {} cases failed: {failed:#?}", failed.len(), cases.len());
}

/// Every call in turn, once and from then on, with every error.
fn each_call(calls: &[(Call, u64)]) -> Vec<Fault> {
    let of = |&(call, count): &(Call, u64)| (0..count).map(move |first| (call, first));
    let errors = |(call, first)| {
        let fault = move |errno, count| Fault { call, first, count, effect: Effect::Errno(errno) };
        ERRNOS.into_iter().flat_map(move |(errno, _)| [fault(errno, 1), fault(errno, u64::MAX)])
    };
    calls.iter().flat_map(of).flat_map(errors).collect()
}

#[test]
fn any_call_may_fail_once_or_from_then_on_with_any_error() {
    listen();
    let calls = counted(false);
    let made = |wanted: Call| calls.iter().any(|&(call, count)| call == wanted && count > 0);
    assert!(Call::ALL.into_iter().all(|call| made(call) || call == Call::Truncate), "{calls:?}");
    let cases = each_call(&calls);
    println!("{} cases over {calls:?}", cases.len());
    all(&cases, false);
}

#[test]
fn a_ring_may_fail_at_any_operation_and_altogether() {
    listen();
    let mut calls = counted(true);
    calls.retain(|(call, _)| matches!(call, Call::Read | Call::Write | Call::Ring));
    if calls.iter().any(|&(call, count)| call == Call::Ring && count == 0) {
        println!("left out: the kernel gives no ring");
        return;
    }
    let cases = each_call(&calls);
    println!("{} cases over {calls:?}", cases.len());
    all(&cases, true);
}

/// Nothing is lost by what the system allows every call to do.
fn unharmed(faults: &[Fault], direct: bool, ring: bool) {
    let (folder, world) = (Folder::new("unharmed"), World::new(64, BLOCK));
    let plan = Arc::new(FaultPlan::default());
    let mut config = folder.faulty(32, &plan);
    config.folders[0].direct = direct;
    config.io.ring = ring;
    plan.set(faults);
    let tier = DiskTier::open(config.clone(), &world.arena, IDENTITY).unwrap();
    world.keep(&tier, 0..12);
    let ids: Vec<usize> = (0..12).collect();
    assert_eq!(world.get(&tier, &ids, PATIENCE), [true; 12]);
    assert!(tier.stop(PATIENCE));
    drop(tier);
    let tier = DiskTier::open(config, &world.arena, IDENTITY).unwrap();
    assert!(tier.flush(PATIENCE));
    assert_eq!(world.get(&tier, &ids, PATIENCE), [true; 12]);
    assert_eq!((tier.stats().errors, tier.stats().corrupt), (0, 0));
}

#[test]
fn a_call_that_is_interrupted_is_made_again() {
    for call in Call::ALL.into_iter().chain([Call::Ring]) {
        for first in 0..4 {
            let fault = Fault { call, first, count: 3, effect: Effect::Errno(EINTR) };
            unharmed(&[fault], true, false);
            unharmed(&[fault], true, true);
        }
    }
}

#[test]
fn short_reads_and_writes_go_on() {
    for (short, direct) in [(4096, true), (1, false), (512, false), (5000, false)] {
        let of = |call| Fault { call, first: 0, count: u64::MAX, effect: Effect::Short(short) };
        unharmed(&[of(Call::Read), of(Call::Write)], direct, false);
        // A ring gives up on a part of a page: the system never ends there before the end of the file.
        if short % 4096 == 0 {
            unharmed(&[of(Call::Read), of(Call::Write)], direct, true);
        }
    }
}

/// What was cleared stays away, whichever call failed; where that cannot be promised, nothing is served any more.
fn cleared(fault: Fault) -> bool {
    let (folder, world) = (Folder::quick("cleared"), World::new(64, BLOCK));
    let plan = Arc::new(FaultPlan::default());
    let tier = DiskTier::open(folder.faulty(8, &plan), &world.arena, IDENTITY).unwrap();
    world.keep(&tier, 0..6);
    let before = plan.count(fault.call);
    plan.set(&[Fault { first: before + fault.first, ..fault }]);
    let promised = tier.clear();
    plan.clear();
    assert_eq!(world.get(&tier, &[0, 1, 2, 3, 4, 5], PATIENCE), [false; 6]);
    if promised {
        recovers(&world, &tier, 50);
        assert!(tier.flush(PATIENCE));
    } else {
        assert_eq!(world.put(&tier, [50]), [Put::Dropped], "it stays off");
    }
    assert!(tier.stop(PATIENCE));
    drop(tier);
    let tier = folder.open(&world, 8);
    assert!(tier.flush(PATIENCE));
    let found = world.get(&tier, &[0, 1, 2, 3, 4, 5], PATIENCE);
    assert!(!promised || found == [false; 6], "{fault:?}: {found:?}");
    // What is kept afterwards is found again, unless the device takes no superblock at all.
    assert!(!promised || fault.count > 1 || world.get(&tier, &[50], PATIENCE) == [true], "{fault:?}");
    promised
}

#[test]
fn what_was_cleared_stays_away_whatever_fails() {
    let mut promised = [0, 0];
    for call in [Call::Write, Call::Sync, Call::Truncate, Call::Stat] {
        for (errno, _) in ERRNOS {
            for (first, count) in [(0, 1), (1, 1), (0, u64::MAX), (1, u64::MAX)] {
                promised[usize::from(cleared(Fault { call, first, count, effect: Effect::Errno(errno) }))] += 1;
            }
        }
    }
    assert!(promised[1] > 0, "{promised:?}");
}

#[test]
fn a_device_that_cannot_be_flushed_is_told_once_and_goes_on() {
    listen();
    let (folder, world) = (Folder::new("flush"), World::new(64, BLOCK));
    let plan = Arc::new(FaultPlan::default());
    let tier = DiskTier::open(folder.faulty(32, &plan), &world.arena, IDENTITY).unwrap();
    plan.always(Call::Sync, Effect::Errno(ERRNOS[0].0));
    let start = Instant::now();
    for id in (0..).take_while(|_| start.elapsed() < Duration::from_secs(4)) {
        world.keep(&tier, [id % 16]);
        tier.remove(kvortex::Keys::from_slices(&[*kvortex::tier::suite::key(id % 16).as_bytes()]), start + PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(tier.stats().errors > 1 && tier.stats().failing, "{:?}", tier.stats());
    assert_eq!(warnings(&folder).len(), 1, "{:#?}", warnings(&folder));
    plan.clear();
    while tier.stats().failing {
        assert!(start.elapsed() < Duration::from_secs(9));
        world.keep(&tier, [20]);
        tier.remove(kvortex::Keys::from_slices(&[*kvortex::tier::suite::key(20).as_bytes()]), start + PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_device_that_fails_now_and_then_is_told_once() {
    listen();
    let (folder, world) = (Folder::new("now-and-then"), World::new(64, BLOCK));
    let plan = Arc::new(FaultPlan::default());
    let tier = DiskTier::open(folder.faulty(32, &plan), &world.arena, IDENTITY).unwrap();
    full(&tier);
    let start = plan.count(Call::Write);
    let fails =
        |i: u64| Fault { call: Call::Write, first: start + 10 * i, count: 1, effect: Effect::Errno(ERRNOS[0].0) };
    plan.set(&(0..1000).map(fails).collect::<Vec<_>>());
    let begun = Instant::now();
    for batch in (0..).take_while(|_| begun.elapsed() < Duration::from_secs(4)) {
        let _ = world.put(&tier, batch * 8..batch * 8 + 8);
        assert!(tier.flush(PATIENCE));
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(tier.stats().errors > 3 && tier.stats().written > 50, "{:?}", tier.stats());
    assert_eq!(warnings(&folder).len(), 1, "{:#?}", warnings(&folder));
}

#[test]
fn a_flush_that_failed_is_tried_again_by_itself() {
    let (folder, world) = (Folder::new("flush-again"), World::new(64, BLOCK));
    let plan = Arc::new(FaultPlan::default());
    let tier = DiskTier::open(folder.faulty(32, &plan), &world.arena, IDENTITY).unwrap();
    plan.always(Call::Sync, Effect::Errno(ERRNOS[0].0));
    world.keep(&tier, 0..4);
    let start = Instant::now();
    while !tier.stats().failing {
        assert!(start.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(20));
    }
    plan.clear();
    while tier.stats().failing {
        assert!(start.elapsed() < Duration::from_secs(9), "nothing is written, and it never recovers");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_ring_that_is_always_busy_is_given_up() {
    let (folder, world) = (Folder::new("busy"), World::new(64, BLOCK));
    let plan = Arc::new(FaultPlan::default());
    let tier = DiskTier::open(small(&folder, &plan, true), &world.arena, IDENTITY).unwrap();
    if tier.engines() != ["io_uring"] {
        println!("left out: the kernel gives no ring");
        return;
    }
    world.keep(&tier, 0..4);
    plan.always(Call::Ring, Effect::Errno(11));
    let _ = world.put(&tier, 4..6);
    assert!(tier.flush(Duration::from_secs(5)), "its blocks are held for ever: {:?}", tier.stats());
    assert_eq!(world.get(&tier, &[0, 5], PATIENCE), [true, true]);
    assert!(plan.count(Call::Ring) < 10_000, "it spins: {}", plan.count(Call::Ring));
}

#[test]
fn a_folder_that_cannot_be_made_anew_is_told_once_until_it_can() {
    listen();
    let (folder, world) = (Folder::new("gone"), World::new(64, BLOCK));
    let tier = folder.open(&world, 32);
    world.keep(&tier, 0..8);
    std::fs::remove_dir_all(&folder.path).unwrap();
    std::fs::write(&folder.path, "in the way").unwrap();
    let start = Instant::now();
    for id in (10..).take_while(|_| start.elapsed() < Duration::from_millis(3500)) {
        let _ = world.put(&tier, [id]);
        assert!(tier.flush(PATIENCE));
        std::thread::sleep(Duration::from_millis(50));
    }
    let said = warnings(&folder);
    assert_eq!(said.len(), 1, "{said:#?}");
    assert!(said[0].contains("made anew") && tier.stats().failing);
    world.get(&tier, &[0, 1], PATIENCE);
    let _ = world.put(&tier, [9]);
    std::fs::remove_file(&folder.path).unwrap();
    let start = Instant::now();
    while !folder.blocks_file().exists() || tier.stats().failing {
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", tier.stats());
        std::thread::sleep(Duration::from_millis(20));
    }
    recovers(&world, &tier, 50);
}
