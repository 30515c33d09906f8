//! An engine with a disk below: blocks are found again after eviction and after a restart, and only by their own model.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

#[path = "common/mod.rs"]
mod common;
mod folder;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use folder::Folder;
use kvortex::{Engine, EngineConfig, Keys, Namespace};
use kvortex_mem::copy::suite::{DeviceWorld, World};
use kvortex_mem::device::{Device, RawStream};
use kvortex_mem::file::{Call, Effect, FaultPlan};
use kvortex_mem::sim::Sim;
use kvortex_mem::span::Region;

const PATIENCE: Duration = Duration::from_secs(20);

fn configured(folder: &Folder, blocks: usize, model: u8) -> EngineConfig {
    let namespace = Namespace::from_digest([model; 32]);
    EngineConfig { disk: Some(folder.config(256)), namespace, disk_read_deadline: PATIENCE, ..config(blocks) }
}

fn with_disk(folder: &Folder, blocks: usize, model: u8) -> Engine {
    let engine = Engine::create(configured(folder, blocks, model)).unwrap();
    engine.bind(BLOCK, Namespace::from_digest([model; 32])).unwrap();
    assert!(engine.flush(PATIENCE).unwrap());
    engine
}

fn prefix(engine: &Engine, keys: &[Key]) -> usize {
    engine.match_prefix(Keys::from_slices(keys)).unwrap()
}

#[test]
fn what_was_evicted_comes_back_from_the_disk() {
    let (folder, all) = (Folder::new("evicted"), keys(0..60));
    let engine = with_disk(&folder, 20, 1);
    for run in all.chunks(6) {
        save(&engine, run);
        assert!(engine.flush(PATIENCE).unwrap());
    }
    assert!(engine.stats().evictions > 0);
    for run in all.chunks(6) {
        assert_eq!(prefix(&engine, run), 6);
        assert_eq!(load(&engine, run).blocks, 6);
        assert_eq!(engine.lease_prefix(Keys::from_slices(run)).unwrap().len(), 6);
    }
    let disk = engine.stats().disk.unwrap().tier;
    assert_eq!((disk.blocks, disk.corrupt), (60, 0));
    assert!(disk.hits >= 40);
}

#[test]
fn a_new_engine_finds_what_an_earlier_one_kept() {
    let (folder, all) = (Folder::new("anew"), keys(0..12));
    save(&with_disk(&folder, 20, 1), &all);
    let engine = with_disk(&folder, 20, 1);
    assert_eq!(engine.check(Keys::from_slices(&all)).unwrap().count(), 12);
    assert_eq!(prefix(&engine, &all), 12);
    assert_eq!(load(&engine, &all).blocks, 12);
    drop(engine);
    let other = with_disk(&folder, 20, 2);
    assert_eq!((prefix(&other, &all), load(&other, &all).blocks), (0, 0));
}

#[test]
fn a_prefix_is_brought_up_to_its_first_hole() {
    let (folder, all) = (Folder::new("hole"), keys(0..12));
    save(&with_disk(&folder, 20, 1), &[&all[..5], &all[6..]].concat());
    let engine = with_disk(&folder, 20, 1);
    assert_eq!(prefix(&engine, &all), 5);
    assert_eq!(engine.stats().blocks, 5, "what lies behind a hole is of no use");
    assert_eq!(load(&engine, &all).blocks, 11);
}

#[test]
fn without_a_namespace_nothing_is_kept() {
    let folder = Folder::new("nobody");
    let engine =
        Engine::create(EngineConfig { namespace: Namespace::default(), ..configured(&folder, 20, 1) }).unwrap();
    save(&engine, &keys(0..4));
    assert_eq!((engine.stats().disk, folder.path.exists()), (None, false));
}

