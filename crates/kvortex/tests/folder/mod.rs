//! Folders for disk tiers that are gone after the test.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses some of it")]

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvortex::tier::disk::{DiskConfig, DiskTier};
use kvortex::tier::suite::World;
use kvortex::tier::{Identity, Tier};
use kvortex::{Error, Namespace};
use kvortex_mem::MemError;
use kvortex_mem::file::{FaultPlan, SlabOptions};

pub const BLOCK: usize = 5000;
pub const IDENTITY: Identity = Identity { namespace: Namespace::from_digest([1; 32]), row: 0, world: 1 };

pub struct Folder {
    pub path: PathBuf,
    kept: bool,
}

impl Folder {
    pub fn new(name: &str) -> Self {
        Self::below(&std::env::temp_dir(), name)
    }

    /// In memory where the system has a place for that: for tests that open files by the thousand, and flush each time.
    pub fn quick(name: &str) -> Self {
        let memory = PathBuf::from("/dev/shm");
        if memory.is_dir() { Self::below(&memory, name) } else { Self::new(name) }
    }

    fn below(base: &std::path::Path, name: &str) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("kvortex-disk-{name}-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Self { path, kept: false }
    }

    /// One that somebody else made and removes.
    pub fn at(path: PathBuf) -> Self {
        Self { path, kept: true }
    }

    pub fn slab(&self) -> SlabOptions {
        SlabOptions::new(&self.path)
    }

    /// Room for about `blocks` blocks.
    pub fn config(&self, blocks: usize) -> DiskConfig {
        let mut config = DiskConfig::new([&self.path], (blocks * (8192 + 4096) + (48 << 10)) as u64);
        config.io.depth = 8;
        config
    }

    /// The system may still be closing the ring of a process that was killed, and with it the file.
    pub fn open(&self, world: &World, blocks: usize) -> DiskTier {
        let is_locked = |error: &Error| match error {
            Error::Mem(error) => {
                matches!(&**error, MemError::Disk { cause, .. } if cause.kind() == ErrorKind::WouldBlock)
            }
            _ => false,
        };
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            match DiskTier::open(self.config(blocks), &world.arena, IDENTITY) {
                Err(error) if is_locked(&error) && Instant::now() < end => thread::sleep(Duration::from_millis(10)),
                opened => return opened.unwrap(),
            }
        }
    }

    /// By threads, with calls that fail as the plan says.
    pub fn faulty(&self, blocks: usize, plan: &Arc<FaultPlan>) -> DiskConfig {
        let mut config = self.config(blocks);
        config.folders = vec![self.slab().with_faults(plan)];
        config.io.ring = false;
        config
    }

    pub fn blocks_file(&self) -> PathBuf {
        self.path.join("v1/blocks")
    }

    /// Bytes that everything in the folder takes on the device.
    pub fn taken(&self) -> u64 {
        let files = [self.path.clone(), self.path.join("v1"), self.blocks_file()];
        files.iter().map(|path| std::fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)).sum()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.kept {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// A tier and a world that keeps its folders.
pub fn fresh(config: DiskConfig, folders: Vec<Folder>) -> (World, Box<dyn Tier>) {
    let mut world = World::new(128, BLOCK);
    let tier = DiskTier::open(config, &world.arena, IDENTITY).unwrap();
    world.guard = Some(Box::new(folders));
    full(&tier);
    (world, Box::new(tier))
}

/// Waits until the files have grown to their cap, and tells how many blocks fit.
pub fn full(tier: &dyn Tier) -> usize {
    let end = Instant::now() + Duration::from_secs(20);
    let mut last = 0;
    loop {
        let now = tier.stats().capacity_blocks;
        if (now > 0 && now == last) || Instant::now() > end {
            return now;
        }
        last = now;
        std::thread::sleep(Duration::from_millis(30));
    }
}
