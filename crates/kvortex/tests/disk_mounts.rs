//! Real file systems that are full or have become read-only. Each test mounts its own in a mount namespace of a child process;
//! where that is not allowed it says so and ends.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on should panic, and says why it is left out"
)]

mod folder;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use folder::*;
use kvortex::tier::disk::{DiskConfig, DiskTier};
use kvortex::tier::suite::{PATIENCE, World, has};
use kvortex::tier::{Put, Tier};

const MOUNTED: &str = "KVORTEX_TEST_MOUNTED";

/// Runs the test `child` with a file system of its own, which `mount` puts at `$1`, if that is allowed here.
fn mounted(child: &str, unshare: &str, mount: &str) {
    let place = Folder::new(child);
    std::fs::create_dir_all(&place.path).unwrap();
    let own = std::env::current_exe().unwrap();
    let run = |script: &str, words: &[&str]| {
        let mut command = Command::new("unshare");
        command.args([unshare, "sh", "-ec", script, "sh"]).arg(&place.path).arg(&own).args(words);
        command.env(MOUNTED, &place.path).status()
    };
    if !run(mount, &[]).is_ok_and(|status| status.success()) {
        println!("left out: this process may not mount ({mount})");
        return;
    }
    let script = format!("{mount}; shift; exec \"$@\"");
    assert!(run(&script, &[child, "--exact", "--nocapture"]).unwrap().success());
}

/// The place of the file system, in the child.
fn place() -> Option<PathBuf> {
    std::env::var_os(MOUNTED).map(PathBuf::from)
}

fn free_bytes(at: &Path) -> u64 {
    let output = Command::new("df").args(["--output=avail", "-B1"]).arg(at).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().nth(1).unwrap().trim().parse().unwrap()
}

/// A file that leaves `free` bytes.
fn fill(at: &Path, free: u64) -> PathBuf {
    let ballast = at.join("ballast");
    let bytes = free_bytes(at).saturating_sub(free) as usize;
    std::fs::write(&ballast, vec![1u8; bytes]).unwrap();
    ballast
}

fn config(at: &Path, ring: bool) -> DiskConfig {
    let mut config = Folder::at(at.join("kv")).config(400);
    config.io.ring = ring;
    config
}

/// Tells how long it took until `done`, at most five seconds.
fn soon(tier: &dyn Tier, done: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", tier.stats());
        std::thread::sleep(Duration::from_millis(20));
    }
    start.elapsed()
}

#[test]
fn a_full_file_system_serves_and_resumes_when_there_is_room() {
    mounted("child_on_a_full_file_system", "-rm", "mount -t tmpfs -o size=12m none \"$1\"");
}

#[test]
fn child_on_a_full_file_system() {
    let Some(at) = place() else { return };
    let empty = free_bytes(&at);
    for ring in [false, true] {
        let world = World::new(128, BLOCK);
        // The system takes its time to give back what a file had that has lost its name.
        while free_bytes(&at) < empty {
            std::thread::sleep(Duration::from_millis(20));
        }
        let ballast = fill(&at, 1 << 20);
        let tier = DiskTier::open(config(&at, ring), &world.arena, IDENTITY).unwrap();
        (0..20).for_each(|batch| world.keep(&tier, batch * 20..batch * 20 + 20));
        let full = tier.stats();
        assert!(full.evictions > 0 && full.capacity_blocks < 120 && full.errors == 0, "{full:?}");
        assert_eq!(has(&tier, 390..400), [true; 10]);
        std::fs::remove_file(ballast).unwrap();
        let waited = soon(&tier, || tier.stats().capacity_blocks > 300);
        (0..15).for_each(|batch| world.keep(&tier, 1000 + batch * 20..1000 + batch * 20 + 20));
        assert_eq!(has(&tier, 1000..1300), [true; 300]);
        println!("ring {ring}: {} blocks while full, grown again after {waited:?}", full.capacity_blocks);
        drop(tier);
        std::fs::remove_dir_all(at.join("kv")).unwrap();
    }
}

#[test]
fn a_cap_beyond_the_file_system_leaves_others_their_share() {
    mounted("child_with_a_cap_beyond_the_file_system", "-rm", "mount -t tmpfs -o size=12m none \"$1\"");
}

