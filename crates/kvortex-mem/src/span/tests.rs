//! Patterns and pages against naive enumerations of their bytes.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Ids, Pages, Pattern, Piece, Region, Run, Segment};
use crate::device::RawStream;
use crate::error::MemError;
use proptest::collection::vec;
use proptest::prelude::*;

#[derive(Debug, Clone, PartialEq)]
struct Array {
    item: usize,
    shape: Vec<usize>,
    strides: Vec<isize>,
}

impl Array {
    fn pattern(&self) -> Pattern {
        Pattern::strided(self.item, &self.shape, &self.strides).unwrap()
    }

    /// The offset of every byte in C order.
    fn bytes(&self) -> Vec<isize> {
        let mut bases = vec![0isize];
        for (&count, &stride) in self.shape.iter().zip(&self.strides) {
            bases = bases.iter().flat_map(|base| (0..count as isize).map(move |i| base + i * stride)).collect();
        }
        bases.iter().flat_map(|base| (0..self.item as isize).map(move |byte| base + byte)).collect()
    }
}

/// Arrays with gaps, joined dimensions, negative and zero strides.
fn array() -> impl Strategy<Value = Array> {
    let dim = (
        prop_oneof![1 => Just(0usize), 19 => 1usize..5],
        prop_oneof![Just(0isize), -40isize..40, Just(4), Just(8), Just(-4), Just(16)],
    );
    (1usize..5, vec(dim, 0..4)).prop_map(|(item, dims)| {
        let (shape, strides) = dims.into_iter().unzip();
        Array { item, shape, strides }
    })
}

fn c_order(item: usize, shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![0; shape.len()];
    let mut next = item as isize;
    for (stride, &count) in strides.iter_mut().zip(shape).rev() {
        *stride = next;
        next *= count as isize;
    }
    strides
}

