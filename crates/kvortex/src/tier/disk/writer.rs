//! The thread of a volume: it scans, lets the file grow, and writes what is queued, payloads first and headers last.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use kvortex_mem::error::MemError;
use kvortex_mem::file::{Access, Digest, Ended, Memory, Op, Scratch, SlabFile, digest_slot};

use super::header::{Common, HEADER_BYTES, Header, encode};
use super::open::{self, usable};
use super::volume::{Opened, Queued, Volume, add, now};
use crate::error::{Error, Result};
use crate::key::BlockKey;
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering};
use crate::tier::Offer;

/// Blocks of one sheet.
const SHEET_BLOCKS: usize = 64;
const SHEET_BYTES: usize = 32 << 20;
/// Sheets under way at once: the headers of one are written while the next one's payloads are.
const SHEETS: usize = 3;
/// How often the thread looks after the file when nothing is queued.
const TICK: Duration = Duration::from_millis(250);
/// A device without room is asked again this often.
const RETRY: Duration = Duration::from_secs(1);
/// A file system keeps this much for others, or this share of it if it is a small one: a cap may be larger than it is.
const SPARED: u64 = 1 << 30;
const SPARED_SHARE: u64 = 20;
/// What is written is made to survive a power cut this often.
const SYNC_EVERY: Duration = Duration::from_secs(1);

pub(super) fn start(volume: &Arc<Volume>) -> Result<()> {
    let volume = Arc::clone(volume);
    let run = move || {
        run(&volume);
        volume.queue.lock().over = true;
        volume.changed.notify_all();
    };
    thread::Builder::new().name("kvortex-disk-w".to_owned()).spawn(run).map_err(MemError::Thread)?;
    Ok(())
}

fn run(volume: &Arc<Volume>) {
    let is_closed = || volume.queue.lock().closed;
    open::scan(&volume.opened(), &is_closed);
    // Through the lock, or who has just seen that the scan goes on would wait for ever.
    drop(volume.queue.lock());
    volume.changed.notify_all();
    let mut keeper = Keeper { next: Instant::now(), sync: Instant::now() + SYNC_EVERY, full: None };
    loop {
        let grows = keeper.look_after(volume);
        match take(volume, if grows { Duration::ZERO } else { TICK }) {
            Some(taken) => {
                keeper.make_room(volume, taken.offers.len());
                write(volume, taken);
            }
            None => break,
        }
    }
    sync(volume, &volume.opened());
}

/// Offers for one sheet, and what their headers say.
///
/// All is taken under the queue's lock, as a clear takes it: what was offered before a clear has the identity of before.
struct Taken {
    offers: Vec<Queued>,
    common: Common,
    era: u64,
}

/// What is to be written next, nothing after `patience`; `None` once closed and empty.
fn take(volume: &Volume, patience: Duration) -> Option<Taken> {
    let opened = volume.opened();
    let end = Instant::now() + patience;
    let mut queue = volume.queue.lock();
    loop {
        if queue.closed && queue.offers.is_empty() && queue.in_flight == 0 {
            return None;
        }
        if !queue.offers.is_empty() && queue.in_flight < SHEETS {
            let count = (SHEET_BYTES / volume.arena.stride()).clamp(1, SHEET_BLOCKS).min(queue.offers.len());
            queue.in_flight += 1;
            let offers = queue.offers.drain(..count).collect();
            return Some(Taken { offers, common: *opened.common.lock(), era: queue.era });
        }
        if volume.changed.wait_until(&mut queue, end).timed_out() {
            return Some(Taken { offers: Vec::new(), common: *opened.common.lock(), era: queue.era });
        }
    }
}

/// Looks after the file.
struct Keeper {
    next: Instant,
    sync: Instant,
    /// When the device had no room for another segment.
    full: Option<Instant>,
}

impl Keeper {
    /// True if the file can go on growing at once.
    fn look_after(&mut self, volume: &Arc<Volume>) -> bool {
        let now = Instant::now();
        volume.opened().io.expire();
        if now < self.next || volume.is_off() {
            return false;
        }
        let opened = volume.opened();
        if now >= self.sync {
            self.sync = now + SYNC_EVERY;
            if opened.file.is_linked().unwrap_or(true) {
                sync(volume, &opened);
            } else {
                reopen(volume);
            }
        }
        let grows = self.grow(volume, &volume.opened());
        if !grows {
            self.next = now + TICK;
        }
        grows
    }

    /// Lets the file grow for `count` blocks as far as it may, so that none is forgotten for them before.
    fn make_room(&mut self, volume: &Volume, count: usize) {
        let opened = volume.opened();
        let short = || opened.index.lock().free() < count;
        while short() && self.grow(volume, &opened) {}
    }

