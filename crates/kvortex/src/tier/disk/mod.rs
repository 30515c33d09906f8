//! The disk tier: blocks in a preallocated file in each of one or several folders. docs/disk.md has the format and what it
//! guarantees; [`crate::tier`] the contract.

mod admission;
mod geometry;
mod header;
mod index;
mod inspect;
mod open;
mod volume;
mod worlds;
mod writer;

use std::time::{Duration, Instant};

use kvortex_mem::arena::Arena;
use kvortex_mem::file::{IoOptions, SlabFile, SlabOptions};

pub use admission::Admission;
use admission::Gate;
use geometry::Geometry;
pub use inspect::{Contents, Kept, inspect, trim};
use volume::{Volume, VolumeOptions, add};

use crate::error::{Error, Result};
use crate::key::{BlockKey, Keys};
use crate::mask::BlockMask;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering};
use crate::tier::{Identity, Offer, Put, Tier, TierStats, Want};

/// What a disk tier is made with.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// One folder for each device.
    pub folders: Vec<SlabOptions>,
    /// Bytes that all of them may take together; each takes an equal part.
    pub max_bytes: u64,
    /// Bytes that may wait to be written.
    pub queue_bytes: usize,
    /// What is worth a write.
    pub admission: Admission,
    /// How to read and write.
    pub io: IoOptions,
}

impl DiskConfig {
    /// The usual ones.
    #[must_use]
    pub fn new<P: Into<std::path::PathBuf>>(folders: impl IntoIterator<Item = P>, max_bytes: u64) -> Self {
        Self {
            folders: folders.into_iter().map(SlabOptions::new).collect(),
            max_bytes,
            queue_bytes: 256 << 20,
            admission: Admission::All,
            io: IoOptions { depth: 32, ring: true },
        }
    }
}

/// Keeps blocks in files. Its bytes come from and go to slots of one arena.
pub struct DiskTier {
    volumes: Vec<Arc<Volume>>,
    gate: Mutex<Gate>,
    refused: AtomicU64,
    dropped: AtomicU64,
    misses: AtomicU64,
}

impl DiskTier {
    /// Opens the folders. What they kept before is found in the background.
    ///
    /// # Errors
    /// [`Error::Mem`] for a folder that cannot be used, with the reason; [`Error::Config`] where not one block
    /// fits.
    pub fn open(config: DiskConfig, arena: &Arc<Arena>, identity: Identity) -> Result<Self> {
        let count = config.folders.len().max(1);
        has_room(&config, arena, identity.world)?;
        let volume = |(file, slab): (SlabFile, SlabOptions)| {
            let options = VolumeOptions {
                slab,
                max_bytes: config.max_bytes / count as u64,
                // Or nothing would ever be written.
                queue_bytes: (config.queue_bytes / count).max(arena.stride()),
                io: config.io,
            };
            Volume::open(file, options, arena, identity)
        };
        // Those that were opened before a failure are closed with this.
        let mut this = Self {
            volumes: Vec::new(),
            gate: Mutex::new(Gate::new(config.admission, 1)),
            refused: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        };
        // All of them first: while one is missing the others are neither changed nor read.
        let files = config.folders.iter().map(SlabFile::open).collect::<Result<Vec<_>, _>>()?;
        for folder in files.into_iter().zip(config.folders) {
            this.volumes.push(volume(folder)?);
        }
        let most: usize = this.volumes.iter().map(|volume| volume.most_blocks()).sum();
        *this.gate.get_mut() = Gate::new(config.admission, 2 * most);
        Ok(this)
    }

    /// How each folder is read and written, found out when it was opened: `io_uring` or `psync`.
    #[must_use]
    pub fn engines(&self) -> Vec<&'static str> {
        self.volumes.iter().map(|volume| volume.opened().io.name()).collect()
    }

    /// The volume to write next: the one with the most room in its queue.
    fn roomiest(&self, rooms: &mut [usize], bytes: usize) -> Option<usize> {
        let (at, room) = rooms.iter_mut().enumerate().max_by_key(|(_, room)| **room)?;
        *room = room.checked_sub(bytes)?;
        Some(at)
    }

    /// Whether and where to write a block: the room for it is taken then.
    fn place(&self, key: &BlockKey, rooms: &mut [usize], bytes: usize) -> (Put, Option<usize>) {
        if self.volumes.iter().any(|volume| volume.knows(key)) {
            return (Put::Present, None);
        }
        // Without room it is not asked: what it admits it takes for new the next time.
        let room = rooms.iter().any(|room| *room >= bytes);
        if room && !self.gate.lock().admits(key) {
            add(&self.refused, 1);
            return (Put::Refused, None);
        }
        match self.roomiest(rooms, bytes) {
            Some(at) if self.volumes[at].admit(key) => (Put::Queued, Some(at)),
            _ => {
                add(&self.dropped, 1);
                (Put::Dropped, None)
            }
        }
    }
}