#[test]
fn a_reset_forgets_the_disk_too() {
    let (folder, all) = (Folder::new("reset"), keys(0..8));
    let engine = with_disk(&folder, 20, 1);
    save(&engine, &all);
    assert_eq!(engine.reset().unwrap(), 8);
    assert_eq!(prefix(&engine, &all), 0);
    drop(engine);
    assert_eq!(prefix(&with_disk(&folder, 20, 1), &all), 0);
}

#[test]
fn a_slow_disk_is_waited_for_until_the_deadline() {
    let (folder, all) = (Folder::new("deadline"), keys(0..8));
    save(&with_disk(&folder, 20, 1), &all);
    let plan = Arc::new(FaultPlan::default());
    let mut config = EngineConfig { disk: Some(folder.faulty(256, &plan)), ..configured(&folder, 20, 1) };
    config.disk_read_deadline = Duration::from_millis(100);
    let engine = Engine::create(config).unwrap();
    engine.bind(BLOCK, Namespace::from_digest([1; 32])).unwrap();
    assert!(engine.flush(PATIENCE).unwrap());
    plan.always(Call::Read, Effect::Delay(Duration::from_millis(900)));
    let start = Instant::now();
    assert_eq!(prefix(&engine, &all), 0);
    assert!(start.elapsed() < Duration::from_millis(800));
    plan.clear();
    // What had begun lands later, and what had not can be asked for again.
    while load(&engine, &all).blocks < 8 {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn many_want_the_same_and_it_is_read_once() {
    let (folder, all) = (Folder::new("herd"), keys(0..16));
    save(&with_disk(&folder, 40, 1), &all);
    let engine = with_disk(&folder, 40, 1);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(prefix(&engine, &all), 16));
        }
    });
    assert_eq!(engine.stats().disk.unwrap().tier.hits, 16);
}

/// An engine over blocks that an earlier one kept, whose reads the plan can hold up.
fn over_a_slow_disk(folder: &Folder, all: &[Key], deadline: Duration) -> (Engine, Arc<FaultPlan>) {
    save(&with_disk(folder, 40, 1), all);
    let plan = Arc::new(FaultPlan::default());
    let config = EngineConfig { disk: Some(folder.faulty(256, &plan)), ..configured(folder, 40, 1) };
    let engine = Engine::create(EngineConfig { disk_read_deadline: deadline, ..config }).unwrap();
    engine.bind(BLOCK, Namespace::from_digest([1; 32])).unwrap();
    assert!(engine.flush(PATIENCE).unwrap());
    (engine, plan)
}

#[test]
fn an_asynchronous_load_brings_blocks_up_and_nobody_waits() {
    let (folder, all) = (Folder::new("later"), keys(0..12));
    let (engine, plan) = over_a_slow_disk(&folder, &all, PATIENCE);
    plan.always(Call::Read, Effect::Delay(Duration::from_secs(1)));
    let asked = [&all[..], &keys(50..52)].concat();
    let (target, start) = (poisoned(14), Instant::now());
    let ticket = engine.load_async(Keys::from_slices(&asked), pages(&target, 14)).unwrap();
    let computed = keys(100..103);
    let saved = engine
        .save_after(Keys::from_slices(&computed), pages(&filled(&computed), 3), std::slice::from_ref(&ticket))
        .unwrap();
    assert!(start.elapsed() < Duration::from_millis(800) && !ticket.is_done() && !saved.is_done());
    let report = engine.wait(&ticket, Some(PATIENCE)).unwrap();
    assert_eq!((report.blocks, report.missing), (12, 2));
    check(&asked, &target, &report);
    assert_eq!(engine.wait(&saved, Some(PATIENCE)).unwrap().blocks, 3);
    assert_eq!(load(&engine, &computed).blocks, 3);
}