    /// Adds a segment. False if the cap is reached or there is no room.
    fn grow(&mut self, volume: &Volume, opened: &Opened) -> bool {
        let geometry = opened.geometry;
        let segments = (opened.index.lock().capacity() / geometry.segment_slots as usize) as u32;
        if segments >= geometry.segments_in(usable(volume.options.max_bytes)) {
            return false;
        }
        if self.full.is_some_and(|since| since.elapsed() < RETRY) {
            return false;
        }
        let grown = leaves_enough(opened).and_then(|()| opened.file.grow(geometry.file_bytes(segments + 1)));
        match grown {
            Ok(()) => {
                if self.full.take().is_some() {
                    log::info!("{}: there is room again", volume.path());
                }
                opened.index.lock().add(geometry.segment_slots, true);
                true
            }
            Err(error) => {
                if self.full.replace(Instant::now()).is_none() {
                    log::warn!("{} cannot grow beyond {segments} segments, and tries again: {error}", volume.path());
                }
                false
            }
        }
    }
}

/// Whether another segment leaves the file system what others need. One that does not tell is believed to have it.
fn leaves_enough(opened: &Opened) -> io::Result<()> {
    let Some((left, all)) = opened.file.left().ok().filter(|&(_, all)| all > 0) else { return Ok(()) };
    let spared = (all / SPARED_SHARE).min(SPARED);
    if left >= opened.geometry.segment_bytes().saturating_add(spared) {
        return Ok(());
    }
    let text = format!("its file system has {left} bytes left, of which {spared} are for others");
    Err(io::Error::new(io::ErrorKind::StorageFull, text))
}

fn sync(volume: &Volume, opened: &Opened) {
    if !opened.dirty.swap(false, Ordering::Relaxed) {
        return;
    }
    match opened.file.sync() {
        Ok(()) => volume.told(&volume.upkeep, true, "flushed"),
        Err(error) => {
            opened.dirty.store(true, Ordering::Relaxed);
            add(&volume.counts.errors, 1);
            volume.told(&volume.upkeep, false, &format!("flushed ({error})"));
        }
    }
}

/// The folder was taken away: what was kept there is forgotten, and a new one is made.
fn reopen(volume: &Arc<Volume>) {
    let old = volume.opened();
    old.file.unlock();
    let file = SlabFile::open(&volume.options.slab).map_err(Error::from);
    match file.and_then(|file| open::open(file, &volume.options, &volume.arena, volume.identity)) {
        Ok(opened) => {
            log::warn!("{} was taken away; it is made anew, and empty", volume.path());
            opened.scanning.store(false, Ordering::Relaxed);
            opened.index.lock().clear();
            volume.replace(opened);
            volume.told(&volume.upkeep, true, "made anew");
            // Its ring has work under way that must end by itself.
            old.io.stop(Duration::ZERO);
        }
        Err(error) => {
            old.index.lock().clear();
            volume.told(&volume.upkeep, false, &format!("made anew ({error})"));
        }
    }
}

/// A block on its way into the file.
struct Block {
    offer: Option<Offer>,
    key: BlockKey,
    slot: u32,
    digest: Digest,
    generation: u64,
    /// Blocks that are to go after it.
    then: Vec<BlockKey>,
    well: bool,
}

/// Blocks that are written together.
struct Sheet {
    volume: Arc<Volume>,
    opened: Arc<Opened>,
    common: Common,
    era: u64,
    blocks: Mutex<Vec<Block>>,
    /// Operations of this stage that have not ended.
    awaited: AtomicUsize,
    /// Of all that was offered for it.
    keys: Vec<BlockKey>,
}

fn write(volume: &Arc<Volume>, Taken { offers, common, era }: Taken) {
    if offers.is_empty() {
        return;
    }
    let opened = volume.opened();
    let keys = offers.iter().map(|queued| queued.offer.key).collect();
    // The tail of a batch comes first here, and is the first to go.
    let blocks: Vec<Block> = offers.into_iter().filter_map(|queued| place(volume, &opened, queued)).collect();
    let sheet = Sheet {
        volume: Arc::clone(volume),
        opened,
        common,
        era,
        awaited: AtomicUsize::new(blocks.len()),
        blocks: Mutex::new(blocks),
        keys,
    };
    Arc::new(sheet).begin();
}

/// Gives a block a place. One that is there already, or for which no place can be had, is let go.
fn place(volume: &Volume, opened: &Opened, Queued { offer, then }: Queued) -> Option<Block> {
    let key = offer.key;
    let digest = digest_slot(&volume.arena, offer.slot)?;
    let mut index = opened.index.lock();
    let slot = if index.knows(&key) { None } else { index.claim(key) };
    drop(index);
    if slot.is_none() {
        add(&volume.counts.dropped, 1);
    }
    let generation = opened.generation.fetch_add(1, Ordering::Relaxed);
    slot.map(|slot| Block { offer: Some(offer), key, slot, digest, generation, then, well: false })
}

