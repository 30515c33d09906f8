//! The disk tier beside fio, of the same run, on the same folder, with the same block size and depth.
//!
//! `cargo bench -p kvortex-bench --bench disk`; `KVORTEX_BENCH_FOLDER` names the folder, the system's temporary one by default,
//! and `KVORTEX_BENCH_ROUNDS` how often each is measured, 8 times by default. The two take turns at going first, since a
//! virtual disk may give more to whoever comes after a pause. fio (Debian: apt install fio) is left out where it is not installed.
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

/// Seconds of the processor that this process has used in its own code and in the system's.
fn cpu_seconds() -> (f64, f64) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<f64>().unwrap() / 100.0;
    (ticks(11), ticks(12))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let upper = values.len() / 2;
    (values[upper] + values[(values.len() - 1) / 2]) / 2.0
}

/// Bytes a second, ours and fio's, in an order that changes from round to round.
fn turns(round: usize, ours: impl FnOnce() -> f64, fio: impl FnOnce() -> Option<f64>) -> (f64, Option<f64>) {
    if round.is_multiple_of(2) {
        let ours = ours();
        return (ours, fio());
    }
    let fio = fio();
    (ours(), fio)
}

fn tell(what: &str, block: usize, rounds: &[(f64, Option<f64>)]) {
    let ours = median(rounds.iter().map(|round| round.0).collect());
    let of =
        |get: fn(f64, f64) -> f64| rounds.iter().filter_map(|&(ours, fio)| Some(get(ours, fio?))).collect::<Vec<_>>();
    let (rivals, shares) = (of(|_, fio| fio), of(|ours, fio| ours / fio));
    let beside = if rivals.is_empty() {
        "fio is not installed".to_owned()
    } else {
        let all: Vec<String> = shares.iter().map(|share| format!("{share:.2}")).collect();
        format!("fio {:.2} GB/s, share {:.2} ({})", median(rivals) / 1e9, median(shares), all.join(" "))
    };
    println!("{:>5} KiB {what:>7}: {:.2} GB/s; {beside}", block >> 10, ours / 1e9);
}

fn beside_fio(folder: &Path, block: usize, blocks: usize, rounds: usize) {
    let world = World::new(4 * DEPTH, block);
    let bytes = (block * blocks) as f64;
    let (mut written, mut reads) = (Vec::new(), Vec::new());
    let start = cpu_seconds();
    for round in 0..rounds {
        let place = folder.join(format!("tier-{block}-{round}"));
        let tier = open(&place, &world, blocks, block);
        if round == 0 {
            println!("{:>5} KiB by {}", block >> 10, tier.engines().join(", "));
        }
        let write_all = || bytes / write(&world, &tier, blocks);
        written.push(turns(round, write_all, || fio(folder, "write", block, block * blocks)));
        let read_all = || bytes / read(&world, &tier, blocks);
        reads.push(turns(round, read_all, || fio(folder, "randread", block, block * blocks)));
        drop(tier);
        std::fs::remove_dir_all(&place).unwrap();
        let _ = std::fs::remove_file(folder.join("fio"));
    }
    tell("written", block, &written);
    tell("read", block, &reads);
    let (end, moved) = (cpu_seconds(), (2 * rounds * blocks) as f64);
    let each = |from: f64, to: f64| (to - from) * 1e6 / moved;
    println!(
        "{:>5} KiB processor: {:.0} us a block own code, {:.0} us the system's",
        block >> 10,
        each(start.0, end.0),
        each(start.1, end.1)
    );
}

/// What the tier does for a block that is put into it when it is full, beside the bytes: with a file of small blocks.
fn bookkeeping(folder: &Path) {
    const BLOCKS: usize = 100_000;
    let world = World::new(4 * DEPTH, 4096);
    let place = folder.join("many");
    let tier = open(&place, &world, BLOCKS, 4096);
    let each = |what: &str, work: &dyn Fn() -> f64| {
        let (before, seconds, after) = (cpu_seconds(), work(), cpu_seconds());
        let per_block = |seconds: f64| seconds * 1e6 / BLOCKS as f64;
        println!(
            "{BLOCKS} blocks of 4 KiB {what}: {:.1} us a block in all, {:.1} us of own code, {:.1} us of the system's",
            per_block(seconds),
            per_block(after.0 - before.0),
            per_block(after.1 - before.1)
        );
    };
    each("kept", &|| write(&world, &tier, BLOCKS));
    each("read", &|| read(&world, &tier, BLOCKS));
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
    let rounds = std::env::var("KVORTEX_BENCH_ROUNDS").map_or(8, |rounds| rounds.parse().unwrap());
    beside_fio(&folder, 2 << 20, 512, rounds);
    beside_fio(&folder, 64 << 10, 8192, rounds);
    bookkeeping(&folder);
    std::fs::remove_dir_all(&folder).unwrap();
}
