//! The disk tier beside fio, of the same run, on the same folder, with the same block size and depth.
//!
//! `cargo bench -p kvortex-bench --bench disk`; `KVORTEX_BENCH_FOLDER` names the folder, the system's temporary one by default.
//! fio (Debian: apt install fio) is left out where it is not installed.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that fails should panic, and one without criterion prints"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use kvortex::Namespace;
use kvortex::tier::disk::{DiskConfig, DiskTier};
use kvortex::tier::host::{SlotClaim, SlotId};
use kvortex::tier::suite::{World, key};
use kvortex::tier::{Identity, Landing, Offer, Put, Tier, Want};

const PATIENCE: Duration = Duration::from_secs(600);
const DEPTH: usize = 32;
const IDENTITY: Identity = Identity { namespace: Namespace::from_digest([1; 32]), row: 0, world: 1 };

/// A slot that says when it is filled.
struct Place(Option<SlotClaim>, Sender<(SlotClaim, bool)>);

impl Landing for Place {
    fn slot(&self) -> SlotId {
        self.0.as_ref().unwrap().id()
    }

    fn land(mut self: Box<Self>) {
        self.1.send((self.0.take().unwrap(), true)).unwrap();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(claim) = self.0.take() {
            let _ = self.1.send((claim, false));
        }
    }
}

fn open(folder: &Path, world: &World, blocks: usize, block: usize) -> DiskTier {
    let mut config = DiskConfig::new([folder], ((block + 4096) * blocks) as u64 * 21 / 20 + (1 << 20));
    config.io.depth = DEPTH;
    let tier = DiskTier::open(config, &world.arena, IDENTITY).unwrap();
    assert!(tier.flush(PATIENCE));
    while tier.stats().capacity_blocks < blocks {
        std::thread::sleep(Duration::from_millis(5));
    }
    tier
}

/// Seconds to keep `blocks` blocks, whose bytes lie in a few slots.
fn write(world: &World, tier: &DiskTier, blocks: usize) -> f64 {
    let filled: Vec<_> = (0..2 * DEPTH).map(|i| std::sync::Arc::new(world.filled(&key(i)))).collect();
    let start = Instant::now();
    for i in 0..blocks {
        loop {
            let claim = &filled[i % filled.len()];
            let offer = Offer { key: key(i), slot: claim.id(), keep: claim.clone() };
            match tier.put(vec![offer])[0] {
                Put::Dropped => std::thread::sleep(Duration::from_micros(100)),
                _ => break,
            }
        }
    }
    assert!(tier.flush(PATIENCE));
    start.elapsed().as_secs_f64()
}

/// Seconds to bring `blocks` blocks up in random order, [`DEPTH`] at a time.
fn read(world: &World, tier: &DiskTier, blocks: usize) -> f64 {
    let (sender, receiver) = channel();
    let order = |i: usize| (i * 7919) % blocks;
    let want = |i, claim| Want { key: key(order(i)), landing: Box::new(Place(Some(claim), sender.clone())) };
    let claims = world.arena.slots().claim_many(DEPTH);
    let start = Instant::now();
    let end = start + PATIENCE;
    let first = claims.into_iter().enumerate().map(|(i, claim)| want(i, claim)).collect();
    tier.get(first, end);
    for next in DEPTH..blocks + DEPTH {
        let (claim, landed) = receiver.recv().unwrap();
        assert!(landed);
        if next < blocks {
            tier.get(vec![want(next, claim)], end);
        }
    }
    start.elapsed().as_secs_f64()
}

/// Bytes a second that fio reaches; `None` without fio.
fn fio(folder: &Path, how: &str, block: usize, bytes: usize) -> Option<f64> {
    std::fs::create_dir_all(folder).unwrap();
    let file = folder.join("fio");
    let output = Command::new("fio")
        .args(["--name=rival", "--ioengine=io_uring", "--direct=1", "--fallocate=native", "--minimal", "--end_fsync=1"])
        .args([format!("--rw={how}"), format!("--bs={block}"), format!("--size={bytes}"), format!("--iodepth={DEPTH}")])
        .arg(format!("--filename={}", file.display()))
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let fields: Vec<&str> = text.trim().split(';').collect();
    let field = if how.ends_with("write") { 47 } else { 6 };
    Some(fields.get(field)?.parse::<f64>().ok()? * 1024.0)
}

fn beside_fio(folder: &Path, block: usize, blocks: usize) {
    let world = World::new(4 * DEPTH, block);
    let bytes = (block * blocks) as f64;
    for round in 0..3 {
        let place = folder.join(format!("tier-{block}-{round}"));
        let tier = open(&place, &world, blocks, block);
        let (wrote, read) = (write(&world, &tier, blocks), read(&world, &tier, blocks));
        drop(tier);
        std::fs::remove_dir_all(&place).unwrap();
        let rivals = [fio(folder, "write", block, block * blocks), fio(folder, "randread", block, block * blocks)];
        let _ = std::fs::remove_file(folder.join("fio"));
        for (what, seconds, rival) in [("written", wrote, rivals[0]), ("read", read, rivals[1])] {
            let ours = bytes / seconds;
            let beside = rival.map_or_else(
                || "fio is not installed".to_owned(),
                |rival| format!("fio {:.2} GB/s, share {:.2}", rival / 1e9, ours / rival),
            );
            println!("{:>5} KiB {what:>7}: {:.2} GB/s; {beside}", block >> 10, ours / 1e9);
        }
    }
}

/// What the tier does for a block that is put into it when it is full, beside the bytes: with a file of small blocks.
fn bookkeeping(folder: &Path) {
    const BLOCKS: usize = 100_000;
    let world = World::new(4 * DEPTH, 4096);
    let place = folder.join("many");
    let tier = open(&place, &world, BLOCKS, 4096);
    println!(
        "{BLOCKS} blocks of 4 KiB kept: {:.1} us a block in all",
        write(&world, &tier, BLOCKS) * 1e6 / BLOCKS as f64
    );
    let claim = std::sync::Arc::new(world.filled(&key(0)));
    let (mut puts, mut queued) = (Duration::ZERO, 0);
    for i in 0..20_000 {
        let offer = Offer { key: key(BLOCKS * 2 + i), slot: claim.id(), keep: claim.clone() };
        let start = Instant::now();
        queued += usize::from(tier.put(vec![offer])[0] == Put::Queued);
        puts += start.elapsed();
    }
    assert!(tier.flush(PATIENCE));
    println!("put into a full tier: {:.2} us a block ({queued} queued)", puts.as_secs_f64() * 1e6 / 20_000.0);
    drop(tier);
    let start = Instant::now();
    let tier = open(&place, &world, BLOCKS, 4096);
    println!("{} blocks found again in {:.2} s", tier.stats().recovered, start.elapsed().as_secs_f64());
    drop(tier);
    std::fs::remove_dir_all(&place).unwrap();
}

fn main() {
    // `cargo test --benches` only wants to see it start.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let base = std::env::var_os("KVORTEX_BENCH_FOLDER").map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = base.join(format!("kvortex-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    beside_fio(&folder, 2 << 20, 512);
    beside_fio(&folder, 64 << 10, 8192);
    bookkeeping(&folder);
    std::fs::remove_dir_all(&folder).unwrap();
}
