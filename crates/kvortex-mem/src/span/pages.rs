//! Many pages of equal size, each made of one piece per segment.

use std::ops::Range;
use std::sync::OnceLock;

use super::ids::Ids;
use super::overlap;
use super::parts::Parts;
use super::pattern::Pattern;
use super::region::{Place, Region};
use crate::device::RawStream;
use crate::error::MemError;
use crate::sync::Arc;

/// One piece of one page.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The memory it lies in.
    pub region: Region,
    /// Bytes from the region's base to the piece's base.
    pub offset: isize,
    /// Its fragments, relative to the piece's base.
    pub pattern: Arc<Pattern>,
}

/// One piece of every page.
#[derive(Debug, Clone)]
pub enum Segment {
    /// Pieces at equal distances in one region: piece i has its base `first + i * stride` bytes from the region's base.
    Table {
        /// The memory the pieces lie in.
        region: Region,
        /// The fragments of each piece.
        pattern: Arc<Pattern>,
        /// Bytes from the region's base to the base of piece 0.
        first: isize,
        /// Bytes from the base of one piece to the next; may be negative.
        stride: isize,
        /// Number of pieces.
        count: usize,
    },
    /// Pieces picked by number from a table in one region, such as the blocks of an engine's paged memory: piece i has its
    /// base `first + ids[i] * stride` bytes from the region's base.
    Picked {
        /// The memory the pieces lie in.
        region: Region,
        /// The fragments of each piece.
        pattern: Arc<Pattern>,
        /// Bytes from the region's base to the base of the table's piece 0.
        first: isize,
        /// Bytes from the base of one piece of the table to the next; may be negative.
        stride: isize,
        /// The pieces, by their numbers in the table.
        ids: Arc<Ids>,
        /// Pieces that the table has.
        table_count: usize,
    },
    /// Pieces anywhere: piece i is the i-th.
    List(Vec<Piece>),
}

/// The scattered side of a transfer.
///
/// Page i is the concatenation of the i-th pieces of all segments. All pages have the same size in bytes, and every byte lies
/// in its region: [`Pages::new`] has checked it. Nothing here lists the fragments of all pages.
#[derive(Debug, Clone)]
pub struct Pages {
    segments: Box<[Placed]>,
    count: usize,
    page_bytes: usize,
    place: Place,
    order: Order,
    overlap: OnceLock<Option<(usize, usize)>>,
}

/// When a transfer on a device may touch its pages, and how urgent it is. Copies by the CPU have no use for it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Order {
    /// The stream of the pages' owner.
    pub(crate) stream: Option<RawStream>,
    /// Others go first.
    pub(crate) background: bool,
    /// Completion in several steps.
    pub(crate) parts: Option<Arc<Parts>>,
}

/// A segment and where in the page its pieces lie.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub(super) segment: Segment,
    start: usize,
    bytes: usize,
}

impl Segment {
    /// Number of pieces.
    pub fn count(&self) -> usize {
        match self {
            Segment::Table { count, .. } => *count,
            Segment::Picked { ids, .. } => ids.list().len(),
            Segment::List(pieces) => pieces.len(),
        }
    }

    /// Base address (it may lie outside the region where strides are negative) and pattern of piece `index`.
    pub(crate) fn piece(&self, index: usize) -> (*mut u8, &Arc<Pattern>) {
        match self {
            Segment::Table { region, pattern, first, stride, .. } => {
                // No overflow: `Pages::new` has checked the first and the last piece.
                (region.base().wrapping_offset(first + stride * index as isize), pattern)
            }
            Segment::Picked { region, pattern, first, stride, ids, .. } => {
                (picked_base(region, *first, *stride, ids.list()[index]), pattern)
            }
            Segment::List(pieces) => {
                let piece = &pieces[index];
                (piece.region.base().wrapping_offset(piece.offset), &piece.pattern)
            }
        }
    }

    fn regions(&self) -> impl Iterator<Item = &Region> {
        let (table, list) = match self {
            Segment::Table { region, .. } | Segment::Picked { region, .. } => (Some(region), [].iter()),
            Segment::List(pieces) => (None, pieces.iter()),
        };
        table.into_iter().chain(list.map(|piece| &piece.region))
    }

