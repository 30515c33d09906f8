//! The engine from outside: what it keeps is exact, and what it cannot keep is a miss.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod common;

use std::time::Duration;

use common::*;
use kvortex::{Engine, EngineConfig, Error, Keys, Namespace, Stats};
use kvortex_mem::span::{Pages, Pattern, Place, Region, Segment};

#[test]
fn what_was_saved_comes_back() {
    let engine = engine(100);
    let all = keys(0..50);
    let report = save(&engine, &all);
    assert_eq!((report.blocks, report.present, report.refused, report.bytes), (50, 0, 0, 50 * BLOCK as u64));
    assert!(report.mask.all());
    let report = load(&engine, &all);
    assert_eq!((report.blocks, report.missing, report.bytes), (50, 0, 50 * BLOCK as u64));
}

#[test]
fn missing_blocks_leave_their_pages_alone() {
    let engine = engine(100);
    save(&engine, &keys((0..40).filter(|i| i % 3 != 1)));
    let report = load(&engine, &keys(0..40));
    assert_eq!(report.missing, 13);
    assert!((0..40).all(|i| report.mask.get(i) == (i % 3 != 1)));
    assert_eq!(engine.match_prefix(Keys::from_slices(&keys(0..40))).unwrap(), 1);
    assert_eq!(engine.check(Keys::from_slices(&keys(0..40))).unwrap(), report.mask);
}

#[test]
fn saving_again_copies_nothing() {
    let engine = engine(100);
    save(&engine, &keys(0..10));
    let report = save(&engine, &keys(5..15));
    assert_eq!((report.blocks, report.present, report.bytes), (5, 5, 5 * BLOCK as u64));
    assert!(report.mask.all());
    assert_eq!(engine.stats().duplicate_blocks, 5);
}

#[test]
fn a_full_engine_forgets_the_least_recently_used() {
    let engine = engine(100);
    for i in 0..20 {
        save(&engine, &keys(i * 10..i * 10 + 10));
        load(&engine, &keys(0..10));
    }
    assert_eq!(load(&engine, &keys(0..10)).blocks, 10, "used all the time");
    assert_eq!(load(&engine, &keys(190..200)).blocks, 10, "used last");
    assert_eq!(load(&engine, &keys(10..20)).blocks, 0, "not used for long");
    let stats = engine.stats();
    assert!(stats.blocks <= 80, "{} blocks are more than the watermark", stats.blocks);
    assert_eq!(stats.blocks as u64 + stats.evictions, 200);
}

#[test]
fn a_save_larger_than_the_engine_keeps_its_head() {
    let engine = Engine::create(EngineConfig { watermark: 1.0, ..config(10) }).unwrap();
    save(&engine, &keys(100..110));
    let report = save(&engine, &keys(0..25));
    assert_eq!((report.blocks, report.refused), (10, 15));
    assert_eq!(report.mask.prefix(), 10);
    assert_eq!(load(&engine, &keys(0..25)).mask.prefix(), 10);
}

/// Room for a prompt's new blocks must not be made by evicting the same prompt's old ones: a tail without its head is
/// never found.
#[test]
fn room_for_a_tail_is_not_made_of_its_head() {
    let engine = Engine::create(EngineConfig { watermark: 1.0, ratio: 0.0, ..config(20) }).unwrap();
    save(&engine, &keys(0..10));
    save(&engine, &keys(100..110));
    let report = save(&engine, &keys(0..20));
    assert_eq!((report.present, report.blocks), (10, 10));
    assert_eq!(load(&engine, &keys(0..20)).mask.prefix(), 20);
    save(&engine, &keys(200..205));
    assert_eq!(engine.match_prefix(Keys::from_slices(&keys(0..20))).unwrap(), 15, "the tail goes first");
}

#[test]
fn leased_blocks_stay_and_new_ones_are_refused_at_once() {
    let engine = Engine::create(EngineConfig { watermark: 1.0, ..config(10) }).unwrap();
    let all = keys(0..10);
    save(&engine, &all);
    let lease = engine.lease_prefix(Keys::from_slices(&all)).unwrap();
    assert_eq!((lease.len(), engine.stats().leased_blocks), (10, 10));
    let report = save(&engine, &keys(50..60));
    assert_eq!((report.blocks, report.refused), (0, 10));
    assert!(!report.mask.any());
    assert_eq!(load(&engine, &all).blocks, 10);
    drop(lease);
    assert_eq!(save(&engine, &keys(50..60)).blocks, 10);
    assert_eq!(load(&engine, &all).blocks, 0);
}