/// Whether a block fits into each folder. The cap is told as it was given, for all `world` ranks.
fn has_room(config: &DiskConfig, arena: &Arena, world: u32) -> Result<()> {
    let count = config.folders.len().max(1) as u64;
    let each = open::usable(config.max_bytes / count);
    if Geometry::new(arena.slot_bytes(), arena.stride(), each).segments_in(each) > 0 {
        return Ok(());
    }
    let (bytes, folders) = (arena.slot_bytes(), count * u64::from(world));
    let value = (config.max_bytes * u64::from(world)).to_string();
    let remedy = format!("a block of {bytes} bytes does not fit into each of {folders} folders: give many times that");
    Err(Error::Config { knob: "disk_size_bytes", value, remedy })
}

impl Tier for DiskTier {
    fn name(&self) -> &'static str {
        "disk"
    }

    fn contains(&self, keys: Keys<'_>, _deadline: Instant) -> BlockMask {
        let mut mask = BlockMask::new(keys.len());
        self.volumes.iter().for_each(|volume| volume.contains(keys.iter(), |i| mask.set(i)));
        mask
    }

    fn put(&self, offers: Vec<Offer>) -> Vec<Put> {
        let mut rooms: Vec<usize> = self.volumes.iter().map(|volume| volume.room()).collect();
        // Or room for the tail of a prompt could be made by forgetting its head.
        self.volumes.iter().for_each(|volume| volume.touch(offers.iter().rev().map(|offer| &offer.key)));
        let bytes = self.volumes.first().map_or(0, |volume| volume.stride());
        let eras: Vec<u64> = self.volumes.iter().map(|volume| volume.era()).collect();
        let mut batches: Vec<Vec<Offer>> = self.volumes.iter().map(|_| Vec::new()).collect();
        let place = |offer: Offer| {
            let (put, at) = self.place(&offer.key, &mut rooms, bytes);
            if let Some(at) = at {
                batches[at].push(offer);
            }
            put
        };
        let keys: Vec<BlockKey> = offers.iter().map(|offer| offer.key).collect();
        let puts: Vec<Put> = offers.into_iter().map(place).collect();
        let present = keys.into_iter().zip(&puts).filter(|(_, put)| **put == Put::Present);
        let present: Vec<BlockKey> = present.map(|(key, _)| key).collect();
        for ((volume, era), batch) in self.volumes.iter().zip(eras).zip(batches) {
            volume.enqueue(era, batch, &present);
        }
        puts
    }

    fn get(&self, wants: Vec<Want>, deadline: Instant) {
        let rest = self.volumes.iter().fold(wants, |wants, volume| volume.get(wants, deadline));
        add(&self.misses, rest.len() as u64);
    }

    fn remove(&self, keys: Keys<'_>, _deadline: Instant) -> usize {
        let one = |key: &BlockKey| self.volumes.iter().filter(|volume| volume.remove(key)).count();
        keys.iter().map(|key| one(&key).min(1)).sum()
    }

    fn clear(&self) -> bool {
        self.volumes.iter().filter(|volume| !volume.clear()).count() == 0
    }

    fn flush(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        self.volumes.iter().all(|volume| volume.flush(end.saturating_duration_since(Instant::now())))
    }

    fn stop(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let stop = |volume: &Arc<Volume>| volume.stop(end.saturating_duration_since(Instant::now()));
        self.volumes.iter().filter(|volume| !stop(volume)).count() == 0
    }

    fn stats(&self) -> TierStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (refused, dropped, misses) = (read(&self.refused), read(&self.dropped), read(&self.misses));
        let mut stats = TierStats { refused, dropped, misses, ..TierStats::default() };
        self.volumes.iter().for_each(|volume| volume.count(&mut stats));
        stats
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        self.stop(Duration::from_secs(5));
    }
}
