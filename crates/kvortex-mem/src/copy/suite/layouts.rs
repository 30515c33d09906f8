//! Layouts of pages, each with a second, naive account of where every byte lies.

use std::ops::Range;

use crate::span::{Pages, Pattern, Piece, Region, Segment};
use crate::sync::Arc;

/// Pages of one layout.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) name: &'static str,
    /// Lengths of the regions in bytes.
    pub(super) regions: Vec<usize>,
    pub(super) parts: Vec<Part>,
}

/// One segment: the same strided array for every page.
#[derive(Debug, Clone)]
pub(super) struct Part {
    item: usize,
    shape: Vec<usize>,
    strides: Vec<isize>,
    /// Region and base of each page's piece.
    places: Vec<(usize, isize)>,
    form: Form,
}

/// How a segment is passed.
#[derive(Debug, Clone)]
enum Form {
    /// As a table; the places must fit.
    Table,
    List,
    /// As pieces of a table with this stride, by their numbers; the places must fit.
    Picked(isize, Vec<u32>),
}

impl Layout {
    pub(super) fn count(&self) -> usize {
        self.parts[0].places.len()
    }

    pub(super) fn page_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.item * part.shape.iter().product::<usize>()).sum()
    }

    pub(super) fn pages(&self, regions: &[Region]) -> Pages {
        let segments = self.parts.iter().map(|part| part.segment(regions)).collect();
        Pages::new(segments).expect("the layouts of the suite are valid")
    }

    /// Calls `f` with the region and the bytes' offsets of each item of a page in order.
    pub(super) fn for_each_item(&self, page: usize, mut f: impl FnMut(usize, Range<usize>)) {
        for part in &self.parts {
            let (region, base) = part.places[page];
            part.for_each_item(base, 0, &mut |at| f(region, at as usize..at as usize + part.item));
        }
    }
}

impl Part {
    fn segment(&self, regions: &[Region]) -> Segment {
        let pattern = Pattern::strided(self.item, &self.shape, &self.strides).expect("a valid pattern");
        let pattern = Arc::new(pattern);
        let (region, first) = self.places[0];
        let region = regions[region].clone();
        match &self.form {
            Form::Table => {
                let stride = self.places.get(1).map_or(0, |&(_, second)| second - first);
                Segment::Table { region, pattern, first, stride, count: self.places.len() }
            }
            Form::List => self.list(regions, &pattern),
            Form::Picked(stride, ids) => {
                let first = first - stride * ids[0] as isize;
                let table_count = ids.iter().max().map_or(0, |&id| id as usize + 1);
                Segment::Picked {
                    region,
                    pattern,
                    first,
                    stride: *stride,
                    ids: Arc::new(ids.clone().into()),
                    table_count,
                }
            }
        }
    }

    fn list(&self, regions: &[Region], pattern: &Arc<Pattern>) -> Segment {
        let piece = |&(region, offset): &(usize, isize)| {
            let (region, pattern) = (regions[region].clone(), Arc::clone(pattern));
            Piece { region, offset, pattern }
        };
        Segment::List(self.places.iter().map(piece).collect())
    }

    fn for_each_item(&self, at: isize, dim: usize, f: &mut impl FnMut(isize)) {
        if dim == self.shape.len() {
            return f(at);
        }
        for index in 0..self.shape[dim] {
            self.for_each_item(at + index as isize * self.strides[dim], dim + 1, f);
        }
    }
}

/// Places of a table in region `region`.
fn at(region: usize, first: isize, stride: isize, count: usize) -> Vec<(usize, isize)> {
    (0..count as isize).map(|index| (region, first + index * stride)).collect()
}

fn part(item: usize, shape: &[usize], strides: &[isize], places: Vec<(usize, isize)>) -> Part {
    Part { item, shape: shape.into(), strides: strides.into(), places, form: Form::Table }
}

fn list(part: Part) -> Part {
    Part { form: Form::List, ..part }
}

/// The pieces `ids` of a table in region `region`.
fn picked(item: usize, (shape, strides): (&[usize], &[isize]), (region, first, stride): Base, ids: &[u32]) -> Part {
    let places = ids.iter().map(|&id| (region, first + stride * id as isize)).collect();
    Part { form: Form::Picked(stride, ids.into()), ..part(item, shape, strides, places) }
}

/// Region, offset of piece 0 and stride of a table.
type Base = (usize, isize, isize);

/// `count` numbers below `table`, none twice and in no order; `table` is no multiple of 7919.
fn shuffled(table: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|index| (index * 7919 + 3) % table).collect()
}

fn layout(name: &'static str, regions: &[usize], parts: Vec<Part>) -> Layout {
    Layout { name, regions: regions.into(), parts }
}

pub(super) fn all() -> Vec<Layout> {
    let mut all = small();
    all.extend([1, 4, 8, 16, 32].map(|item| {
        let (inner, page) = (2 * item as isize + 1, 60 * item as isize);
        layout("single items", &[60 * item * 7], vec![part(item, &[19], &[inner], at(0, 0, page, 7))])
    }));
    all.extend(paged());
    all.extend(large());
    all
}

