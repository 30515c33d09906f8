//! What stands before a block in a file, and at the start of the file. docs/disk.md has the tables.

use kvortex_mem::file::{Digest, digest};

use crate::key::{BlockKey, KEY_BYTES};
use crate::namespace::Namespace;
use crate::tier::Identity;

/// Bytes of a header, and of a superblock.
pub(super) const HEADER_BYTES: usize = 4096;

const MAGIC: &[u8; 8] = b"KVORTEX\x01";
const SUPER_MAGIC: &[u8; 8] = b"KVXSLAB\x01";
const FORMAT: u16 = 1;
const XXH3_128: u8 = 1;
const DIGEST_AT: usize = HEADER_BYTES - 16;

/// The fields that all entries of one open file have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Common {
    /// Whose blocks.
    pub(super) identity: Identity,
    /// Of the file, drawn anew when it is made or cleared.
    pub(super) slab: [u8; 16],
    /// Bytes of a block.
    pub(super) payload_bytes: u64,
    /// Bytes it takes in the file.
    pub(super) stored_bytes: u64,
}

/// The fields that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The block.
    pub(super) key: BlockKey,
    /// The place in the file.
    pub(super) slot: u32,
    /// Grows with every entry that is written.
    pub(super) generation: u64,
    /// Seconds since 1970, for people; nothing depends on it.
    pub(super) written_at: u64,
    /// Of the block's bytes.
    pub(super) payload: Digest,
}

/// What a place in the file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Never written, or wiped.
    Nothing,
    /// An entry, whose block is still to be verified.
    Entry(Header),
    /// A sound entry of another identity.
    Foreign(Header),
    /// Left from before the file was cleared.
    Stale,
    /// Anything else.
    Bad,
}

struct Writer<'a>(&'a mut [u8], usize);

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.0[self.1..self.1 + bytes.len()].copy_from_slice(bytes);
        self.1 += bytes.len();
    }
}

struct Reader<'a>(&'a [u8], usize);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[self.1..self.1 + N]);
        self.1 += N;
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// Writes a header into [`HEADER_BYTES`] bytes.
pub(super) fn encode(common: &Common, header: &Header, into: &mut [u8]) {
    into.fill(0);
    let mut out = Writer(into, 0);
    out.put(MAGIC);
    out.put(&FORMAT.to_le_bytes());
    out.put(&0u16.to_le_bytes());
    out.put(&(HEADER_BYTES as u32).to_le_bytes());
    out.put(&0u32.to_le_bytes());
    out.put(&common.identity.row.to_le_bytes());
    out.put(&common.identity.world.to_le_bytes());
    out.put(&header.slot.to_le_bytes());
    out.put(header.key.as_bytes());
    out.put(common.identity.namespace.digest());
    out.put(&common.slab);
    out.put(&common.payload_bytes.to_le_bytes());
    out.put(&common.stored_bytes.to_le_bytes());
    out.put(&header.generation.to_le_bytes());
    out.put(&header.written_at.to_le_bytes());
    out.put(&[XXH3_128, 0, 0, 0, 0, 0, 0, 0]);
    out.put(&header.payload);
    seal(into);
}

/// Reads what stands at `slot`. Nothing in `bytes` is believed that is not expected.
pub(super) fn decode(common: &Common, slot: u32, bytes: &[u8]) -> Found {
    if bytes.iter().all(|&byte| byte == 0) {
        return Found::Nothing;
    }
    if bytes.len() != HEADER_BYTES || !is_sealed(bytes) {
        return Found::Bad;
    }
    let mut from = Reader(bytes, 28);
    let (stands_at, key) = (from.u32(), BlockKey::from_bytes(from.take::<KEY_BYTES>()));
    let _namespace: [u8; 32] = from.take();
    let _slab: [u8; 16] = from.take();
    let _lengths = (from.u64(), from.u64());
    let (generation, written_at) = (from.u64(), from.u64());
    let _algorithms: [u8; 8] = from.take();
    let header = Header { key, slot: stands_at, generation, written_at, payload: from.take() };
    judge(common, header, slot, bytes)
}

/// Whose entry a header says it is.
pub(super) fn identity_of(bytes: &[u8]) -> Identity {
    let mut from = Reader(bytes, 20);
    let (row, world) = (from.u32(), from.u32());
    let mut from = Reader(bytes, 64);
    Identity { namespace: Namespace::from_digest(from.take()), row, world }
}

/// Compares a sealed header with the one that this process would have written, byte for byte.
fn judge(common: &Common, header: Header, slot: u32, bytes: &[u8]) -> Found {
    let (identity, slab) = (identity_of(bytes), Reader(bytes, 96).take());
    let mut again = [0; HEADER_BYTES];
    encode(&Common { identity, slab, ..*common }, &Header { slot, ..header }, &mut again);
    if again != *bytes {
        return Found::Bad;
    }
    match (slab == common.slab, identity == common.identity) {
        (false, _) => Found::Stale,
        (true, true) => Found::Entry(header),
        (true, false) => Found::Foreign(header),
    }
}

