//! A tier whose folder cannot be used yet comes when it can, and only then has blocks.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod folder;

use std::sync::Arc;
use std::time::{Duration, Instant};

use folder::*;
use kvortex::tier::disk::{DiskConfig, DiskTier};
use kvortex::tier::guard::{Guard, GuardOptions};
use kvortex::tier::suite::{PATIENCE, World, conforms, has};
use kvortex::tier::{Put, Tier, late};

fn late(config: DiskConfig, world: &World) -> Arc<dyn Tier> {
    let arena = Arc::clone(&world.arena);
    let open = move || Ok(Arc::new(DiskTier::open(config.clone(), &arena, IDENTITY)?) as Arc<dyn Tier>);
    late::open("disk", open).unwrap()
}

/// Waits until it is there.
fn comes(tier: &dyn Tier) {
    let start = Instant::now();
    while tier.stats().failing {
        assert!(start.elapsed() < Duration::from_secs(5), "it does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(tier.flush(PATIENCE));
}

#[test]
fn it_keeps_the_contract_once_it_is_there() {
    conforms(&|| {
        let (folder, mut world) = (Folder::new("late"), World::new(128, BLOCK));
        let first = folder.open(&world, 64);
        let tier = late(folder.config(64), &world);
        drop(first);
        comes(&*tier);
        full(&*tier);
        world.guard = Some(Box::new(folder));
        (world, Box::new(Guard::new(tier, GuardOptions::default())))
    });
}

#[test]
fn it_takes_over_what_the_one_before_it_kept() {
    let (folder, world) = (Folder::new("over"), World::new(128, BLOCK));
    let first = folder.open(&world, 64);
    world.keep(&first, 0..6);
    let second = late(folder.config(64), &world);
    assert!(second.stats().failing && second.flush(Duration::ZERO));
    assert_eq!(world.put(&*second, [7]), [Put::Dropped]);
    assert_eq!((has(&*second, 0..2), world.get(&*second, &[0, 1], PATIENCE)), (vec![false; 2], vec![false; 2]));
    drop(first);
    comes(&*second);
    assert_eq!(world.get(&*second, &[0, 5, 7], PATIENCE), [true, true, false]);
}

#[test]
fn cleared_or_stopped_before_it_is_there_it_never_comes() {
    for stopped in [false, true] {
        let (folder, world) = (Folder::new("never"), World::new(64, BLOCK));
        let first = folder.open(&world, 64);
        world.keep(&first, 0..4);
        let second = late(folder.config(64), &world);
        if stopped {
            assert!(second.stop(PATIENCE));
        } else {
            assert!(!second.clear(), "it cannot be promised");
        }
        drop(first);
        std::thread::sleep(Duration::from_millis(2500));
        assert_eq!(has(&*second, 0..4), [false; 4]);
        assert!(second.stats().failing);
        folder.open(&world, 64);
    }
}