#[test]
fn child_with_a_cap_beyond_the_file_system() {
    let Some(at) = place() else { return };
    let world = World::new(128, BLOCK);
    // What makes its segments short keeps them short.
    drop(DiskTier::open(config(&at, true), &world.arena, IDENTITY).unwrap());
    let mut config = config(&at, true);
    config.max_bytes = 1 << 40;
    let tier = DiskTier::open(config, &world.arena, IDENTITY).unwrap();
    let kept = full_of(&tier);
    assert!(kept > 700, "{kept}");
    let left = free_bytes(&at);
    assert!(left >= (12 << 20) / 20, "{left} bytes are left for others");
    std::fs::write(at.join("other"), vec![1; 500 << 10]).unwrap();
    world.keep(&tier, 0..20);
}

/// How many blocks fit when it has stopped growing.
fn full_of(tier: &dyn Tier) -> usize {
    std::thread::sleep(Duration::from_millis(300));
    tier.stats().capacity_blocks
}

#[test]
fn a_file_system_that_is_full_at_the_start_costs_neither_what_is_kept_nor_the_ring() {
    mounted("child_that_starts_on_a_full_file_system", "-rm", "mount -t tmpfs -o size=12m none \"$1\"");
}

#[test]
fn child_that_starts_on_a_full_file_system() {
    let Some(at) = place() else { return };
    let world = World::new(128, BLOCK);
    let tier = DiskTier::open(config(&at, true), &world.arena, IDENTITY).unwrap();
    world.keep(&tier, 0..40);
    let engines = tier.engines();
    drop(tier);
    let ballast = fill(&at, 0);
    assert_eq!(free_bytes(&at), 0);
    let tier = DiskTier::open(config(&at, true), &world.arena, IDENTITY).unwrap();
    assert!(tier.flush(PATIENCE));
    assert_eq!(tier.engines(), engines);
    let all: Vec<usize> = (0..40).collect();
    assert_eq!(world.get(&tier, &all, PATIENCE), [true; 40]);
    world.keep(&tier, 100..120);
    assert_eq!(has(&tier, 100..120), [true; 20]);
    std::fs::remove_file(ballast).unwrap();
    soon(&tier, || tier.stats().capacity_blocks > 300);
}

#[test]
fn a_file_system_that_becomes_read_only_goes_on_serving() {
    let image = Folder::new("image");
    std::fs::create_dir_all(&image.path).unwrap();
    let file = image.path.join("ext4");
    let made = std::fs::File::create(&file)
        .and_then(|made| made.set_len(64 << 20))
        .and_then(|()| Command::new("mkfs.ext4").arg("-q").arg(&file).status());
    if !made.is_ok_and(|status| status.success()) {
        println!("left out: there is no mkfs.ext4");
        return;
    }
    // The system makes it read-only in this way when it finds it damaged; who has files open cannot.
    mounted("child_on_a_read_only_file_system", "-m", &format!("mount -o loop {} \"$1\"", file.display()));
}

#[test]
fn child_on_a_read_only_file_system() {
    let Some(at) = place() else { return };
    let world = World::new(128, BLOCK);
    let tier = DiskTier::open(config(&at, true), &world.arena, IDENTITY).unwrap();
    world.keep(&tier, 0..40);
    full(&tier);
    assert!(Command::new("mount").args(["-o", "remount,abort"]).arg(&at).status().unwrap().success());
    assert!(std::fs::write(at.join("other"), "x").is_err(), "it is read-only");
    let all: Vec<usize> = (0..40).collect();
    for round in 0..5 {
        let start = Instant::now();
        let _ = world.put(&tier, 100 + round * 10..110 + round * 10);
        assert!(tier.flush(PATIENCE) && start.elapsed() < Duration::from_secs(1));
        assert_eq!(world.get(&tier, &all, PATIENCE), [true; 40]);
        std::thread::sleep(Duration::from_millis(300));
    }
    let stats = tier.stats();
    assert!(stats.failing && stats.errors > 0 && stats.corrupt == 0, "{stats:?}");
    assert_eq!(world.put(&tier, [1, 500])[0], Put::Present);
    assert!(tier.stop(PATIENCE));
}