/// The start of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Super {
    /// Drawn anew when the file is made or cleared.
    pub(super) slab: [u8; 16],
    /// Grows with every opening.
    pub(super) sequence: u64,
    /// Bytes of a block.
    pub(super) payload_bytes: u64,
    /// Bytes it takes.
    pub(super) stored_bytes: u64,
    /// Blocks of a segment.
    pub(super) segment_slots: u32,
}

impl Super {
    /// Writes it into [`HEADER_BYTES`] bytes.
    pub(super) fn encode(&self, into: &mut [u8]) {
        into.fill(0);
        let mut out = Writer(into, 0);
        out.put(SUPER_MAGIC);
        out.put(&FORMAT.to_le_bytes());
        out.put(&0u16.to_le_bytes());
        out.put(&(HEADER_BYTES as u32).to_le_bytes());
        out.put(&self.slab);
        out.put(&self.sequence.to_le_bytes());
        out.put(&self.payload_bytes.to_le_bytes());
        out.put(&self.stored_bytes.to_le_bytes());
        out.put(&self.segment_slots.to_le_bytes());
        seal(into);
    }

    /// Reads one; `None` for anything that this version did not write.
    #[must_use]
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != HEADER_BYTES || !is_sealed(bytes) {
            return None;
        }
        let mut from = Reader(bytes, 16);
        let (slab, sequence) = (from.take(), from.u64());
        let (payload_bytes, stored_bytes, segment_slots) = (from.u64(), from.u64(), from.u32());
        let found = Self { slab, sequence, payload_bytes, stored_bytes, segment_slots };
        let mut again = [0; HEADER_BYTES];
        found.encode(&mut again);
        (again == *bytes).then_some(found)
    }
}

fn seal(bytes: &mut [u8]) {
    let sum = digest(&bytes[..DIGEST_AT]);
    bytes[DIGEST_AT..].copy_from_slice(&sum);
}

fn is_sealed(bytes: &[u8]) -> bool {
    digest(&bytes[..DIGEST_AT]) == bytes[DIGEST_AT..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn common() -> Common {
        let namespace = Namespace::from_digest([7; 32]);
        let identity = Identity { namespace, row: 1, world: 2 };
        Common { identity, slab: [9; 16], payload_bytes: 5000, stored_bytes: 8192 }
    }

    fn header() -> Header {
        let key = BlockKey::from_bytes([3; 32]);
        Header { key, slot: 5, generation: 77, written_at: 1_700_000_000, payload: [4; 16] }
    }

    fn bytes() -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        encode(&common(), &header(), &mut bytes);
        bytes
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        assert_eq!(decode(&common(), 5, &bytes()), Found::Entry(header()));
        assert_eq!(decode(&common(), 5, &[0; HEADER_BYTES]), Found::Nothing);
    }

    #[test]
    fn every_single_bit_counts() {
        let mut bytes = bytes();
        for bit in 0..HEADER_BYTES * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&common(), 5, &bytes), Found::Bad, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    /// The digest guards against chance only: what is sealed anew must be refused for what it says.
    #[test]
    fn every_byte_counts_even_if_sealed_anew() {
        for at in 0..DIGEST_AT {
            let mut bytes = bytes();
            bytes[at] ^= 1;
            seal(&mut bytes);
            let found = decode(&common(), 5, &bytes);
            let expected = match at {
                32..64 | 128..144 | 152..168 => matches!(found, Found::Entry(other) if other != header()),
                20..28 | 64..96 => matches!(found, Found::Foreign(_)),
                96..112 => found == Found::Stale,
                _ => found == Found::Bad,
            };
            assert!(expected, "byte {at}: {found:?}");
        }
    }

    #[test]
    fn an_entry_belongs_to_its_place_length_and_owner() {
        assert_eq!(decode(&common(), 6, &bytes()), Found::Bad);
        let expect = |change: fn(&mut Common)| {
            let mut common = common();
            change(&mut common);
            decode(&common, 5, &bytes())
        };
        assert_eq!(expect(|common| common.payload_bytes += 1), Found::Bad);
        assert_eq!(expect(|common| common.stored_bytes += 4096), Found::Bad);
        assert!(matches!(expect(|common| common.identity.row = 0), Found::Foreign(_)));
        assert!(matches!(expect(|common| common.identity.namespace = Namespace::default()), Found::Foreign(_)));
    }

    #[test]
    fn a_superblock_is_whole_or_none() {
        let found = Super { slab: [1; 16], sequence: 8, payload_bytes: 5000, stored_bytes: 8192, segment_slots: 64 };
        let mut bytes = [0; HEADER_BYTES];
        found.encode(&mut bytes);
        assert_eq!(Super::decode(&bytes), Some(found));
        for bit in 0..HEADER_BYTES * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Super::decode(&bytes), None);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
