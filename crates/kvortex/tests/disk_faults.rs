//! System calls that fail, and processes that are killed: the tier answers misses, never hangs, and recovers by itself.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod folder;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use folder::*;
use kvortex::tier::disk::DiskTier;
use kvortex::tier::suite::{PATIENCE, World};
use kvortex::tier::{Put, Tier};
use kvortex_mem::file::{Call, Effect, Fault, FaultPlan};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EROFS: i32 = 30;

/// Waits until a put is kept.
fn resumes(world: &World, tier: &dyn Tier, id: usize) -> Duration {
    let start = Instant::now();
    loop {
        let put = world.put(tier, [id])[0];
        tier.flush(PATIENCE);
        if put == Put::Present {
            return start.elapsed();
        }
        assert!(start.elapsed() < Duration::from_secs(30), "it never resumes");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_disk_that_cannot_be_written_goes_on_serving_and_resumes() {
    for errno in [ENOSPC, EROFS, EIO] {
        let (folder, world) = (Folder::new("full"), World::new(64, BLOCK));
        let plan = Arc::new(FaultPlan::default());
        let tier = DiskTier::open(folder.faulty(32, &plan), &world.arena, IDENTITY).unwrap();
        world.keep(&tier, 0..8);
        plan.always(Call::Write, Effect::Errno(errno));
        plan.always(Call::Allocate, Effect::Errno(errno));
        let _ = world.put(&tier, 8..12);
        assert!(tier.flush(PATIENCE));
        assert!(tier.stats().failing);
        assert_eq!(world.put(&tier, [20]), [Put::Dropped], "it is paused");
        // The file could not grow either, so room for the four may have been made before that, from the tail on.
        assert_eq!(world.get(&tier, &[0, 3, 8], PATIENCE), [true, true, false]);
        plan.clear();
        assert!(resumes(&world, &tier, 30) < Duration::from_secs(5));
        assert!(!tier.stats().failing);
        assert_eq!(world.get(&tier, &[0, 30], PATIENCE), [true, true]);
    }
}

#[test]
fn a_file_that_cannot_grow_keeps_what_it_has_room_for() {
    let (folder, world) = (Folder::new("grow"), World::new(128, BLOCK));
    let plan = Arc::new(FaultPlan::default());
    // The first call makes the superblocks, the next a segment.
    plan.set(&[Fault { call: Call::Allocate, first: 3, count: u64::MAX, effect: Effect::Errno(ENOSPC) }]);
    let tier = DiskTier::open(folder.faulty(64, &plan), &world.arena, IDENTITY).unwrap();
    for first in 0..10 {
        world.keep(&tier, first * 4..first * 4 + 4);
    }
    let small = tier.stats().capacity_blocks;
    assert!(small > 0 && small < 20 && tier.stats().evictions > 0, "{:?}", tier.stats());
    plan.clear();
    let start = Instant::now();
    while tier.stats().capacity_blocks < 60 {
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", tier.stats());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_slow_disk_is_late_and_nobody_waits_for_it() {
    let (folder, world) = (Folder::new("slow"), World::new(64, BLOCK));
    let plan = Arc::new(FaultPlan::default());
    let tier = DiskTier::open(folder.faulty(32, &plan), &world.arena, IDENTITY).unwrap();
    world.keep(&tier, 0..20);
    plan.always(Call::Read, Effect::Delay(Duration::from_millis(100)));
    let ids: Vec<usize> = (0..20).collect();
    let found = world.get(&tier, &ids, Duration::from_millis(30));
    assert!(found.iter().any(|&found| !found));
    assert!(tier.stats().late > 0);
    plan.clear();
    assert_eq!(world.get(&tier, &ids, PATIENCE), vec![true; 20]);
}

#[test]
fn a_slot_stays_as_it_is_until_its_block_is_written() {
    let (folder, world) = (Folder::new("slots"), World::new(64, BLOCK));
    let plan = Arc::new(FaultPlan::default());
    let tier = DiskTier::open(folder.faulty(32, &plan), &world.arena, IDENTITY).unwrap();
    assert!(tier.flush(PATIENCE));
    plan.always(Call::Write, Effect::Delay(Duration::from_millis(800)));
    assert_eq!(world.put(&tier, 0..4), [Put::Queued; 4]);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(world.arena.slots().free(), 60, "they are being written");
    assert!(tier.flush(PATIENCE));
    assert_eq!(world.arena.slots().free(), 64);
}

#[test]
fn a_folder_that_is_taken_away_is_made_anew() {
    let (folder, world) = (Folder::new("away"), World::new(64, BLOCK));
    let tier = folder.open(&world, 32);
    world.keep(&tier, 0..8);
    std::fs::remove_dir_all(&folder.path).unwrap();
    world.get(&tier, &[0, 1], PATIENCE);
    let start = Instant::now();
    while !folder.blocks_file().exists() {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(20));
    }
    resumes(&world, &tier, 50);
    assert!(tier.stop(PATIENCE));
    drop(tier);
    let tier = folder.open(&world, 32);
    assert!(tier.flush(PATIENCE));
    assert_eq!(world.get(&tier, &[50], PATIENCE), [true]);
}

#[test]
fn what_is_offered_again_after_a_clear_is_kept_while_the_first_is_still_being_written() {
    let (folder, world) = (Folder::new("again"), World::new(64, BLOCK));
    let plan = Arc::new(FaultPlan::default());
    let tier = DiskTier::open(folder.faulty(32, &plan), &world.arena, IDENTITY).unwrap();
    assert!(tier.flush(PATIENCE));
    plan.always(Call::Write, Effect::Delay(Duration::from_millis(600)));
    assert_eq!(world.put(&tier, 0..4), [Put::Queued; 4]);
    std::thread::sleep(Duration::from_millis(100));
    plan.clear();
    assert!(tier.clear());
    // The first ones end while these are under way.
    plan.always(Call::Write, Effect::Delay(Duration::from_millis(800)));
    assert_eq!(world.put(&tier, 0..4), [Put::Queued; 4]);
    assert!(tier.flush(PATIENCE));
    assert_eq!(world.get(&tier, &[0, 1, 2, 3], PATIENCE), [true; 4]);
    drop(tier);
    let tier = folder.open(&world, 32);
    assert!(tier.flush(PATIENCE));
    assert_eq!(world.get(&tier, &[0, 1, 2, 3], PATIENCE), [true; 4]);
}

#[test]
fn a_superblock_that_cannot_be_read_now_costs_nothing_that_is_kept() {
    let (folder, world) = (Folder::new("super"), World::new(64, BLOCK));
    let tier = folder.open(&world, 32);
    world.keep(&tier, 0..8);
    drop(tier);
    let plan = Arc::new(FaultPlan::default());
    // The first read is of the probe for direct I/O.
    plan.set(&[Fault { call: Call::Read, first: 1, count: u64::MAX, effect: Effect::Errno(EIO) }]);
    assert!(DiskTier::open(folder.faulty(32, &plan), &world.arena, IDENTITY).is_err());
    let tier = folder.open(&world, 32);
    assert!(tier.flush(PATIENCE));
    assert_eq!(world.get(&tier, &[0, 7], PATIENCE), [true, true]);
}

#[test]
fn a_header_that_cannot_be_read_costs_no_other() {
    let (folder, world) = (Folder::new("header"), World::new(64, BLOCK));
    let tier = folder.open(&world, 600);
    full(&tier);
    world.keep(&tier, 0..30);
    drop(tier);
    let plan = Arc::new(FaultPlan::default());
    // After the probe and two superblocks: the first headers.
    plan.set(&[Fault { call: Call::Read, first: 3, count: 1, effect: Effect::Errno(EIO) }]);
    let tier = DiskTier::open(folder.faulty(600, &plan), &world.arena, IDENTITY).unwrap();
    assert!(tier.flush(PATIENCE));
    assert_eq!(tier.stats().recovered, 30);
}

/// What a child does until it is killed: it puts, reads and lets be evicted, and says what is kept.
#[test]
fn child_that_is_killed() {
    let Ok(path) = std::env::var("KVORTEX_CHILD_FOLDER") else { return };
    let folder = Folder::at(PathBuf::from(path));
    // What an earlier child said may be evicted by this one.
    let _ = std::fs::remove_file(folder.path.join("kept"));
    let world = World::new(64, BLOCK);
    let plan = Arc::new(FaultPlan::default());
    // Enough to come to every call that is killed; who waits for a kill from outside goes on.
    let mut rounds = usize::MAX;
    if let Ok(kill) = std::env::var("KVORTEX_CHILD_KILL") {
        let words: Vec<&str> = kill.split(' ').collect();
        let call = Call::ALL[words[0].parse::<usize>().unwrap()];
        let effect = if words[2] == "before" { Effect::KillBefore } else { Effect::KillAfter };
        plan.set(&[Fault { call, first: words[1].parse().unwrap(), count: 1, effect }]);
        rounds = 40;
    }
    let mut config = folder.faulty(24, &plan);
    config.io.ring = std::env::var_os("KVORTEX_CHILD_RING").is_some();
    let tier = DiskTier::open(config, &world.arena, IDENTITY).unwrap();
    for round in 0..rounds {
        let ids: Vec<usize> = (0..4).map(|i| (round * 4 + i) % 60).collect();
        world.keep(&tier, ids.iter().copied());
        world.get(&tier, &ids, PATIENCE);
        std::fs::write(folder.path.join("kept"), format!("{} {} {} {}", ids[0], ids[1], ids[2], ids[3])).unwrap();
    }
}

fn child(folder: &Folder, kill: Option<String>, ring: bool) -> std::process::Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child_that_is_killed", "--exact", "--nocapture"]).env("KVORTEX_CHILD_FOLDER", &folder.path);
    if let Some(kill) = kill {
        command.env("KVORTEX_CHILD_KILL", kill);
    }
    if ring {
        command.env("KVORTEX_CHILD_RING", "1");
    }
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Everything that a child left is right, what it said to be kept is there, and no byte is taken beyond the cap.
fn judge(folder: &Folder) {
    let world = World::new(64, BLOCK);
    let tier = folder.open(&world, 24);
    let start = Instant::now();
    let flushed = tier.flush(PATIENCE);
    assert!(flushed && start.elapsed() < Duration::from_secs(10), "{:?}: {:?}", start.elapsed(), tier.stats());
    let said = std::fs::read_to_string(folder.path.join("kept")).unwrap_or_default();
    let kept: Vec<usize> = said.split_whitespace().map(|id| id.parse().unwrap()).collect();
    let found = world.get(&tier, &kept, PATIENCE);
    assert!(found.iter().all(|&found| found), "what was kept is lost: {said} {found:?} {:?}", tier.stats());
    let all: Vec<usize> = (0..60).collect();
    world.get(&tier, &all, PATIENCE);
    assert!(folder.taken() <= tier.stats().max_bytes);
    assert!(tier.stop(PATIENCE));
}

#[test]
fn a_kill_at_any_moment_loses_nothing_that_was_kept() {
    let kills: usize = std::env::var("KVORTEX_KILLS").map_or(30, |count| count.parse().unwrap());
    let folder = Folder::quick("kills");
    for kill in 0..kills {
        let mut child = child(&folder, None, kill % 2 == 1);
        std::thread::sleep(Duration::from_millis(30 + (kill as u64 * 37) % 90));
        child.kill().unwrap();
        child.wait().unwrap();
        judge(&folder);
    }
}

/// A child that is killed before or after its `nth` call of a kind, and what it left. False if it never came to that call.
fn killed_at(folder: &Folder, call: usize, nth: u64, when: &str) -> bool {
    let mut child = child(folder, Some(format!("{call} {nth} {when}")), false);
    let killed = !child.wait().unwrap().success();
    judge(folder);
    killed
}

#[test]
fn a_kill_at_any_call_loses_nothing_that_was_kept() {
    let (again, mut kills) = (Folder::quick("writes"), 0);
    let write = Call::ALL.iter().position(|&call| call == Call::Write).unwrap();
    for nth in 0..30 {
        for when in ["before", "after"] {
            assert!(killed_at(&again, write, nth, when));
        }
    }
    for (call, kind) in Call::ALL.iter().enumerate().filter(|(_, kind)| !matches!(kind, Call::Read | Call::Write)) {
        let made = (0..20).take_while(|&nth| killed_at(&Folder::quick("calls"), call, nth, "before")).count();
        assert!(made > 0 || *kind == Call::Truncate, "{kind:?} is never made");
        let after = (0..made as u64).filter(|&nth| killed_at(&Folder::quick("calls"), call, nth, "after")).count();
        assert_eq!(after, made, "{kind:?}");
        kills += 2 * made;
    }
    println!("killed at {} calls", kills + 60);
}