#[test]
fn an_asynchronous_load_takes_what_is_there_at_its_deadline() {
    let (folder, all) = (Folder::new("late"), keys(0..12));
    let (engine, plan) = over_a_slow_disk(&folder, &all, Duration::from_millis(100));
    assert_eq!(prefix(&engine, &all[..4]), 4);
    plan.always(Call::Read, Effect::Delay(Duration::from_secs(2)));
    let (target, start) = (poisoned(12), Instant::now());
    let ticket = engine.load_async(Keys::from_slices(&all), pages(&target, 12)).unwrap();
    let report = engine.wait(&ticket, Some(PATIENCE)).unwrap();
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    assert_eq!((report.blocks, report.missing), (4, 8));
    check(&all, &target, &report);
}

#[test]
fn a_fence_and_a_shutdown_see_loads_that_still_wait() {
    let (folder, all) = (Folder::new("fence"), keys(0..12));
    let (engine, plan) = over_a_slow_disk(&folder, &all, PATIENCE);
    plan.always(Call::Read, Effect::Delay(Duration::from_millis(200)));
    let target = poisoned(6);
    let ticket = engine.load_async(Keys::from_slices(&all[..6]), pages(&target, 6)).unwrap();
    engine.fence(RawStream(0), &pages(&target, 6)).unwrap();
    assert!(ticket.is_done(), "the pages may be written now");
    plan.clear();
    plan.always(Call::Read, Effect::Delay(Duration::from_millis(800)));
    let (target, start) = (poisoned(6), Instant::now());
    let ticket = engine.load_async(Keys::from_slices(&all[6..]), pages(&target, 6)).unwrap();
    engine.shutdown(Duration::from_secs(10));
    assert!(ticket.is_done() && start.elapsed() < Duration::from_secs(5));
    let report = ticket.wait(None).unwrap();
    assert_eq!((report.blocks, report.missing), (0, 6));
    check(&all[6..], &target, &report);
}

#[test]
fn a_load_into_a_device_is_given_at_once_and_the_next_one_finds_the_rest() {
    let (folder, all) = (Folder::new("device"), keys(0..12));
    save(&with_disk(&folder, 40, 1), &all);
    let device: Arc<dyn Device> = Sim::new(1);
    let world = DeviceWorld::new(&device);
    let engine = Engine::with_device(configured(&folder, 40, 1), device).unwrap();
    engine.bind(BLOCK, Namespace::from_digest([1; 32])).unwrap();
    assert!(engine.flush(PATIENCE).unwrap());
    let (mut blocks, start) = (0, Instant::now());
    while blocks < 12 {
        assert!(start.elapsed() < PATIENCE, "{blocks}");
        let target = world.region(&poisoned(12).to_vec(), true);
        let ticket = engine.load_async(Keys::from_slices(&all), pages(&target, 12)).unwrap();
        let report = engine.wait(&ticket, Some(PATIENCE)).unwrap();
        check(&all, &Region::from_vec(world.bytes(&target)), &report);
        blocks = report.blocks;
    }
}

#[test]
fn a_disk_that_hangs_is_not_waited_for_again_and_again() {
    let (folder, all) = (Folder::new("hangs"), keys(0..6));
    let (engine, plan) = over_a_slow_disk(&folder, &all, Duration::from_millis(100));
    plan.always(Call::Read, Effect::Delay(Duration::from_secs(6)));
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1800) {
        prefix(&engine, &all);
    }
    let asked = Instant::now();
    (0..10).for_each(|_| assert_eq!(prefix(&engine, &all), 0));
    let waited = asked.elapsed();
    assert!(waited < Duration::from_millis(250), "ten lookups waited {waited:?} for a disk that gives nothing");
    assert!(engine.stats().disk.unwrap().tier.failing);
    plan.clear();
    // What hung ends by itself, and then the disk is asked again.
    std::thread::sleep(Duration::from_secs(6));
    let end = Instant::now() + Duration::from_secs(5);
    while prefix(&engine, &all) < 6 {
        assert!(Instant::now() < end, "{:?}", engine.stats().disk);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!engine.stats().disk.unwrap().tier.failing);
}
