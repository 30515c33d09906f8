//! A look into a folder that no engine uses, for people.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use kvortex_mem::error::MemError;
use kvortex_mem::file::{Scratch, SlabFile, SlabOptions, digest};

use super::geometry::Geometry;
use super::header::{Common, Found, HEADER_BYTES, Header, Super, decode, identity_of};
use super::open::read_super;
use super::worlds;
use crate::error::Result;
use crate::tier::Identity;

/// What a folder keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Length of the file.
    pub file_bytes: u64,
    /// Bytes that it takes on the device.
    pub taken_bytes: u64,
    /// How often it was opened by an engine.
    pub openings: u64,
    /// Places for blocks.
    pub places: u32,
    /// By namespace, rank row and number of ranks.
    pub owners: Vec<(Identity, Kept)>,
    /// Places that hold nothing.
    pub empty: u32,
    /// Places that hold entries from before the file was cleared.
    pub stale: u32,
    /// Places whose header is not sound.
    pub bad_headers: u32,
    /// Places whose block is not what its header says; 0 if blocks were not read.
    pub bad_blocks: u32,
}

/// The blocks of one owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// How many.
    pub blocks: u32,
    /// When the oldest was written, in seconds since 1970.
    pub oldest: u64,
    /// When the newest was written.
    pub newest: u64,
}

struct Slab {
    file: SlabFile,
    geometry: Geometry,
    found: Super,
}

impl Slab {
    /// `writes` locks the folder as an engine does and may change it.
    fn open(folder: &Path, writes: bool) -> Result<Self> {
        let unread = |cause| MemError::Disk { path: folder.display().to_string(), cause };
        let failed = |text: &str| unread(io::Error::new(io::ErrorKind::InvalidData, text));
        match folder.join("v1/blocks").try_exists() {
            Ok(true) => {}
            Err(cause) if cause.kind() == io::ErrorKind::PermissionDenied => return Err(unread(cause).into()),
            _ => return Err(failed(&format!("it has no file v1/blocks: give {}", instead_of(folder))).into()),
        }
        let mut options = SlabOptions::new(folder);
        (options.direct, options.create) = (false, writes);
        let file = SlabFile::open(&options)?;
        let found = read_super(&file).map_err(unread)?;
        let found = found.ok_or_else(|| failed("it was not written by this version of KVortex"))?;
        let geometry = Geometry::of(&found).ok_or_else(|| failed("its superblock makes no sense"))?;
        Ok(Self { file, geometry, found })
    }

    fn failed(&self, cause: io::Error) -> MemError {
        MemError::Disk { path: self.file.path().display().to_string(), cause }
    }

    fn segments(&self) -> Result<u32> {
        let (len, _) = self.file.size().map_err(|cause| self.failed(cause))?;
        Ok(self.geometry.segments_in(len))
    }

    /// Calls `visit` with every place and what stands there.
    fn walk(&self, mut visit: impl FnMut(u32, Identity, Found)) -> Result<()> {
        let mut scratch = Scratch::new(HEADER_BYTES);
        let Super { slab, payload_bytes, stored_bytes, .. } = self.found;
        for slot in 0..self.segments()? * self.geometry.segment_slots {
            let read = self.file.read_now(&mut scratch, self.geometry.header_at(slot));
            let identity = identity_of(&scratch);
            let common = Common { identity, slab, payload_bytes, stored_bytes };
            visit(slot, identity, if read.is_ok() { decode(&common, slot, &scratch) } else { Found::Bad });
        }
        Ok(())
    }

    /// Whether the block at a header's place is the one that it names.
    fn is_sound(&self, header: &Header) -> bool {
        let mut scratch = Scratch::new(self.geometry.stored_bytes as usize);
        let read = self.file.read_now(&mut scratch, self.geometry.payload_at(header.slot));
        read.is_ok() && digest(&scratch[..self.geometry.payload_bytes as usize]) == header.payload
    }

    fn wipe(&self, slot: u32) -> Result<()> {
        let written = self.file.write_now(&Scratch::new(HEADER_BYTES), self.geometry.header_at(slot));
        Ok(written.map_err(|cause| self.failed(cause))?)
    }
}

/// What to name where a folder has no file of its own: one of those for the ranks, if it has them.
fn instead_of(folder: &Path) -> String {
    match worlds::ranks_in(folder).into_iter().min() {
        Some(rank) => format!("one of its folders, {} say", folder.join(rank).display()),
        None => "a folder of disk_paths".to_owned(),
    }
}

/// Looks at every header of a folder, and with `blocks` at every block. With `wipe` what is not sound is forgotten.
///
/// # Errors
/// When an engine uses the folder, or it is none of ours.
pub fn inspect(folder: &Path, blocks: bool, wipe: bool) -> Result<Contents> {
    let slab = Slab::open(folder, wipe)?;
    let (file_bytes, taken_bytes) = slab.file.size().map_err(|cause| slab.failed(cause))?;
    let places = slab.segments()? * slab.geometry.segment_slots;
    let (block_bytes, openings) = (slab.geometry.payload_bytes, slab.found.sequence);
    let mut seen = Contents { block_bytes, file_bytes, taken_bytes, openings, places, ..Contents::default() };
    let (mut owners, mut damaged) = (BTreeMap::new(), Vec::new());
    slab.walk(|slot, identity, found| match found {
        Found::Nothing => seen.empty += 1,
        Found::Stale => seen.stale += 1,
        Found::Bad => {
            seen.bad_headers += 1;
            damaged.push(slot);
        }
        Found::Entry(header) | Found::Foreign(header) if blocks && !slab.is_sound(&header) => {
            seen.bad_blocks += 1;
            damaged.push(slot);
        }
        Found::Entry(header) | Found::Foreign(header) => count(&mut owners, identity, &header),
    })?;
    if wipe {
        damaged.into_iter().try_for_each(|slot| slab.wipe(slot))?;
    }
    seen.owners = owners.into_values().collect();
    Ok(seen)
}

/// What is counted of an owner, in the order of their names.
type Owners = BTreeMap<([u8; 32], u32, u32), (Identity, Kept)>;

fn count(owners: &mut Owners, identity: Identity, header: &Header) {
    let name = (*identity.namespace.digest(), identity.row, identity.world);
    let (_, kept) = owners.entry(name).or_insert((identity, Kept { oldest: u64::MAX, ..Kept::default() }));
    kept.blocks += 1;
    kept.oldest = kept.oldest.min(header.written_at);
    kept.newest = kept.newest.max(header.written_at);
}

/// Cuts a folder's file to at most `bytes`; what lies beyond is forgotten. Without, gives back what lies behind the last block.
/// Tells its length before and after.
///
/// # Errors
/// As [`inspect`].
pub fn trim(folder: &Path, bytes: Option<u64>) -> Result<(u64, u64)> {
    let slab = Slab::open(folder, true)?;
    let mut last = 0;
    slab.walk(|slot, _, found| {
        if matches!(found, Found::Entry(_) | Found::Foreign(_)) {
            last = slot + 1;
        }
    })?;
    let needed = last.div_ceil(slab.geometry.segment_slots);
    let segments = bytes.map_or(needed, |bytes| slab.geometry.segments_in(bytes)).min(slab.segments()?);
    let (before, _) = slab.file.size().map_err(|cause| slab.failed(cause))?;
    let after = slab.geometry.file_bytes(segments).min(before);
    slab.file.cut(after).map_err(|cause| slab.failed(cause))?;
    Ok((before, after))
}