#[test]
fn leases_and_their_bytes_outlive_reset_and_shutdown() {
    let engine = engine(10);
    let all = keys(0..4);
    save(&engine, &all);
    let (lease, mask) = engine.lease_each(Keys::from_slices(&all)).unwrap();
    assert!(mask.all());
    assert_eq!(engine.reset().unwrap(), 4);
    assert_eq!(load(&engine, &all).blocks, 0);
    assert_eq!(engine.stats().bytes_used, 4 * BLOCK, "leased slots are not free");
    assert!(engine.shutdown(Duration::from_secs(5)));
    assert_eq!((lease.len(), lease.block_bytes()), (4, BLOCK));
    assert!((0..4).all(|i| lease.addr(i).is_some()) && lease.addr(4).is_none());
}

#[test]
fn reset_forgets_everything_and_frees_the_room() {
    let engine = engine(10);
    save(&engine, &keys(0..8));
    assert_eq!(engine.reset().unwrap(), 8);
    assert_eq!(engine.stats().bytes_used, 0);
    assert_eq!(load(&engine, &keys(0..8)).missing, 8);
    assert_eq!(save(&engine, &keys(0..8)).blocks, 8);
}

#[test]
fn tickets_end_with_the_same_report() {
    let engine = engine(100);
    let all = keys(0..50);
    let ticket = engine.save_async(Keys::from_slices(&all), pages(&filled(&all), 50)).unwrap();
    let report = engine.wait(&ticket, Some(Duration::from_secs(10))).unwrap();
    assert_eq!((report.blocks, ticket.is_done()), (50, true));
    assert_eq!(engine.wait(&ticket, None).unwrap(), report, "a ticket can be waited for twice");
    let target = poisoned(50);
    let ticket = engine.load_async(Keys::from_slices(&all), pages(&target, 50)).unwrap();
    check(&all, &target, &ticket.wait(None).unwrap());
    assert_eq!(engine.stats().in_flight, 0);
}

#[test]
fn strided_pages_of_several_segments_are_joined() {
    let engine = engine(10);
    let all = keys(0..3);
    let region = Region::from_vec(vec![0; 2 * 3 * 4096]);
    // Two segments of 100 rows of 25 bytes, 32 bytes apart, pages 4096 bytes apart.
    let segment = |first: usize| Segment::Table {
        region: region.clone(),
        pattern: std::sync::Arc::new(Pattern::strided(1, &[100, 25], &[32, 1]).unwrap()),
        first: first as isize,
        stride: 4096,
        count: 3,
    };
    for (i, key) in all.iter().enumerate() {
        let bytes = bytes_of(key, BLOCK);
        for (row, part) in bytes.chunks(25).enumerate() {
            region.write(i * 4096 + (row / 100) * 3 * 4096 + (row % 100) * 32, part).unwrap();
        }
    }
    let strided = Pages::new(vec![segment(0), segment(3 * 4096)]).unwrap();
    engine.save(Keys::from_slices(&all), strided).unwrap();
    assert_eq!(load(&engine, &all).blocks, 3);
}

/// What a bad call must not change.
fn unchanged(engine: &Engine, call: impl FnOnce(&Engine) -> Error) -> String {
    let before = engine.stats();
    let message = call(engine).to_string();
    let after = engine.stats();
    assert_eq!(Stats { in_flight: 0, ..after }, before);
    assert_eq!(engine.stats().in_flight, 0);
    message
}

#[test]
fn bad_calls_are_named_and_change_nothing() {
    let engine = engine(10);
    save(&engine, &keys(0..2));
    let three = keys(0..3);
    let message = unchanged(&engine, |e| e.save(Keys::from_slices(&three), pages(&poisoned(2), 2)).unwrap_err());
    assert!(message.contains("3 keys do not go with 2 blocks"), "{message}");
    let small = || {
        let region = Region::from_vec(vec![0; 300]);
        let pattern = std::sync::Arc::new(Pattern::contiguous(100));
        Pages::new(vec![Segment::Table { region, pattern, first: 0, stride: 100, count: 3 }]).unwrap()
    };
    let message = unchanged(&engine, |e| e.save(Keys::from_slices(&three), small()).unwrap_err());
    assert!(message.contains("5000 bytes, not 100"), "{message}");
    let message = unchanged(&engine, |e| e.load(Keys::from_slices(&three), small()).unwrap_err());
    assert!(message.contains("5000 bytes, not 100"), "{message}");
    let read_only = Region::from_vec_read_only(vec![0; 3 * BLOCK]);
    let message = unchanged(&engine, |e| e.load(Keys::from_slices(&three), pages(&read_only, 3)).unwrap_err());
    assert!(message.contains("read-only"), "{message}");
    let overlapping = || {
        let pattern = std::sync::Arc::new(Pattern::contiguous(BLOCK));
        let region = poisoned(3);
        Pages::new(vec![Segment::Table { region, pattern, first: 0, stride: BLOCK as isize - 1, count: 3 }]).unwrap()
    };
    let message = unchanged(&engine, |e| e.load(Keys::from_slices(&three), overlapping()).unwrap_err());
    assert!(message.contains("overlap"), "{message}");
    assert!(matches!(engine.bind(100, Namespace::default()), Err(Error::Layout { .. })));
    assert!(matches!(engine.bind(BLOCK, Namespace::from_digest([1; 32])), Err(Error::Namespace { .. })));
    engine.bind(BLOCK, Namespace::default()).unwrap();
}

