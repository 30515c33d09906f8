//! The disk tier against its contract, by threads and by a ring, and what survives a restart.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod folder;

use std::sync::Arc;
use std::time::{Duration, Instant};

use folder::*;
use kvortex::Namespace;
use kvortex::tier::disk::{Admission, DiskConfig, DiskTier};
use kvortex::tier::suite::{PATIENCE, World, conforms, has};
use kvortex::tier::{Identity, Put, Tier};
use kvortex_mem::file::{Call, Effect, FaultPlan};

#[test]
fn it_keeps_the_contract_by_threads_and_by_a_ring() {
    for ring in [false, true] {
        for direct in [false, true] {
            conforms(&|| {
                let folder = Folder::new("suite");
                let mut config = folder.config(64);
                config.io.ring = ring;
                config.folders[0].direct = direct;
                fresh(config, vec![folder])
            });
        }
    }
}

#[test]
fn where_one_of_several_folders_is_missing_the_others_are_left_as_they_are() {
    let (one, two, world) = (Folder::new("there"), Folder::new("missing"), World::new(64, BLOCK));
    let tier = one.open(&world, 64);
    world.keep(&tier, 0..4);
    drop(tier);
    std::fs::write(&two.path, "in the way").unwrap();
    let before = std::fs::read(one.blocks_file()).unwrap();
    let config = DiskConfig { folders: vec![one.slab(), two.slab()], ..one.config(64) };
    assert!(DiskTier::open(config, &world.arena, IDENTITY).is_err());
    // It is tried again every second.
    assert!(std::fs::read(one.blocks_file()).unwrap() == before);
    std::fs::remove_file(&two.path).unwrap();
}

#[test]
fn several_folders_are_one_tier() {
    conforms(&|| {
        let (one, two) = (Folder::new("several-1"), Folder::new("several-2"));
        fresh(DiskConfig { folders: vec![one.slab(), two.slab()], ..one.config(64) }, vec![one, two])
    });
}

#[test]
fn a_restart_finds_everything() {
    let folder = Folder::new("restart");
    let world = World::new(128, BLOCK);
    for round in 0..4 {
        let tier = folder.open(&world, 64);
        let kept = 10 * round;
        assert!(tier.flush(PATIENCE));
        assert_eq!(tier.stats().recovered, kept);
        let ids: Vec<usize> = (0..kept).collect();
        assert!(world.get(&tier, &ids, PATIENCE).iter().all(|&found| found));
        world.keep(&tier, kept..kept + 10);
    }
}

#[test]
fn the_oldest_goes_first_after_a_restart_too() {
    let folder = Folder::new("age");
    let world = World::new(128, BLOCK);
    let tier = folder.open(&world, 64);
    let capacity = full(&tier);
    (0..capacity).rev().for_each(|id| world.keep(&tier, [id]));
    drop(tier);
    let tier = folder.open(&world, 64);
    assert!(tier.flush(PATIENCE));
    (1000..1010).for_each(|id| world.keep(&tier, [id]));
    let kept = has(&tier, 0..capacity);
    assert_eq!(kept.iter().filter(|&&kept| kept).count(), capacity - 10);
    assert!(kept[..capacity - 10].iter().all(|&kept| kept), "{kept:?}");
}

#[test]
fn the_tail_of_a_long_prompt_goes_before_its_head() {
    let folder = Folder::new("long");
    let world = World::new(400, BLOCK);
    let tier = folder.open(&world, 300);
    let capacity = full(&tier);
    // More than are written together, and the writer is idle when they come.
    world.keep(&tier, 0..250);
    (0..10).for_each(|batch| world.keep(&tier, 1000 + batch * 10..1010 + batch * 10));
    let kept = has(&tier, 0..250);
    let prefix = kept.iter().take_while(|&&kept| kept).count();
    assert_eq!((prefix, kept.iter().filter(|&&kept| kept).count()), (capacity - 100, capacity - 100), "{kept:?}");
}

#[test]
fn a_prompt_that_has_gone_on_loses_its_new_tail_first() {
    let folder = Folder::new("turns");
    let world = World::new(400, BLOCK);
    let tier = folder.open(&world, 100);
    let capacity = full(&tier);
    world.keep(&tier, 0..30);
    world.keep(&tier, 0..60);
    (0..capacity - 30).for_each(|id| world.keep(&tier, [1000 + id]));
    let kept = has(&tier, 0..60);
    assert!(kept[..30].iter().all(|&kept| kept) && !kept[30..].iter().any(|&kept| kept), "{kept:?}");
}

#[test]
fn another_identity_never_matches_and_leaves_what_is_there() {
    let folder = Folder::new("identity");
    let world = World::new(64, BLOCK);
    let open = |identity| DiskTier::open(folder.config(64), &world.arena, identity).unwrap();
    let tier = open(IDENTITY);
    world.keep(&tier, 0..8);
    drop(tier);
    let others = [
        Identity { namespace: Namespace::from_digest([2; 32]), ..IDENTITY },
        Identity { row: 1, ..IDENTITY },
        Identity { world: 2, ..IDENTITY },
    ];
    for other in others {
        let tier = open(other);
        assert!(tier.flush(PATIENCE));
        assert_eq!((tier.stats().blocks, has(&tier, 0..8)), (0, vec![false; 8]));
    }
    let tier = open(IDENTITY);
    assert!(tier.flush(PATIENCE));
    let found = world.get(&tier, &[0, 3, 7], PATIENCE);
    assert_eq!(found, [true; 3], "{:?}", tier.stats());
}

