//! Where things are in a file: two superblocks, then segments, each the headers of its blocks and then the blocks.

use super::header::{HEADER_BYTES, Super};

/// Bytes before the first segment: two superblocks, so that one survives a torn write of the other.
pub(super) const START: u64 = 2 * HEADER_BYTES as u64;

/// Segments are about this long: the step in which a file grows.
const SEGMENT_BYTES: u64 = 256 << 20;
const MAX_SEGMENT_SLOTS: u64 = 4096;
/// With fewer segments than this in a cap that was lowered, too much of it would stay unused.
const FEW_SEGMENTS: u32 = 2;

/// The places of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes of a block.
    pub(super) payload_bytes: u64,
    /// Bytes it takes.
    pub(super) stored_bytes: u64,
    /// Blocks of a segment.
    pub(super) segment_slots: u32,
}

impl Geometry {
    /// For blocks of `payload_bytes` in a file of at most `max_bytes`.
    #[must_use]
    pub(super) fn new(payload_bytes: usize, stored_bytes: usize, max_bytes: u64) -> Self {
        let (payload_bytes, stored_bytes) = (payload_bytes as u64, stored_bytes as u64);
        let each = stored_bytes + HEADER_BYTES as u64;
        // Several segments in any file, or the end of a small one would stay unused.
        let slots = (SEGMENT_BYTES.min(max_bytes / 16) / each).clamp(1, MAX_SEGMENT_SLOTS) as u32;
        Self { payload_bytes, stored_bytes, segment_slots: slots }
    }

    /// That of a file that is there, if its blocks have the same size and its segments are not too long for `max_bytes`.
    #[must_use]
    pub(super) fn adopt(self, found: &Super, max_bytes: u64) -> Option<Self> {
        let other = Self::of(found)?;
        let same = (other.payload_bytes, other.stored_bytes) == (self.payload_bytes, self.stored_bytes);
        let enough = self.segments_in(max_bytes).min(FEW_SEGMENTS);
        (same && other.segments_in(max_bytes) >= enough).then_some(other)
    }

    /// What a superblock says, if that makes sense.
    #[must_use]
    pub(super) fn of(found: &Super) -> Option<Self> {
        let &Super { payload_bytes, stored_bytes, segment_slots, .. } = found;
        let sane = (1..=MAX_SEGMENT_SLOTS as u32).contains(&segment_slots)
            && (1..1 << 40).contains(&stored_bytes)
            && payload_bytes <= stored_bytes;
        sane.then_some(Self { payload_bytes, stored_bytes, segment_slots })
    }

    /// Bytes of a segment.
    #[must_use]
    pub(super) const fn segment_bytes(&self) -> u64 {
        self.segment_slots as u64 * (self.stored_bytes + HEADER_BYTES as u64)
    }

    /// Segments that lie wholly in a file of `bytes` bytes, and that slot numbers can name.
    #[must_use]
    pub(super) fn segments_in(&self, bytes: u64) -> u32 {
        let most = u64::from(u32::MAX / self.segment_slots - 1);
        (bytes.saturating_sub(START) / self.segment_bytes()).min(most) as u32
    }

    /// Length of a file of `segments`.
    #[must_use]
    pub(super) const fn file_bytes(&self, segments: u32) -> u64 {
        START + segments as u64 * self.segment_bytes()
    }

    /// Where the header of a block is.
    #[must_use]
    pub(super) const fn header_at(&self, slot: u32) -> u64 {
        let (segment, within) = (slot / self.segment_slots, slot % self.segment_slots);
        self.file_bytes(segment) + within as u64 * HEADER_BYTES as u64
    }

    /// Where a block is.
    #[must_use]
    pub(super) const fn payload_at(&self, slot: u32) -> u64 {
        let (segment, within) = (slot / self.segment_slots, slot % self.segment_slots);
        let headers = self.segment_slots as u64 * HEADER_BYTES as u64;
        self.file_bytes(segment) + headers + within as u64 * self.stored_bytes
    }

    /// Whether the headers of two blocks lie side by side.
    #[must_use]
    pub(super) const fn follows(&self, slot: u32, next: u32) -> bool {
        next == slot + 1 && !next.is_multiple_of(self.segment_slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_places_share_a_byte_and_none_lies_outside() {
        let geometry = Geometry { payload_bytes: 5000, stored_bytes: 8192, segment_slots: 3 };
        let mut taken: Vec<(u64, u64)> = vec![(0, START)];
        for slot in 0..9 {
            taken.push((geometry.header_at(slot), HEADER_BYTES as u64));
            taken.push((geometry.payload_at(slot), 8192));
        }
        taken.sort_unstable();
        assert!(taken.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0), "{taken:?}");
        let end = taken.last().map(|last| last.0 + last.1);
        assert_eq!((end, geometry.segments_in(geometry.file_bytes(3))), (Some(geometry.file_bytes(3)), 3));
        assert_eq!(geometry.segments_in(geometry.file_bytes(3) - 1), 2);
    }

    #[test]
    fn a_small_file_is_cut_small_and_a_large_one_in_large_steps() {
        let small = Geometry::new(8192, 8192, 1 << 20);
        assert!(small.file_bytes(small.segments_in(1 << 20)) > (1 << 20) * 9 / 10);
        let large = Geometry::new(2 << 20, 2 << 20, 1 << 40);
        assert!((200 << 20..=256 << 20).contains(&large.segment_bytes()));
        assert_eq!(Geometry::new(1 << 30, 1 << 30, 1 << 31).segment_slots, 1);
    }
}
