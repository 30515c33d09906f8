//! One folder: its file, its index, and the thread that writes.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::time::{Duration, Instant, SystemTime};

use kvortex_mem::arena::Arena;
use kvortex_mem::file::{Access, FileIo, IoOptions, Memory, Op, Scratch, SlabFile, SlabOptions, digest_slot, serve};
use parking_lot::RwLock;

use super::geometry::Geometry;
use super::header::{Common, HEADER_BYTES};
use super::index::{DiskIndex, Entry};
use super::open;
use crate::error::Result;
use crate::key::BlockKey;
use crate::sync::{Arc, AtomicBool, AtomicU64, Condvar, Mutex, Ordering};
use crate::tier::guard::breaker::{Breaker, STUCK, Turn};
use crate::tier::{Identity, Landing, Offer, TierStats, Want};

/// Read faults in a row after which nothing is read for a while.
const READ_PATIENCE: u32 = 4;

/// A read that waited longer than this and did not begin was held up by others.
const SLOW: Duration = Duration::from_millis(50);

/// What a volume is made with.
pub(super) struct VolumeOptions {
    /// The folder.
    pub(super) slab: SlabOptions,
    /// Bytes it may take.
    pub(super) max_bytes: u64,
    /// Bytes that may wait to be written.
    pub(super) queue_bytes: usize,
    /// How to read and write.
    pub(super) io: IoOptions,
}

/// One folder of a disk tier.
pub(super) struct Volume {
    pub(super) options: VolumeOptions,
    pub(super) arena: Arc<Arena>,
    pub(super) identity: Identity,
    /// Replaced when the folder was taken away.
    opened: RwLock<Arc<Opened>>,
    pub(super) queue: Mutex<WriteQueue>,
    /// The queue has changed, or writes have ended.
    pub(super) changed: Condvar,
    pub(super) writes: Mutex<Breaker>,
    pub(super) reads: Mutex<Breaker>,
    reading: Mutex<Reading>,
    /// Of flushes and of making the folder anew; nothing waits for it.
    pub(super) upkeep: Mutex<Breaker>,
    pub(super) counts: Counts,
    /// Set when a clear could not be made to last: nothing is kept or found any more.
    off: AtomicBool,
}

/// The open file and what is known of it.
pub(super) struct Opened {
    pub(super) file: Arc<SlabFile>,
    pub(super) io: Box<dyn FileIo>,
    pub(super) geometry: Geometry,
    pub(super) common: Mutex<Common>,
    /// The first generation of this opening.
    pub(super) since: u64,
    pub(super) sequence: AtomicU64,
    pub(super) index: Mutex<DiskIndex>,
    pub(super) generation: AtomicU64,
    pub(super) scanning: AtomicBool,
    pub(super) recovered: AtomicU64,
    /// Whether something was written since the last flush of the device.
    pub(super) dirty: AtomicBool,
}

/// A read that is under way.
struct Read {
    key: BlockKey,
    entry: Entry,
    asked: Instant,
    from: Arc<Opened>,
}

/// Reads that have not ended.
#[derive(Default)]
struct Reading {
    count: usize,
    /// When the first of them was asked for or the last one came.
    since: Option<Instant>,
}

impl Reading {
    fn begin(&mut self, count: usize) {
        if self.count == 0 {
            self.since = Some(Instant::now());
        }
        self.count += count;
    }

    /// One has ended; `told` if the device said how.
    fn end(&mut self, told: bool) {
        self.count -= 1;
        if told {
            self.since = Some(Instant::now());
        }
    }

    /// Whether nothing comes of what was asked for.
    fn is_stuck(&self) -> bool {
        self.count > 0 && self.since.is_some_and(|since| since.elapsed() > STUCK)
    }
}

/// A block that waits to be written.
pub(super) struct Queued {
    pub(super) offer: Offer,
    /// Blocks that are to go after it.
    pub(super) then: Vec<BlockKey>,
}

#[derive(Default)]
pub(super) struct WriteQueue {
    pub(super) offers: VecDeque<Queued>,
    /// Of what waits or is being written, but for what is not wanted any more.
    pub(super) keys: HashSet<BlockKey>,
    /// Of offers that wait or are being written.
    pub(super) bytes: usize,
    pub(super) in_flight: usize,
    /// Counts clears.
    pub(super) era: u64,
    pub(super) closed: bool,
    /// The thread has ended.
    pub(super) over: bool,
}

/// Counters; sums over all volumes make the tier's.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) hits: AtomicU64,
    pub(super) misses: AtomicU64,
    pub(super) written: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) corrupt: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) late: AtomicU64,
}

pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Volume {
    /// Opens a folder and starts its thread, which looks for what it kept before.
    pub(super) fn open(
        file: SlabFile,
        options: VolumeOptions,
        arena: &Arc<Arena>,
        identity: Identity,
    ) -> Result<Arc<Self>> {
        let opened = open::open(file, &options, arena, identity)?;
        let this = Arc::new(Self {
            options,
            arena: Arc::clone(arena),
            identity,
            opened: RwLock::new(Arc::new(opened)),
            queue: Mutex::default(),
            changed: Condvar::new(),
            writes: Mutex::new(Breaker::new(1)),
            reads: Mutex::new(Breaker::new(READ_PATIENCE)),
            reading: Mutex::default(),
            upkeep: Mutex::new(Breaker::new(1)),
            counts: Counts::default(),
            off: AtomicBool::new(false),
        });
        super::writer::start(&this)?;
        Ok(this)
    }

    pub(super) fn opened(&self) -> Arc<Opened> {
        Arc::clone(&self.opened.read())
    }

    pub(super) fn replace(&self, opened: Opened) {
        *self.opened.write() = Arc::new(opened);
    }

    pub(super) fn is_off(&self) -> bool {
        self.off.load(Ordering::Relaxed)
    }

    pub(super) fn path(&self) -> String {
        self.options.slab.folder.display().to_string()
    }

    /// Whether it would be read. While it hangs nobody is to wait for it, nor to have a slot held for what has not begun.
    fn is_readable(&self) -> bool {
        if self.is_off() {
            return false;
        }
        if self.reading.lock().is_stuck() {
            self.opened().io.expire();
            let turn = self.reads.lock().trip();
            self.tell(turn, "read in time");
            return false;
        }
        self.reads.lock().is_open()
    }

    pub(super) fn contains(&self, keys: impl Iterator<Item = BlockKey>, mut found: impl FnMut(usize)) {
        if !self.is_readable() {
            return;
        }
        let opened = self.opened();
        let index = opened.index.lock();
        keys.enumerate().filter(|(_, key)| index.find(key).is_some()).for_each(|(i, _)| found(i));
    }

    /// Makes blocks that it has the last to go, the last of `keys` the very last.
    pub(super) fn touch<'a>(&self, keys: impl Iterator<Item = &'a BlockKey>) {
        let opened = self.opened();
        let mut index = opened.index.lock();
        keys.for_each(|key| index.touch(key));
    }

    /// Whether it has the block or is about to.
    pub(super) fn knows(&self, key: &BlockKey) -> bool {
        self.queue.lock().keys.contains(key) || self.opened().index.lock().knows(key)
    }

    /// Bytes that could still be queued; none while it fails.
    pub(super) fn room(&self) -> usize {
        if self.is_off() || !self.writes.lock().is_open() {
            return 0;
        }
        self.options.queue_bytes.saturating_sub(self.queue.lock().bytes)
    }

    /// Bytes that a block takes.
    pub(super) fn stride(&self) -> usize {
        self.arena.stride()
    }

    /// Blocks that it may keep at most.
    pub(super) fn most_blocks(&self) -> usize {
        let geometry = self.opened().geometry;
        geometry.segments_in(self.options.max_bytes) as usize * geometry.segment_slots as usize
    }

    /// How often it was cleared.
    pub(super) fn era(&self) -> u64 {
        self.queue.lock().era
    }

    /// Takes room in the queue for a block that [`enqueue`](Self::enqueue) brings.
    pub(super) fn admit(&self, key: &BlockKey) -> bool {
        let bytes = self.arena.stride();
        let mut queue = self.queue.lock();
        if queue.closed || queue.bytes + bytes > self.options.queue_bytes {
            return false;
        }
        queue.keys.insert(*key);
        queue.bytes += bytes;
        true
    }

    /// Queues the blocks of one batch, the tail first, so that it is written first and goes first; `present` are blocks of the
    /// batch that are kept already, and stay longer than the new ones. What was offered before a clear, which `era` tells, is
    /// dropped.
    pub(super) fn enqueue(&self, era: u64, batch: Vec<Offer>, present: &[BlockKey]) {
        if batch.is_empty() {
            return;
        }
        let mut queue = self.queue.lock();
        let dropped = if queue.closed || queue.era != era {
            queue.bytes -= batch.len() * self.arena.stride();
            // After a clear they are those of others.
            if queue.era == era {
                for offer in &batch {
                    queue.keys.remove(&offer.key);
                }
            }
            batch
        } else {
            queue.offers.extend(batch.into_iter().rev().map(|offer| Queued { offer, then: Vec::new() }));
            if let Some(head) = queue.offers.back_mut() {
                head.then = present.to_vec();
            }
            Vec::new()
        };
        drop(queue);
        self.changed.notify_all();
        add(&self.counts.dropped, dropped.len() as u64);
    }

    /// Takes what it has out of `wants`, and starts to read it.
    pub(super) fn get(self: &Arc<Self>, wants: Vec<Want>, deadline: Instant) -> Vec<Want> {
        if !self.is_readable() {
            return wants;
        }
        let opened = self.opened();
        opened.io.expire();
        let (mut ops, mut rest) = (Vec::new(), Vec::new());
        {
            let mut index = opened.index.lock();
            // The tail first, so that it is the first to go.
            wants.iter().rev().for_each(|want| index.touch(&want.key));
            for want in wants {
                match index.find(&want.key) {
                    Some(entry) => ops.push(self.read(&opened, want, entry, deadline)),
                    None => rest.push(want),
                }
            }
        }
        self.reading.lock().begin(ops.len());
        opened.io.submit(ops);
        rest
    }

    fn read(self: &Arc<Self>, opened: &Arc<Opened>, want: Want, entry: Entry, deadline: Instant) -> Op {
        let (this, from, asked) = (Arc::clone(self), Arc::clone(opened), Instant::now());
        let Want { key, landing } = want;
        Op {
            access: Access::Read,
            offset: opened.geometry.payload_at(entry.slot),
            memory: Memory::Slot(landing.slot()),
            deadline: Some(deadline),
            done: Box::new(move |ended| {
                let read = Read { key, entry, asked, from };
                this.arrived(&read, landing, ended.result);
            }),
        }
    }

    /// A read has ended. Only bytes with the digest that the entry had when it was written land.
    fn arrived(self: &Arc<Self>, read: &Read, landing: Box<dyn Landing>, result: io::Result<()>) {
        self.reading.lock().end(!matches!(&result, Err(error) if never_begun(error)));
        match result {
            Ok(()) => {
                self.told(&self.reads, true, "read");
                if digest_slot(&self.arena, landing.slot()) == Some(read.entry.digest) && !self.is_off() {
                    add(&self.counts.hits, 1);
                    add(&self.counts.bytes_read, self.arena.stride() as u64);
                    return landing.land();
                }
                self.not_itself(read);
            }
            Err(error) => self.unread(read, &error),
        }
        add(&self.counts.misses, 1);
    }

    /// The bytes are not the block's: it was overwritten while it was read, or it is damaged and is wiped.
    fn not_itself(self: &Arc<Self>, read: &Read) {
        let Read { key, entry, from, .. } = read;
        let Some(slot) = from.index.lock().forget(key, Some(entry.generation)) else { return };
        if self.counts.corrupt.fetch_add(1, Ordering::Relaxed) == 0 {
            log::warn!("{}: block {key:?} was damaged and is dropped; further ones are only counted", self.path());
        }
        self.wipe(from, slot);
    }

    fn unread(self: &Arc<Self>, read: &Read, error: &io::Error) {
        let Read { key, entry, from, asked } = read;
        match error.kind() {
            io::ErrorKind::TimedOut if never_begun(error) => {
                add(&self.counts.late, 1);
                // One that was not given the time says nothing of the disk.
                if asked.elapsed() > SLOW && self.reads.lock().is_stuck() {
                    self.told(&self.reads, false, "read in time");
                }
            }
            io::ErrorKind::Interrupted if never_begun(error) => {}
            _ => {
                add(&self.counts.errors, 1);
                self.told(&self.reads, false, &format!("read ({error})"));
                if let Some(slot) = from.index.lock().forget(key, Some(entry.generation)) {
                    self.wipe(from, slot);
                }
            }
        }
    }

    /// Overwrites the header of a forgotten block, and frees its place after that.
    pub(super) fn wipe(self: &Arc<Self>, opened: &Arc<Opened>, slot: u32) {
        let from = Arc::clone(opened);
        opened.io.submit(vec![Op {
            access: Access::Write,
            offset: opened.geometry.header_at(slot),
            memory: Memory::Scratch(Scratch::new(HEADER_BYTES)),
            deadline: None,
            done: Box::new(move |_| from.index.lock().release(slot)),
        }]);
    }

    /// Counts a success or fault, and says so if that is news.
    pub(super) fn told(&self, breaker: &Mutex<Breaker>, well: bool, what: &str) {
        let turn = if well { breaker.lock().success() } else { breaker.lock().fault() };
        self.tell(turn, what);
    }

    fn tell(&self, turn: Turn, what: &str) {
        match turn {
            Turn::Same => {}
            Turn::Failing => log::warn!("{} cannot be {what}: it goes on without, and tries again", self.path()),
            Turn::Recovered => log::info!("{} can be {what} again", self.path()),
        }
    }

    /// Forgets one block and wipes it, now or, if it is on its way, when it has come.
    pub(super) fn remove(self: &Arc<Self>, key: &BlockKey) -> bool {
        let opened = self.opened();
        let mut queue = self.queue.lock();
        let on_its_way = queue.keys.remove(key);
        let forgotten = opened.index.lock().forget(key, None);
        drop(queue);
        forgotten.inspect(|&slot| self.wipe(&opened, slot)).is_some() || on_its_way
    }

    /// Forgets all for good: entries of the file's old identity are never believed again.
    pub(super) fn clear(&self) -> bool {
        let opened = self.opened();
        let dropped: Vec<Queued> = {
            let mut queue = self.queue.lock();
            queue.keys.clear();
            queue.era += 1;
            let dropped: Vec<Queued> = queue.offers.drain(..).collect();
            queue.bytes -= dropped.len() * self.arena.stride();
            open::renew(&opened);
            dropped
        };
        drop(dropped);
        opened.index.lock().clear();
        let emptied = |_| -> io::Result<()> {
            opened.file.cut(0)?;
            // Without one, what is kept from now on would not be found again.
            let _ = open::write_super(&opened);
            Ok(())
        };
        let lasting = open::write_super(&opened).or_else(emptied);
        if let Err(error) = lasting {
            self.off.store(true, Ordering::Relaxed);
            log::warn!("{} could not be cleared and is not used any more: {error}; remove its v1 folder", self.path());
            return false;
        }
        true
    }

    /// Waits until nothing waits to be written.
    pub(super) fn flush(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut queue = self.queue.lock();
        while !(queue.bytes == 0 && queue.in_flight == 0) || self.opened().scanning.load(Ordering::Relaxed) {
            if self.changed.wait_until(&mut queue, end).timed_out() {
                return queue.bytes == 0 && queue.in_flight == 0;
            }
        }
        true
    }

    /// Ends the thread and the reads.
    pub(super) fn stop(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut queue = self.queue.lock();
        queue.closed = true;
        self.changed.notify_all();
        while !queue.over {
            if self.changed.wait_until(&mut queue, end).timed_out() {
                break;
            }
        }
        let over = queue.over;
        drop(queue);
        let opened = self.opened();
        let ended = opened.io.stop(end.saturating_duration_since(Instant::now())) && over;
        if ended {
            // Whoever comes next need not wait for the last reference to go.
            opened.file.unlock();
        }
        ended
    }

    /// Adds its numbers.
    pub(super) fn count(&self, stats: &mut TierStats) {
        let opened = self.opened();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        {
            let index = opened.index.lock();
            stats.blocks += index.held();
            stats.capacity_blocks += index.capacity();
            stats.evictions += index.evictions();
        }
        stats.bytes += opened.file.size().map_or(0, |(_, taken)| taken);
        stats.max_bytes += self.options.max_bytes;
        stats.queued_bytes += self.queue.lock().bytes;
        stats.hits += read(&self.counts.hits);
        stats.misses += read(&self.counts.misses);
        stats.written += read(&self.counts.written);
        stats.bytes_written += read(&self.counts.bytes_written);
        stats.bytes_read += read(&self.counts.bytes_read);
        stats.dropped += read(&self.counts.dropped);
        stats.corrupt += read(&self.counts.corrupt);
        stats.errors += read(&self.counts.errors);
        stats.late += read(&self.counts.late);
        stats.recovered += read(&opened.recovered) as usize;
        stats.scanning |= opened.scanning.load(Ordering::Relaxed);
        let failing = |breaker: &Mutex<Breaker>| breaker.lock().is_failing();
        stats.failing |= self.is_off() || self.reading.lock().is_stuck();
        stats.failing |= [&self.writes, &self.reads, &self.upkeep].into_iter().any(failing);
    }
}

/// Whether this process ended it, and the system was not even asked.
fn never_begun(error: &io::Error) -> bool {
    error.raw_os_error().is_none() && matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

impl Opened {
    /// The file of `options` with an engine of its own.
    pub(super) fn new(
        file: SlabFile,
        (arena, io): (&Arc<Arena>, IoOptions),
        geometry: Geometry,
        common: Common,
        sequence: u64,
    ) -> Result<Self> {
        let file = Arc::new(file);
        let io = serve(&file, arena, io)?;
        let since = sequence << 32;
        Ok(Self {
            file,
            io,
            geometry,
            common: Mutex::new(common),
            since,
            sequence: AtomicU64::new(sequence),
            index: Mutex::new(DiskIndex::new()),
            generation: AtomicU64::new(since),
            scanning: AtomicBool::new(true),
            recovered: AtomicU64::new(0),
            dirty: AtomicBool::new(false),
        })
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