fn expand(runs: &[Run]) -> Vec<isize> {
    runs.iter().flat_map(|run| run.offset..run.end()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_pattern_has_the_bytes_of_its_array(array in array()) {
        let (pattern, bytes) = (array.pattern(), array.bytes());
        prop_assert_eq!(expand(pattern.runs()), bytes.clone());
        prop_assert_eq!(pattern.bytes(), bytes.len());
        let (low, high) = (bytes.iter().min(), bytes.iter().max());
        prop_assert_eq!(pattern.bounds(), low.map_or(0..0, |low| *low..high.unwrap() + 1));
        prop_assert!(pattern.runs().iter().all(|run| run.len > 0));
        prop_assert!(pattern.runs().windows(2).all(|pair| pair[0].end() != pair[1].offset), "neighbours are joined");
        let mut distinct = bytes.clone();
        distinct.sort_unstable();
        distinct.dedup();
        prop_assert_eq!(pattern.overlaps_itself(), distinct.len() < bytes.len());
    }

    #[test]
    fn a_dense_array_is_one_run(item in 1usize..9, shape in vec(1usize..6, 0..5)) {
        let pattern = Pattern::strided(item, &shape, &c_order(item, &shape)).unwrap();
        prop_assert_eq!(pattern, Pattern::contiguous(item * shape.iter().product::<usize>()));
    }
}

/// One segment of the model: the array of each page, and its region and base.
#[derive(Debug, Clone)]
struct Part {
    arrays: Vec<Array>,
    places: Vec<(usize, isize)>,
    form: Form,
}

#[derive(Debug, Clone)]
enum Form {
    List,
    /// With this stride.
    Table(isize),
    /// With the table's first base and stride.
    Picked(isize, isize, Arc<Ids>),
}

const REGION: usize = 4096;

impl Part {
    fn segment(&self, regions: &[Region]) -> Segment {
        // Pieces of one form share their pattern, as in life.
        let mut known: Vec<(Array, Arc<Pattern>)> = Vec::new();
        let mut pattern = |index: usize| {
            let array = &self.arrays[index];
            if let Some((_, pattern)) = known.iter().find(|(other, _)| other == array) {
                return Arc::clone(pattern);
            }
            known.push((array.clone(), Arc::new(array.pattern())));
            Arc::clone(&known[known.len() - 1].1)
        };
        let (region, first) = self.places[0];
        let (region, count) = (regions[region].clone(), self.places.len());
        match &self.form {
            Form::List => (),
            &Form::Table(stride) => return Segment::Table { region, pattern: pattern(0), first, stride, count },
            Form::Picked(first, stride, ids) => {
                let (first, stride, ids, pattern) = (*first, *stride, Arc::clone(ids), pattern(0));
                return Segment::Picked { region, pattern, first, stride, ids, table_count: 9 };
            }
        }
        let piece = |(index, &(region, offset)): (usize, &(usize, isize))| Piece {
            region: regions[region].clone(),
            offset,
            pattern: pattern(index),
        };
        Segment::List(self.places.iter().enumerate().map(piece).collect())
    }

    /// Region and offset of each byte of a page's piece.
    fn bytes(&self, page: usize) -> Vec<(usize, isize)> {
        let (region, base) = self.places[page];
        self.arrays[page].bytes().into_iter().map(|byte| (region, base + byte)).collect()
    }

    fn in_bounds(&self) -> bool {
        (0..self.places.len()).all(|page| self.bytes(page).iter().all(|&(_, at)| (0..REGION as isize).contains(&at)))
    }
}

fn table(pages: usize) -> impl Strategy<Value = Part> {
    let strides = prop_oneof![3 => -120isize..120, 1 => prop::sample::select(vec![0isize, 4, 8, 16, 32, 64, 128])];
    (array(), 0..3usize, 0isize..REGION as isize, strides).prop_map(move |(array, region, first, stride)| Part {
        arrays: vec![array; pages],
        places: (0..pages as isize).map(|page| (region, first + page * stride)).collect(),
        form: Form::Table(stride),
    })
}

/// One to three tables of which the same pieces are picked, sometimes one twice, often in one region and with one stride.
fn picked(pages: usize) -> impl Strategy<Value = Vec<Part>> {
    let strides = prop_oneof![3 => -120isize..120, 1 => prop::sample::select(vec![0isize, 4, 8, 16, 32, 64, 128])];
    let ids = prop_oneof![
        9 => Just((0u32..9).collect::<Vec<_>>()).prop_shuffle().prop_map(move |ids| ids[..pages].to_vec()),
        1 => vec(0u32..9, pages),
    ];
    let tables = vec(
        (
            array(),
            0..3usize,
            0isize..REGION as isize,
            prop_oneof![4 => Just(None), 1 => strides.clone().prop_map(Some)],
        ),
        1..4,
    );
    (ids, strides, tables).prop_map(|(ids, common, tables)| {
        let ids: Arc<Ids> = Arc::new(ids.into());
        let part = |(array, region, first, stride): (Array, usize, isize, Option<isize>)| {
            let stride = stride.unwrap_or(common);
            let places = ids.list().iter().map(|&id| (region, first + id as isize * stride)).collect();
            Part { arrays: vec![array; ids.list().len()], places, form: Form::Picked(first, stride, Arc::clone(&ids)) }
        };
        tables.into_iter().map(part).collect()
    })
}

/// Pieces of one array, or of two arrays of as many bytes.
fn list(pages: usize) -> impl Strategy<Value = Part> {
    (array(), any::<bool>(), vec((0..3usize, 0isize..REGION as isize), pages)).prop_map(
        move |(array, mixed, places)| {
            let dense = Array { item: 1, shape: vec![array.bytes().len()], strides: vec![1] };
            let arrays =
                (0..pages).map(|page| if mixed && page % 2 == 1 { dense.clone() } else { array.clone() }).collect();
            Part { arrays, places, form: Form::List }
        },
    )
}

fn parts() -> impl Strategy<Value = Vec<Part>> {
    (1usize..7).prop_flat_map(|pages| {
        let one = prop_oneof![3 => table(pages).boxed(), 2 => list(pages).boxed()];
        let mixed = (picked(pages), vec(one.clone(), 0..2)).prop_map(|(picked, others)| [picked, others].concat());
        prop_oneof![3 => vec(one, 1..4).boxed(), 2 => picked(pages).boxed(), 1 => mixed.boxed()]
    })
}

fn regions() -> Vec<Region> {
    (0..3).map(|_| Region::from_vec(vec![0; REGION])).collect()
}

fn build(parts: &[Part], regions: &[Region]) -> Result<Pages, MemError> {
    Pages::new(parts.iter().map(|part| part.segment(regions)).collect())
}

fn page_bytes(parts: &[Part], page: usize) -> Vec<(usize, isize)> {
    parts.iter().flat_map(|part| part.bytes(page)).collect()
}

/// Addresses of the bytes `range` of a page.
fn addresses(pages: &Pages, page: usize, range: std::ops::Range<usize>) -> Vec<usize> {
    let mut found = Vec::new();
    pages.for_each_run_in(page, range, |addr, len| {
        assert!(len > 0);
        found.extend((0..len).map(|byte| addr as usize + byte));
    });
    found
}

/// All pairs of pages that share a byte.
fn brute_force(parts: &[Part], pages: usize) -> Vec<(usize, usize)> {
    let mut users: HashMap<(usize, isize), Vec<usize>> = HashMap::new();
    for page in 0..pages {
        page_bytes(parts, page).into_iter().for_each(|byte| users.entry(byte).or_default().push(page));
    }
    let mut pairs = Vec::new();
    for users in users.values() {
        for (index, &first) in users.iter().enumerate() {
            pairs.extend(users[index + 1..].iter().map(|&second| (first, second)));
        }
    }
    pairs
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, max_global_rejects: 1 << 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pages_have_the_bytes_of_their_pieces(parts in parts(), cut in any::<(prop::sample::Index, prop::sample::Index)>()) {
        let (regions, count) = (regions(), parts[0].places.len());
        let empty = parts.iter().any(|part| part.bytes(0).is_empty());
        let pages = match build(&parts, &regions) {
            Ok(pages) => pages,
            Err(MemError::ZeroBytes { .. }) => { prop_assert!(empty); return Ok(()) }
            Err(MemError::Bounds { .. }) => { prop_assert!(empty || !parts.iter().all(Part::in_bounds)); return Ok(()) }
            Err(other) => panic!("{other}"),
        };
        prop_assert!(!empty && parts.iter().all(Part::in_bounds), "bytes out of bounds accepted");
        prop_assert_eq!(pages.count(), count);
        let (from, to) = (cut.0.index(pages.page_bytes()), cut.1.index(pages.page_bytes() + 1));
        for page in 0..count {
            let place = |(region, at): (usize, isize)| regions[region].addr().wrapping_add_signed(at);
            let expected: Vec<usize> = page_bytes(&parts, page).into_iter().map(place).collect();
            prop_assert_eq!(pages.page_bytes(), expected.len());
            prop_assert_eq!(addresses(&pages, page, 0..expected.len()), expected.clone());
            if from < to {
                prop_assert_eq!(addresses(&pages, page, from..to), expected[from..to].to_vec());
            }
        }
    }

    #[test]
    fn overlap_is_what_brute_force_finds(parts in parts()) {
        let Ok(pages) = build(&parts, &regions()) else { return Err(TestCaseError::reject("not valid")) };
        let expected = brute_force(&parts, pages.count());
        match pages.first_overlap() {
            Some(pair) => prop_assert!(expected.contains(&pair), "{pair:?} of {expected:?}"),
            None => prop_assert!(expected.is_empty(), "overlooked {expected:?}"),
        }
        prop_assert_eq!(pages.first_overlap(), pages.first_overlap());
    }
}

#[test]
fn pieces_that_a_table_lacks_are_refused() {
    let region = Region::from_vec(vec![0; 100]);
    let picked = |first, stride, ids: &[u32], table_count| {
        let (region, pattern) = (region.clone(), Arc::new(Pattern::contiguous(10)));
        Pages::new(vec![Segment::Picked {
            region,
            pattern,
            first,
            stride,
            ids: Arc::new(ids.to_vec().into()),
            table_count,
        }])
    };
    assert!(picked(0, 10, &[9, 0, 4], 10).is_ok());
    assert!(picked(90, -10, &[9, 0, 4], 10).is_ok());
    assert!(picked(-50, 10, &[9, 5], 10).is_ok(), "pieces that are not picked may lie anywhere");
    assert_eq!(picked(0, 10, &[], 10).unwrap().count(), 0);
    let missing = picked(0, 10, &[3, 10], 10).unwrap_err();
    assert!(matches!(missing, MemError::OutOfRange { index: 10, count: 10, .. }), "{missing}");
    for (first, stride, ids) in
        [(1, 10, &[9u32][..]), (-1, 10, &[0]), (0, 10, &[3, 11, 5]), (0, isize::MAX, &[u32::MAX])]
    {
        let error = picked(first, stride, ids, usize::MAX).unwrap_err();
        assert!(matches!(error, MemError::Bounds { len: 100, .. }), "{first} {stride}: {error}");
    }
    assert_eq!(picked(0, 10, &[4, 7, 1, 7, 4], 10).unwrap().first_overlap(), Some((0, 4)));
    assert_eq!(picked(0, 9, &[4, 7, 5], 10).unwrap().first_overlap(), Some((0, 2)));
    assert_eq!(picked(0, 9, &[4, 7, 1], 10).unwrap().first_overlap(), None);
}

fn one_table(region: &Region, pattern: Pattern, first: isize, stride: isize, count: usize) -> Segment {
    Segment::Table { region: region.clone(), pattern: Arc::new(pattern), first, stride, count }
}

#[test]
fn bounds_are_checked_at_both_ends() {
    let region = Region::from_vec(vec![0; 100]);
    let table =
        |first, stride, count| Pages::new(vec![one_table(&region, Pattern::contiguous(10), first, stride, count)]);
    assert!(table(0, 10, 10).is_ok());
    assert!(table(90, -10, 10).is_ok());
    for (first, stride, count) in
        [(1, 10, 10), (0, 10, 11), (-1, 10, 2), (89, -10, 10), (0, isize::MAX, 2), (isize::MIN, 0, 1)]
    {
        let error = table(first, stride, count).unwrap_err();
        assert!(matches!(error, MemError::Bounds { len: 100, .. }), "{first} {stride} {count}: {error}");
    }
    assert!(table(0, isize::MAX, 1).is_ok(), "the stride of one page is not used");
}

#[test]
fn pieces_that_do_not_fit_each_other_are_refused() {
    let region = Region::from_vec(vec![0; 100]);
    let piece = |len| Piece { region: region.clone(), offset: 0, pattern: Arc::new(Pattern::contiguous(len)) };
    let mixed = Pages::new(vec![Segment::List(vec![piece(8), piece(9)])]).unwrap_err();
    assert!(matches!(mixed, MemError::PagesMismatch { expected: 8, actual: 9, .. }), "{mixed}");
    let counts = vec![Segment::List(vec![piece(8)]), Segment::List(vec![piece(8), piece(8)])];
    let error = Pages::new(counts).unwrap_err();
    assert!(matches!(error, MemError::PagesMismatch { expected: 1, actual: 2, .. }), "{error}");
    assert!(matches!(Pages::new(vec![]), Err(MemError::ZeroBytes { .. })));
    assert!(matches!(Pages::new(vec![Segment::List(vec![piece(0)])]), Err(MemError::ZeroBytes { .. })));
    let none = Pages::new(vec![Segment::List(vec![])]).unwrap();
    assert_eq!((none.count(), none.page_bytes(), none.first_overlap()), (0, 0, None));
}

#[test]
fn absurd_arrays_are_refused_before_anything_is_allocated() {
    let strided = |shape: &[usize], strides: &[isize]| Pattern::strided(2, shape, strides);
    let complex = |result: Result<Pattern, MemError>| matches!(result, Err(MemError::TooComplex { .. }));
    assert!(complex(strided(&[usize::MAX], &[0])));
    assert!(complex(strided(&[1 << 40, 1 << 40], &[0, 0])));
    assert!(complex(strided(&[2, 2], &[isize::MAX, isize::MIN])));
    assert!(complex(strided(&[Pattern::MAX_RUNS + 1], &[4])));
    assert!(matches!(strided(&[1, 2], &[2]), Err(MemError::PagesMismatch { .. })));
    assert_eq!(strided(&[usize::MAX, 0], &[isize::MIN, 2]).unwrap().bytes(), 0);
}

#[test]
#[should_panic(expected = "no such page")]
fn a_page_that_does_not_exist_has_no_address() {
    let region = Region::from_vec(vec![0; 100]);
    let pages = Pages::new(vec![one_table(&region, Pattern::contiguous(10), 0, 10, 3)]).unwrap();
    pages.for_each_run(3, |_, _| ());
}

/// Common layouts with more fragments than anyone wants to sort must be decided by their strides.
#[test]
fn common_layouts_are_decided_without_listing_their_fragments() {
    let (layers, count, piece) = (60usize, 8192usize, 4096usize);
    let total = layers * count * piece;
    // SAFETY: no byte of this region is ever used: only addresses are compared.
    let region = unsafe { Region::from_raw(std::ptr::NonNull::dangling(), total, true, Box::new(())) };
    let (inner, outer) = (piece as isize, (count * piece) as isize);
    let layers_outside = Pattern::strided(piece, &[layers], &[outer]).unwrap();
    let one = one_table(&region, layers_outside, 0, inner, count);
    let keys_and_values =
        [0, inner].map(|first| one_table(&region, Pattern::contiguous(piece), first, 2 * inner, count));
    let per_layer =
        (0..layers).map(|layer| one_table(&region, Pattern::contiguous(piece), layer as isize * outer, inner, count));
    let ids: Arc<Ids> = Arc::new((0..count as u32).rev().filter(|id| id % 3 != 0).collect::<Vec<_>>().into());
    let pick = |segment: &Segment| match segment.clone() {
        Segment::Table { region, pattern, first, stride, count: table_count } => {
            Segment::Picked { region, pattern, first, stride, ids: Arc::clone(&ids), table_count }
        }
        other => other,
    };
    let tables = [vec![one], keys_and_values.to_vec(), per_layer.collect()];
    let picked = tables.each_ref().map(|segments| segments.iter().map(pick).collect::<Vec<_>>());
    for segments in tables.into_iter().chain(picked) {
        let pages = Pages::new(segments).unwrap();
        // The quickest of several, since other work may take the processor meanwhile.
        let quickest = (0..5).map(|_| {
            let start = std::time::Instant::now();
            assert_eq!(pages.first_overlap(), None);
            start.elapsed()
        });
        let quickest = quickest.min().unwrap();
        assert!(quickest < std::time::Duration::from_millis(20), "{quickest:?}");
    }
}

#[test]
fn regions_tell_and_keep_what_they_are() {
    let region = Region::from_vec((0..10).collect());
    region.write(8, &[1, 2]).unwrap();
    assert_eq!(region.clone().to_vec(), [0, 1, 2, 3, 4, 5, 6, 7, 1, 2]);
    assert!(matches!(region.write(9, &[1, 2]), Err(MemError::Bounds { start: 9, end: 11, len: 10 })));
    assert!(matches!(region.write(usize::MAX, &[1]), Err(MemError::Bounds { .. })));
    let read_only = Region::from_vec_read_only(vec![5; 3]);
    assert!(matches!(read_only.write(0, &[1]), Err(MemError::ReadOnly)));
    let pages = |region: &Region| Pages::new(vec![one_table(region, Pattern::contiguous(3), 0, 3, 1)]).unwrap();
    assert!(pages(&region).is_writable() && !pages(&read_only).is_writable());
}

#[test]
fn pages_remember_their_stream() {
    let pages = Pages::contiguous(Region::from_vec(vec![0; 8]), 2).unwrap();
    assert_eq!(pages.stream(), None);
    let pages = pages.in_stream(RawStream(7));
    assert_eq!((pages.stream(), pages.count(), pages.first_overlap()), (Some(RawStream(7)), 2, None));
}