#[test]
fn another_layout_starts_anew() {
    let folder = Folder::new("layout");
    let world = World::new(64, BLOCK);
    world.keep(&folder.open(&world, 64), 0..8);
    let other = World::new(64, BLOCK + 1);
    let tier = folder.open(&other, 64);
    assert!(tier.flush(PATIENCE));
    assert_eq!(tier.stats().blocks, 0);
    other.keep(&tier, 0..4);
    assert_eq!(other.get(&tier, &[0, 5], PATIENCE), [true, false]);
}

#[test]
fn a_cleared_folder_stays_empty() {
    let folder = Folder::new("cleared");
    let world = World::new(64, BLOCK);
    let tier = folder.open(&world, 64);
    world.keep(&tier, 0..8);
    assert!(tier.clear());
    world.keep(&tier, 20..22);
    drop(tier);
    let tier = folder.open(&world, 64);
    assert!(tier.flush(PATIENCE));
    assert_eq!(tier.stats().blocks, 2);
    assert_eq!(world.get(&tier, &[0, 1, 20, 21], PATIENCE), [false, false, true, true]);
}

#[test]
fn the_cap_holds_on_the_device_and_when_it_is_lowered() {
    let folder = Folder::new("cap");
    let world = World::new(128, BLOCK);
    for blocks in [64, 200, 32, 100] {
        let tier = folder.open(&world, blocks);
        full(&tier);
        (0..4).for_each(|batch| world.keep(&tier, batch * 100..batch * 100 + 60));
        let taken = folder.taken();
        assert!(taken <= tier.stats().max_bytes, "{taken} bytes taken with room for {blocks} blocks");
        assert!(tier.stats().capacity_blocks >= blocks * 8 / 10, "{:?}", tier.stats());
    }
}

#[test]
fn a_cap_that_is_lowered_below_a_segment_still_keeps_blocks() {
    let folder = Folder::new("lowered");
    let world = World::new(64, BLOCK);
    full(&folder.open(&world, 2000));
    let tier = folder.open(&world, 16);
    assert!(full(&tier) >= 12, "{:?}", tier.stats());
    world.keep(&tier, 0..8);
    assert_eq!(world.get(&tier, &[0, 7], PATIENCE), [true, true]);
    assert!(folder.taken() <= tier.stats().max_bytes);
}

#[test]
fn a_cap_without_room_for_a_block_is_refused_by_name() {
    let (folder, world) = (Folder::new("tiny"), World::new(16, BLOCK));
    let tier = folder.open(&world, 16);
    world.keep(&tier, 0..8);
    drop(tier);
    let config = DiskConfig { max_bytes: 40_000, ..folder.config(16) };
    let error = DiskTier::open(config, &world.arena, IDENTITY).err().unwrap().to_string();
    assert!(error.contains("disk_size_bytes cannot be 40000") && error.contains("5000 bytes"), "{error}");
    let tier = folder.open(&world, 16);
    assert!(tier.flush(PATIENCE));
    assert_eq!(tier.stats().blocks, 8, "nothing was dropped for it");
}

#[test]
fn a_queue_smaller_than_a_block_takes_one() {
    let folder = Folder::new("narrow");
    let world = World::new(16, BLOCK);
    let config = DiskConfig { queue_bytes: 100, ..folder.config(64) };
    let tier = DiskTier::open(config, &world.arena, IDENTITY).unwrap();
    for id in 0..4 {
        world.keep(&tier, [id]);
    }
    assert_eq!(tier.stats().written, 4);
}

#[test]
fn a_full_queue_drops_at_once() {
    let folder = Folder::new("queue");
    let world = World::new(256, BLOCK);
    let config = DiskConfig { queue_bytes: 4 * 8192, ..folder.config(64) };
    let tier = DiskTier::open(config, &world.arena, IDENTITY).unwrap();
    let start = Instant::now();
    let puts = world.put(&tier, 0..100);
    assert!(puts.contains(&Put::Dropped) && puts.contains(&Put::Queued));
    assert!(tier.flush(PATIENCE) && start.elapsed() < Duration::from_secs(5));
    let dropped = puts.iter().filter(|&&put| put == Put::Dropped).count();
    assert_eq!(tier.stats().dropped, dropped as u64);
}

#[test]
fn a_second_touch_that_finds_no_room_does_not_begin_again() {
    let (folder, plan) = (Folder::new("touched"), Arc::new(FaultPlan::default()));
    let world = World::new(64, BLOCK);
    let config = DiskConfig { admission: Admission::SecondTouch, queue_bytes: 2 * 8192, ..folder.faulty(64, &plan) };
    let tier = DiskTier::open(config, &world.arena, IDENTITY).unwrap();
    assert!(tier.flush(PATIENCE));
    assert_eq!(world.put(&tier, 0..3), [Put::Refused; 3]);
    plan.always(Call::Write, Effect::Delay(Duration::from_millis(300)));
    assert_eq!(world.put(&tier, 0..3), [Put::Queued, Put::Queued, Put::Dropped]);
    assert!(tier.flush(PATIENCE));
    assert_eq!(world.put(&tier, 0..3), [Put::Present, Put::Present, Put::Queued]);
}

#[test]
fn second_touch_writes_what_comes_again() {
    let folder = Folder::new("touch");
    let world = World::new(64, BLOCK);
    let config = DiskConfig { admission: Admission::SecondTouch, ..folder.config(64) };
    let tier = DiskTier::open(config, &world.arena, IDENTITY).unwrap();
    assert_eq!(world.put(&tier, [1, 2]), [Put::Refused; 2]);
    assert_eq!(world.put(&tier, [2, 3]), [Put::Queued, Put::Refused]);
    assert!(tier.flush(PATIENCE));
    assert_eq!((has(&tier, 1..4), tier.stats().refused), (vec![false, true, false], 3));
}