fn small() -> Vec<Layout> {
    vec![
        layout("one byte", &[1], vec![part(1, &[], &[], at(0, 0, 0, 1))]),
        layout("odd sizes at odd addresses", &[80_000], vec![part(4099, &[], &[], at(0, 3, 4111, 17))]),
        layout("pages in descending order", &[80_000], vec![part(1, &[4099], &[1], at(0, 70_001, -4111, 17))]),
        layout("items with gaps", &[9_000], vec![part(2, &[3, 5, 7], &[300, 60, 4], at(0, 1, 901, 9))]),
        layout("negative strides", &[4_096], vec![part(3, &[4, 6], &[-64, -5], at(0, 230, 257, 15))]),
        layout("a transposed matrix", &[64 * 128 * 2], vec![part(2, &[64, 128], &[2, 128], at(0, 0, 0, 1))]),
        layout("heads outside tokens", &[16 * 4096], vec![part(2, &[16, 8], &[4096, 2], at(0, 0, 16, 200))]),
        layout("pieces in several regions", &[5_000, 77, 5_001], vec![scattered()]),
        layout("keys and values apart", &[40_000, 40_000], keys_and_values()),
        layout("keys and values interleaved", &[40_000], interleaved()),
        layout("100,000 pages", &[2_400_007], vec![part(3, &[2, 2], &[9, 4], at(0, 5, 24, 100_000))]),
    ]
}

fn large() -> Vec<Layout> {
    const MIB: usize = 1 << 20;
    let half = (MIB + MIB / 2) as isize;
    let pieces = vec![part(MIB + 1, &[3], &[half], at(0, 9, 4 * half, 3)), list(part(777, &[], &[], at(1, 0, 778, 3)))];
    let many = list(part(256 << 10, &[], &[], at(0, 1, (256 << 10) + 64, 40)));
    let rows = part(4096, &[60], &[40 * 4096], at(0, 0, 4096, 40));
    vec![
        layout("pages of three fragments and more than a grain", &[20 * MIB, 4096], pieces),
        layout("many pages for many threads", &[11 * MIB], vec![many]),
        layout("layers outside pages", &[60 * 40 * 4096], vec![rows]),
        layout(
            "fragments of 8 MiB",
            &[16 * MIB + 20],
            vec![part(8 * MIB + 3, &[], &[], at(0, 5, (8 * MIB) as isize + 7, 2))],
        ),
    ]
}

/// Paged memory of an engine, by block id.
fn paged() -> Vec<Layout> {
    let (block, bytes) = ((&[16usize, 40][..], &[80isize, 2][..]), 16 * 80);
    let ids = shuffled(64, 37);
    let apart = vec![picked(2, block, (0, 0, bytes), &ids), picked(2, block, (1, 2, bytes), &ids)];
    let halves = (&[2usize, 16, 40][..], &[64 * bytes, 80, 2][..]);
    let crossed = (&[2usize, 3, 16, 40][..], &[3 * 64 * bytes, 64 * bytes, 80, 2][..]);
    let (packed, gaps) = ((&[2usize, 640][..], &[2 * 64 * bytes, 2][..]), (&[7usize][..], &[3isize][..]));
    let layers = (0..2).map(|layer| picked(2, packed, (0, layer * 64 * bytes, bytes), &ids)).collect();
    let total = 64 * bytes as usize;
    vec![
        layout("blocks by id, keys and values apart", &[total, total + 2], apart),
        layout("blocks by id inside keys and values", &[2 * total], vec![picked(2, halves, (0, 0, bytes), &ids)]),
        layout("blocks by id inside all layers", &[6 * total], vec![picked(2, crossed, (0, 0, bytes), &ids)]),
        layout("blocks by id in layers side by side", &[4 * total], layers),
        layout("one block by id", &[total], vec![picked(1, (&[1000], &[1]), (0, 7, bytes), &[41])]),
        layout("blocks by id backwards, with gaps", &[4000], vec![picked(1, gaps, (0, 3900, -21), &shuffled(180, 99))]),
        layout("20,000 blocks by id", &[800_000], vec![picked(4, (&[6], &[4]), (0, 0, 32), &shuffled(25_000, 20_000))]),
    ]
}

fn scattered() -> Part {
    list(part(7, &[3], &[11], vec![(2, 4_971), (0, 0), (1, 48), (0, 4_000), (2, 1), (1, 0)]))
}

fn keys_and_values() -> Vec<Part> {
    vec![part(2, &[8, 33], &[128, 2], at(0, 2, 1024, 30)), list(part(2, &[8, 33], &[128, 2], at(1, 30_000, -1024, 30)))]
}

fn interleaved() -> Vec<Part> {
    vec![part(2, &[100], &[2], at(0, 0, 400, 90)), part(2, &[100], &[2], at(0, 200, 400, 90))]
}