impl Sheet {
    /// Writes the payloads.
    fn begin(self: Arc<Self>) {
        let ops: Vec<Op> = {
            let blocks = self.blocks.lock();
            let payload = |(i, block): (usize, &Block)| {
                let offer = block.offer.as_ref()?;
                let sheet = Arc::clone(&self);
                Some(Op {
                    access: Access::Write,
                    offset: self.opened.geometry.payload_at(block.slot),
                    memory: Memory::Slot(offer.slot),
                    deadline: None,
                    done: Box::new(move |ended: Ended| sheet.payload_ended(i, ended.result)),
                })
            };
            blocks.iter().enumerate().filter_map(payload).collect()
        };
        if ops.is_empty() {
            return self.settle();
        }
        self.opened.io.submit(ops);
    }

    fn payload_ended(self: Arc<Self>, i: usize, result: io::Result<()>) {
        // The slot is not needed any more.
        let offer = self.blocks.lock()[i].offer.take();
        drop(offer);
        match result {
            Ok(()) => self.blocks.lock()[i].well = true,
            Err(error) => self.failed(&error),
        }
        if self.awaited.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.headers();
        }
    }

    fn failed(&self, error: &io::Error) {
        if error.kind() != io::ErrorKind::Interrupted {
            add(&self.volume.counts.errors, 1);
            self.volume.told(&self.volume.writes, false, &format!("written ({error})"));
        }
    }

    /// Writes the headers of the payloads that are in place, those side by side together.
    fn headers(self: Arc<Self>) {
        let runs = self.runs();
        if runs.is_empty() {
            return self.settle();
        }
        self.awaited.store(runs.len(), Ordering::Release);
        let ops = runs.into_iter().map(|run| self.header_op(run)).collect();
        self.opened.io.submit(ops);
    }

    /// Numbers of blocks whose headers lie side by side.
    fn runs(&self) -> Vec<Vec<usize>> {
        let blocks = self.blocks.lock();
        let mut order: Vec<usize> = (0..blocks.len()).filter(|&i| blocks[i].well).collect();
        order.sort_unstable_by_key(|&i| blocks[i].slot);
        let follows = |a: &usize, b: &usize| self.opened.geometry.follows(blocks[*a].slot, blocks[*b].slot);
        order.chunk_by(follows).map(<[usize]>::to_vec).collect()
    }

    fn header_op(self: &Arc<Self>, run: Vec<usize>) -> Op {
        let blocks = self.blocks.lock();
        let mut scratch = Scratch::new(run.len() * HEADER_BYTES);
        for (&i, into) in run.iter().zip(scratch.chunks_exact_mut(HEADER_BYTES)) {
            let Block { key, slot, digest, generation, .. } = blocks[i];
            encode(&self.common, &Header { key, slot, generation, written_at: now(), payload: digest }, into);
        }
        let sheet = Arc::clone(self);
        Op {
            access: Access::Write,
            offset: self.opened.geometry.header_at(blocks[run[0]].slot),
            memory: Memory::Scratch(scratch),
            deadline: None,
            done: Box::new(move |ended: Ended| sheet.header_ended(&run, ended.result)),
        }
    }

    fn header_ended(&self, run: &[usize], result: io::Result<()>) {
        if let Err(error) = &result {
            self.failed(error);
            let mut blocks = self.blocks.lock();
            run.iter().for_each(|&i| blocks[i].well = false);
        }
        if self.awaited.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.settle();
        }
    }

    /// Makes what is wholly written visible, and makes room in the queue.
    fn settle(&self) {
        let blocks = std::mem::take(&mut *self.blocks.lock());
        let stride = self.volume.arena.stride();
        let (written, unwanted) = self.commit(&blocks);
        unwanted.into_iter().for_each(|slot| self.volume.wipe(&self.opened, slot));
        let counts = &self.volume.counts;
        add(&counts.written, written);
        add(&counts.bytes_written, written * (stride + HEADER_BYTES) as u64);
        add(&counts.dropped, blocks.iter().filter(|block| !block.well).count() as u64);
        if written > 0 {
            self.opened.dirty.store(true, Ordering::Relaxed);
            self.volume.told(&self.volume.writes, true, "written");
        }
        let mut queue = self.volume.queue.lock();
        queue.in_flight -= 1;
        queue.bytes -= self.keys.len() * stride;
        drop(queue);
        self.volume.changed.notify_all();
    }

    /// Shows what is written and still wanted: how many, and the places of what was removed meanwhile. Offered before a clear,
    /// nothing is seen after it; the queue's keys are then others'.
    fn commit(&self, blocks: &[Block]) -> (u64, Vec<u32>) {
        let mut queue = self.volume.queue.lock();
        let mut index = self.opened.index.lock();
        let current = queue.era == self.era;
        let (mut written, mut unwanted) = (0, Vec::new());
        for Block { key, slot, digest, generation, then, well, .. } in blocks {
            if !*well || !current {
                index.abandon(*slot, key);
            } else if queue.keys.contains(key) {
                written += u64::from(index.commit(*slot, key, *digest, *generation));
            } else {
                index.disown(*slot, key);
                unwanted.push(*slot);
            }
            then.iter().rev().for_each(|key| index.touch(key));
        }
        if current {
            for key in &self.keys {
                queue.keys.remove(key);
            }
        }
        (written, unwanted)
    }
}