    /// Bytes of each piece, after checking that all have the same number and lie in their region.
    fn check(&self) -> Result<usize, MemError> {
        match self {
            Segment::Table { count: 0, .. } => Ok(0),
            Segment::Table { region, pattern, first, stride, count } => {
                let last = *first as i128 + *stride as i128 * (*count as i128 - 1);
                check_bounds(region, *first as i128, pattern)?;
                check_bounds(region, last, pattern)?;
                Ok(pattern.bytes())
            }
            Segment::Picked { region, pattern, first, stride, ids, table_count } => {
                let Some((lowest, highest)) = ids.extremes() else { return Ok(0) };
                in_table(highest, *table_count)?;
                for id in [lowest, highest] {
                    check_bounds(region, *first as i128 + *stride as i128 * id as i128, pattern)?;
                }
                Ok(pattern.bytes())
            }
            Segment::List(pieces) => check_pieces(pieces),
        }
    }
}

/// Base address of piece `id` of a table.
pub(super) fn picked_base(region: &Region, first: isize, stride: isize, id: u32) -> *mut u8 {
    // The sum is in bounds where `Pages::new` has checked it; its parts need not be.
    region.base().wrapping_offset(first.wrapping_add(stride.wrapping_mul(id as isize)))
}

fn in_table(id: u32, count: usize) -> Result<(), MemError> {
    let index = id as usize;
    if index < count { Ok(()) } else { Err(MemError::OutOfRange { what: "block id", index, count }) }
}

fn check_pieces(pieces: &[Piece]) -> Result<usize, MemError> {
    let expected = pieces.first().map_or(0, |piece| piece.pattern.bytes());
    for piece in pieces {
        let actual = piece.pattern.bytes();
        if actual != expected {
            return Err(MemError::PagesMismatch { what: "bytes of a page", expected, actual });
        }
        check_bounds(&piece.region, piece.offset as i128, &piece.pattern)?;
    }
    Ok(expected)
}

fn check_bounds(region: &Region, base: i128, pattern: &Pattern) -> Result<(), MemError> {
    let bounds = pattern.bounds();
    let (start, end, len) = (base + bounds.start as i128, base + bounds.end as i128, region.len());
    if start < 0 || end > len as i128 {
        return Err(MemError::Bounds { start, end, len });
    }
    Ok(())
}

impl Pages {
    /// Pages made of `segments`, which must all have the same number of pieces; the pieces of one segment must have the same
    /// number of bytes, at least one. At least one segment is needed; no pages at all are fine.
    pub fn new(segments: Vec<Segment>) -> Result<Pages, MemError> {
        let count = segments.first().ok_or(MemError::ZeroBytes { what: "a page" })?.count();
        let mut placed = Vec::with_capacity(segments.len());
        let mut start = 0usize;
        for segment in segments {
            let bytes = check_segment(&segment, count)?;
            placed.push(Placed { segment, start, bytes });
            start = start.checked_add(bytes).filter(|&sum| sum <= isize::MAX as usize).ok_or(TOO_LARGE)?;
        }
        let place = common_place(placed.iter().flat_map(|placed| placed.segment.regions()))?;
        Ok(Pages {
            segments: placed.into(),
            count,
            page_bytes: start,
            place,
            order: Order::default(),
            overlap: OnceLock::new(),
        })
    }

    /// `count` pages of equal size, one after the other, that fill `region`. Fails if they cannot.
    pub fn contiguous(region: Region, count: usize) -> Result<Pages, MemError> {
        let bytes = region.len() / count.max(1);
        if bytes * count != region.len() {
            return Err(MemError::PagesMismatch {
                what: "bytes of the region",
                expected: bytes * count,
                actual: region.len(),
            });
        }
        let pattern = Arc::new(Pattern::contiguous(bytes));
        Pages::new(vec![Segment::Table { region, pattern, first: 0, stride: bytes as isize, count }])
    }

    /// Number of pages.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of each page; 0 if there are no pages.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// The same pages, to be touched in the order of their owner's `stream`: a transfer waits for what the stream was given
    /// before it was submitted, and what the stream is given after a load was submitted waits for that load, unless it is one
    /// [in the background](Pages::in_background) or [in parts](Pages::in_parts).
    #[must_use]
    pub fn in_stream(mut self, stream: RawStream) -> Pages {
        self.order.stream = Some(stream);
        self
    }

    /// The same pages, to be copied a little at a time, so that nobody's copies have to wait long: loaded when no other load is
    /// waiting, without any stream that waits for the end; stored at some less than full speed.
    #[must_use]
    pub fn in_background(mut self) -> Pages {
        self.order.background = true;
        self
    }

