//! From a folder to an open file: its superblock, and the scan for what it kept.

use std::io;

use kvortex_mem::arena::Arena;
use kvortex_mem::error::MemError;
use kvortex_mem::file::{Scratch, SlabFile};
use sha2::{Digest, Sha256};

use super::geometry::{Geometry, START};
use super::header::{Common, Found, HEADER_BYTES, Super, decode};
use super::volume::{Opened, VolumeOptions};
use crate::error::Result;
use crate::sync::{Arc, AtomicU64, Ordering};
use crate::tier::Identity;

/// Headers read at once.
const SCAN_HEADERS: u32 = 256;

/// Takes a file for use, made what this layout needs.
pub(super) fn open(file: SlabFile, options: &VolumeOptions, arena: &Arc<Arena>, identity: Identity) -> Result<Opened> {
    let failed = |cause| MemError::Disk { path: options.slab.folder.display().to_string(), cause };
    let (geometry, found) = shape(&file, options, arena).map_err(failed)?;
    let sequence = found.map_or(1, |found| (found.sequence + 1).min(u64::from(u32::MAX)));
    let slab = found.map_or_else(fresh_slab, |found| found.slab);
    let Geometry { payload_bytes, stored_bytes, .. } = geometry;
    let common = Common { identity, slab, payload_bytes, stored_bytes };
    let opened = Opened::new(file, (arena, options.io), geometry, common, sequence)?;
    write_super(&opened).map_err(failed)?;
    let (len, _) = opened.file.size().map_err(failed)?;
    let segments = geometry.segments_in(len);
    opened.index.lock().add(segments * geometry.segment_slots, false);
    Ok(opened)
}

/// The geometry to use, and the superblock if the file has one that fits; else the file is emptied. A file that is longer
/// than it may be is cut, so that the cap holds from here on.
fn shape(file: &SlabFile, options: &VolumeOptions, arena: &Arena) -> io::Result<(Geometry, Option<Super>)> {
    let local = Geometry::new(arena.slot_bytes(), arena.stride(), usable(options.max_bytes));
    let adopt = |found: Super| local.adopt(&found, usable(options.max_bytes)).map(|geometry| (geometry, found));
    let found = read_super(file)?.and_then(adopt);
    let (len, _) = file.size()?;
    match found {
        Some((geometry, found)) => {
            let most = geometry.file_bytes(geometry.segments_in(usable(options.max_bytes)));
            let whole = geometry.file_bytes(geometry.segments_in(len));
            if len != whole.min(most) {
                file.cut(whole.min(most))?;
            }
            Ok((geometry, Some(found)))
        }
        None => {
            if len > 0 {
                log::info!("{}: what it keeps has another layout or version and is dropped", file.path().display());
                file.cut(0)?;
            }
            file.grow(START)?;
            Ok((local, None))
        }
    }
}

/// What is left of a cap for the file's own bytes: a file system keeps its map of the file in further ones.
pub(super) fn usable(max_bytes: u64) -> u64 {
    max_bytes.saturating_sub(max_bytes / 1024 + (32 << 10))
}

/// The newer of the two superblocks that are whole. That neither can be read now is an error: the file may be sound.
pub(super) fn read_super(file: &SlabFile) -> io::Result<Option<Super>> {
    let mut scratch = Scratch::new(HEADER_BYTES);
    let mut read = |offset| match file.read_now(&mut scratch, offset) {
        Ok(()) => Ok(Super::decode(&scratch)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    };
    match [read(0), read(HEADER_BYTES as u64)] {
        [Ok(one), Ok(other)] => Ok([one, other].into_iter().flatten().max_by_key(|found| found.sequence)),
        [Ok(Some(found)), Err(_)] | [Err(_), Ok(Some(found))] => Ok(Some(found)),
        [Err(error), _] | [_, Err(error)] => Err(error),
    }
}

/// Writes the superblock twice; a power cut between leaves one of them.
pub(super) fn write_super(opened: &Opened) -> io::Result<()> {
    let mut scratch = Scratch::new(HEADER_BYTES);
    let Geometry { payload_bytes, stored_bytes, segment_slots } = opened.geometry;
    let (slab, sequence) = (opened.common.lock().slab, opened.sequence.load(Ordering::Relaxed));
    Super { slab, sequence, payload_bytes, stored_bytes, segment_slots }.encode(&mut scratch);
    for offset in [HEADER_BYTES as u64, 0] {
        opened.file.write_now(&scratch, offset)?;
        opened.file.sync()?;
    }
    Ok(())
}

/// Gives the file another identity, so that what was written before is not believed again once the superblock says it.
pub(super) fn renew(opened: &Opened) {
    opened.common.lock().slab = fresh_slab();
    opened.sequence.fetch_add(1, Ordering::Relaxed);
}

/// Sixteen bytes that no other file has: the hasher's seeds are random, the rest differs between processes and calls.
fn fresh_slab() -> [u8; 16] {
    use std::hash::{BuildHasher, RandomState};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut hash = Sha256::new();
    for number in 0..4u64 {
        hash.update(RandomState::new().hash_one(number).to_le_bytes());
    }
    hash.update(std::process::id().to_le_bytes());
    hash.update(COUNT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    hash.update(format!("{:?}", std::time::SystemTime::now()));
    let digest: [u8; 32] = hash.finalize().into();
    let mut slab = [0; 16];
    slab.copy_from_slice(&digest[..16]);
    slab
}

/// Looks at every header of an open file. `stop` is asked between reads. What is found can be served at once.
pub(super) fn scan(opened: &Opened, stop: &dyn Fn() -> bool) {
    let capacity = opened.index.lock().capacity() as u32;
    let common = *opened.common.lock();
    let per_segment = opened.geometry.segment_slots;
    let mut first = 0;
    while first < capacity && !stop() {
        let count = SCAN_HEADERS.min(per_segment - first % per_segment).min(capacity - first);
        let found = headers(opened, &common, first, count);
        let mut index = opened.index.lock();
        // A clear has come between.
        if opened.common.lock().slab != common.slab {
            break;
        }
        for (slot, found) in (first..).zip(found) {
            let entry = match found {
                Found::Entry(header) => Some((header, true)),
                Found::Foreign(header) => Some((header, false)),
                Found::Nothing | Found::Stale | Found::Bad => None,
            };
            opened.recovered.fetch_add(u64::from(matches!(found, Found::Entry(_))), Ordering::Relaxed);
            index.recover(slot, entry);
        }
        first += count;
    }
    opened.index.lock().sort_recovered(opened.since);
    opened.scanning.store(false, Ordering::Relaxed);
}

/// What stands at `count` places of one segment. What cannot be read is nothing: its place is written anew.
fn headers(opened: &Opened, common: &Common, first: u32, count: u32) -> Vec<Found> {
    let mut scratch = Scratch::new(count as usize * HEADER_BYTES);
    match opened.file.read_now(&mut scratch, opened.geometry.header_at(first)) {
        Ok(()) => {
            (first..).zip(scratch.chunks_exact(HEADER_BYTES)).map(|(slot, bytes)| decode(common, slot, bytes)).collect()
        }
        // One that cannot be read costs no other.
        Err(_) if count > 1 => {
            let half = count / 2;
            let mut found = headers(opened, common, first, half);
            found.extend(headers(opened, common, first + half, count - half));
            found
        }
        Err(error) => {
            log::debug!("{}: header {first} cannot be read: {error}", opened.file.path().display());
            vec![Found::Bad]
        }
    }
}