#[test]
fn knobs_that_cannot_work_are_named() {
    let base = config(10);
    for (config, part) in [
        (EngineConfig { pool_bytes: 0, ..base.clone() }, "cpu_pool_size_bytes cannot be 0"),
        (EngineConfig { threads: 0, ..base.clone() }, "num_transfer_streams cannot be 0"),
        (EngineConfig { watermark: 1.5, ..base.clone() }, "eviction_watermark cannot be 1.5"),
        (EngineConfig { watermark: f64::NAN, ..base.clone() }, "eviction_watermark cannot be NaN"),
        (EngineConfig { ratio: -0.1, ..base.clone() }, "eviction_ratio cannot be -0.1"),
        (EngineConfig { block_bytes: Some(1 << 30), ..base.clone() }, "cpu_pool_size_bytes cannot be 81920"),
        (EngineConfig { block_bytes: Some(0), ..base.clone() }, "at least 1 byte"),
    ] {
        let message = Engine::create(config).err().unwrap().to_string();
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn a_block_that_does_not_fit_leaves_the_engine_unbound_and_usable() {
    let engine = engine(1);
    assert!(engine.bind(1 << 20, Namespace::default()).is_err());
    assert_eq!(engine.block_bytes(), None);
    save(&engine, &keys(0..1));
    assert_eq!(engine.capacity_blocks(), Some(1));
}

#[test]
fn an_engine_without_blocks_answers() {
    let engine = engine(1);
    assert_eq!(engine.match_prefix(Keys::from_slices(&keys(0..5))).unwrap(), 0);
    assert_eq!(load(&engine, &keys(0..5)).missing, 5);
    assert!(engine.lease_prefix(Keys::from_slices(&keys(0..5))).unwrap().is_empty());
    assert_eq!(engine.reset().unwrap(), 0);
    assert_eq!(engine.stats().misses, 10);
}

#[test]
fn no_keys_are_no_work() {
    let engine = engine(1);
    let none = || Pages::new(vec![Segment::List(Vec::new())]).unwrap();
    assert_eq!(engine.save(Keys::from_slices(&[]), none()).unwrap().blocks, 0);
    assert_eq!(engine.load(Keys::from_slices(&[]), none()).unwrap().blocks, 0);
    assert!(engine.save_async(Keys::from_slices(&[]), none()).unwrap().is_done());
    assert_eq!(engine.block_bytes(), None, "nothing was learned from nothing");
}

#[test]
fn a_closed_engine_says_so() {
    let engine = engine(10);
    save(&engine, &keys(0..2));
    assert!(engine.shutdown(Duration::from_secs(5)));
    assert!(engine.shutdown(Duration::from_secs(5)), "twice is fine");
    assert!(engine.is_closed());
    let some = keys(0..2);
    assert!(matches!(engine.save(Keys::from_slices(&some), pages(&filled(&some), 2)), Err(Error::Closed)));
    assert!(matches!(engine.load(Keys::from_slices(&some), pages(&poisoned(2), 2)), Err(Error::Closed)));
    assert!(matches!(engine.match_prefix(Keys::from_slices(&some)), Err(Error::Closed)));
    assert!(matches!(engine.reset(), Err(Error::Closed)));
    assert_eq!(engine.stats().save.blocks, 2, "counters stay");
}

#[test]
fn memory_of_a_device_is_refused_before_anything_changes() {
    let engine = Engine::create(EngineConfig::new(1 << 20)).unwrap();
    let pages = || {
        let region = Region::from_vec(vec![0; 3 * BLOCK]).at(Place::Device(1));
        Pages::contiguous(region, 3).unwrap()
    };
    let all = keys(0..3);
    let keys = || Keys::from_slices(&all);
    for refused in [
        engine.save(keys(), pages()).map(drop),
        engine.load(keys(), pages()).map(drop),
        engine.save_async(keys(), pages()).map(drop),
        engine.load_async(keys(), pages()).map(drop),
    ] {
        let said = refused.unwrap_err().to_string();
        assert!(said.contains("memory of device 1") && said.contains("device=\"cuda\""), "{said}");
    }
    assert_eq!(engine.block_bytes(), None);
}