    /// The same pages, to be loaded part by part: [`Parts::hold`] makes a stream wait for one of them.
    #[must_use]
    pub fn in_parts(mut self, parts: Arc<Parts>) -> Pages {
        self.order.parts = Some(parts);
        self
    }

    /// The stream of the pages' owner, if one was named.
    pub fn stream(&self) -> Option<RawStream> {
        self.order.stream
    }

    pub(crate) fn order(&self) -> &Order {
        &self.order
    }

    /// The segments, each with the range of a page's bytes that its pieces make up.
    pub(crate) fn segments(&self) -> impl Iterator<Item = (&Segment, Range<usize>)> {
        self.segments.iter().map(|placed| (&placed.segment, placed.start..placed.start + placed.bytes))
    }

    /// Where the pages are.
    pub fn place(&self) -> Place {
        self.place
    }

    /// True if every page may be written.
    pub fn is_writable(&self) -> bool {
        self.regions().all(Region::is_writable)
    }

    /// Two pages that share a byte, the lower number first, or one page twice that shares one with itself; `None` if no byte
    /// belongs to two places.
    ///
    /// The first call decides it from bounds and strides where those suffice, from sorted fragments where they do not; later
    /// calls return the same answer at once.
    pub fn first_overlap(&self) -> Option<(usize, usize)> {
        *self.overlap.get_or_init(|| overlap::first_overlap(&self.segments, self.count))
    }

    /// Calls `f` with the address and length of each fragment of page `page`, in the order of the page's bytes.
    ///
    /// Every fragment is in bounds of its region, which lives as long as `self`.
    ///
    /// # Panics
    ///
    /// If there is no such page.
    pub fn for_each_run(&self, page: usize, f: impl FnMut(*mut u8, usize)) {
        self.for_each_run_in(page, 0..self.page_bytes, f);
    }

    /// As [`Pages::for_each_run`], for the bytes `range` of the page only.
    ///
    /// # Panics
    ///
    /// If there is no such page or byte.
    pub fn for_each_run_in(&self, page: usize, range: Range<usize>, mut f: impl FnMut(*mut u8, usize)) {
        assert!(page < self.count && range.end <= self.page_bytes, "no such page or byte");
        let first = self.segments.partition_point(|placed| placed.start + placed.bytes <= range.start);
        for placed in &self.segments[first..] {
            if placed.start >= range.end {
                break;
            }
            let (base, pattern) = placed.segment.piece(page);
            let from = range.start.saturating_sub(placed.start);
            let to = (range.end - placed.start).min(placed.bytes);
            pattern.for_each_in(from..to, |offset, len| f(base.wrapping_offset(offset), len));
        }
    }

    /// Bytes of a fragment of page 0 on average, at least 1.
    pub(crate) fn mean_run_bytes(&self) -> usize {
        if self.count == 0 {
            return 1;
        }
        let runs: usize = self.segments.iter().map(|placed| placed.segment.piece(0).1.runs().len()).sum();
        self.page_bytes / runs
    }

    pub(crate) fn regions(&self) -> impl Iterator<Item = &Region> {
        self.segments.iter().flat_map(|placed| placed.segment.regions())
    }
}

/// Where all of `regions` are; host memory if there are none.
fn common_place<'a>(mut regions: impl Iterator<Item = &'a Region>) -> Result<Place, MemError> {
    let place = regions.next().map_or(Place::Host, Region::place);
    regions.map(Region::place).find(|&other| other != place).map_or(Ok(place), |other| {
        let remedy = "pass pages that are all in one place";
        Err(MemError::WrongPlace { found: other.to_string(), expected: place.to_string(), remedy })
    })
}

const TOO_LARGE: MemError =
    MemError::TooComplex { what: "bytes of a page", value: usize::MAX, max: isize::MAX as usize };

/// Bytes of each piece of `segment`, which must have `count` pieces.
fn check_segment(segment: &Segment, count: usize) -> Result<usize, MemError> {
    let actual = segment.count();
    if actual != count {
        return Err(MemError::PagesMismatch { what: "number of pages", expected: count, actual });
    }
    let bytes = segment.check()?;
    if count > 0 && bytes == 0 {
        return Err(MemError::ZeroBytes { what: "a page" });
    }
    Ok(bytes)
}
