//! Do pages share bytes?
//!
//! Answered in three steps, each only if the one before could not: bounds of whole segments; the strides of segments of one
//! form; sorted fragments.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use super::ids::Ids;
use super::pages::{Placed, Segment, picked_base};
use super::pattern::{Pattern, Run};
use crate::sync::Arc;

type Pair = (usize, usize);

/// Two pages that share a byte, or one twice that shares one with itself.
pub(super) fn first_overlap(segments: &[Placed], count: usize) -> Option<Pair> {
    if count == 0 {
        return None;
    }
    if let Some(page) = segments.iter().find_map(|placed| overlapping_piece(&placed.segment)) {
        return Some((page, page));
    }
    if let Some(pages) = segments.iter().find_map(|placed| picked_twice(&placed.segment)) {
        return Some(pages);
    }
    let mut bounded: Vec<(Range<usize>, &Segment)> =
        segments.iter().map(|placed| (bounds(&placed.segment), &placed.segment)).collect();
    bounded.sort_unstable_by_key(|(bounds, _)| bounds.start);
    clusters(&bounded).into_iter().find_map(|cluster| cluster_overlap(&cluster, count))
}

/// A piece that overlaps itself.
fn overlapping_piece(segment: &Segment) -> Option<usize> {
    match segment {
        Segment::Table { pattern, .. } | Segment::Picked { pattern, .. } => pattern.overlaps_itself().then_some(0),
        Segment::List(pieces) => {
            let known = |index: usize| index > 0 && Arc::ptr_eq(&pieces[index].pattern, &pieces[index - 1].pattern);
            (0..pieces.len()).find(|&index| !known(index) && pieces[index].pattern.overlaps_itself())
        }
    }
}

/// Two pages that are one piece of a table.
fn picked_twice(segment: &Segment) -> Option<Pair> {
    match segment {
        Segment::Picked { ids, .. } => ids.twice(),
        Segment::Table { .. } | Segment::List(_) => None,
    }
}

/// The addresses from the first to the last byte of a segment that has pieces.
fn bounds(segment: &Segment) -> Range<usize> {
    let reach = |base: *mut u8, pattern: &Pattern| {
        let bounds = pattern.bounds();
        (base as usize).wrapping_add_signed(bounds.start)..(base as usize).wrapping_add_signed(bounds.end)
    };
    let span = |index: usize| {
        let (base, pattern) = segment.piece(index);
        reach(base, pattern)
    };
    match segment {
        Segment::Picked { region, pattern, first, stride, ids, .. } => {
            let (lowest, highest) = ids.extremes().unwrap_or_default();
            let of = |id| reach(picked_base(region, *first, *stride, id), pattern);
            join(of(lowest), of(highest))
        }
        Segment::Table { count, .. } => join(span(0), span(count - 1)),
        Segment::List(pieces) => (1..pieces.len()).map(span).fold(span(0), join),
    }
}

fn join(a: Range<usize>, b: Range<usize>) -> Range<usize> {
    a.start.min(b.start)..a.end.max(b.end)
}

/// Groups segments, sorted by start, so that segments of different groups lie apart.
fn clusters<'a>(sorted: &[(Range<usize>, &'a Segment)]) -> Vec<Vec<&'a Segment>> {
    let mut groups: Vec<Vec<&Segment>> = Vec::new();
    let mut end = 0;
    for (bounds, segment) in sorted {
        match groups.last_mut() {
            Some(group) if bounds.start < end => group.push(segment),
            _ => groups.push(vec![segment]),
        }
        end = end.max(bounds.end);
    }
    groups
}

fn cluster_overlap(segments: &[&Segment], count: usize) -> Option<Pair> {
    if Comb::of(segments, count).is_some_and(|comb| comb.lies_apart()) {
        return None;
    }
    exact(segments, count)
}

/// Runs that are repeated at the same shifts: at 0 and at shifts that differ by at least `gap`, up to `reach`.
struct Comb {
    /// Addresses of the runs at shift 0.
    runs: Vec<Range<usize>>,
    gap: usize,
    reach: usize,
}

impl Comb {
    fn of(segments: &[&Segment], count: usize) -> Option<Comb> {
        match segments {
            [Segment::List(pieces)] => {
                let shared = &pieces[0].pattern;
                let same = pieces.iter().all(|piece| Arc::ptr_eq(&piece.pattern, shared));
                same.then(|| Comb::of_list(segments[0], pieces.len()))
            }
            [Segment::Picked { .. }, ..] => Comb::of_picked(segments),
            _ => Comb::of_tables(segments, count),
        }
    }

    /// Tables of one stride of which the same pieces are picked, none twice.
    fn of_picked(segments: &[&Segment]) -> Option<Comb> {
        let mut runs = Vec::new();
        let mut common: Option<(isize, &Arc<Ids>)> = None;
        for segment in segments {
            let Segment::Picked { region, pattern, first, stride, ids, .. } = segment else { return None };
            let (shared, known) = *common.get_or_insert((*stride, ids));
            if shared != *stride || !(Arc::ptr_eq(known, ids) || known.list() == ids.list()) {
                return None;
            }
            let (lowest, highest) = ids.extremes()?;
            let id = if *stride < 0 { highest } else { lowest };
            runs.extend(runs_at(picked_base(region, *first, *stride, id) as usize, pattern));
        }
        let (stride, ids) = common?;
        let (lowest, highest) = ids.extremes()?;
        let gap = if ids.list().len() == 1 { usize::MAX } else { stride.unsigned_abs() };
        // The product is in bounds of a region.
        Some(Comb { runs, gap, reach: (highest - lowest) as usize * stride.unsigned_abs() })
    }

    fn of_list(segment: &Segment, count: usize) -> Comb {
        let mut bases: Vec<usize> = (0..count).map(|index| segment.piece(index).0 as usize).collect();
        bases.sort_unstable();
        let gap = bases.windows(2).map(|pair| pair[1] - pair[0]).min().unwrap_or(usize::MAX);
        let reach = bases[count - 1] - bases[0];
        Comb { runs: runs_at(bases[0], segment.piece(0).1), gap, reach }
    }

    /// Tables of one stride. The sign of a stride only says which page is which, not where the bytes are.
    fn of_tables(segments: &[&Segment], count: usize) -> Option<Comb> {
        let mut runs = Vec::new();
        let mut common = None;
        for segment in segments {
            let Segment::Table { stride, .. } = segment else {
                return None;
            };
            if *common.get_or_insert(stride.unsigned_abs()) != stride.unsigned_abs() {
                return None;
            }
            let lowest = if *stride < 0 { count - 1 } else { 0 };
            let (base, pattern) = segment.piece(lowest);
            runs.extend(runs_at(base as usize, pattern));
        }
        let gap = if count == 1 { usize::MAX } else { common? };
        // With one page there is no shift but 0; the product of the others is in bounds of a region.
        let reach = if count == 1 { 0 } else { gap * (count - 1) };
        Some(Comb { runs, gap, reach })
    }

    /// True only if no two runs share a byte at any two shifts. False says nothing.
    ///
    /// Runs are taken together as long as they span at most one gap, so that no shift brings such a tooth onto itself; teeth
    /// must then lie further apart than the largest shift.
    fn lies_apart(mut self) -> bool {
        self.runs.sort_unstable_by_key(|run| run.start);
        let mut runs = self.runs.iter().peekable();
        let mut swept = 0;
        while let Some(first) = runs.next() {
            if first.start < swept || first.len() > self.gap {
                return false;
            }
            let mut end = first.end;
            while let Some(run) = runs.next_if(|run| run.end - first.start <= self.gap) {
                if run.start < end {
                    return false;
                }
                end = run.end;
            }
            swept = end.saturating_add(self.reach);
        }
        true
    }
}

fn runs_at(base: usize, pattern: &Pattern) -> Vec<Range<usize>> {
    let address = |offset: isize| base.wrapping_add_signed(offset);
    pattern.runs().iter().map(|run| address(run.offset)..address(run.end())).collect()
}

/// Fragments that are listed and sorted at a time; few in tests, so that windows are halved there.
const BATCH: usize = if cfg!(test) { 8 } else { 1 << 20 };

/// The answer from all fragments, sorted by address.
fn exact(segments: &[&Segment], count: usize) -> Option<Pair> {
    let mut sorted: HashMap<*const Pattern, Cow<'_, [Run]>> = HashMap::new();
    let pieces = || segments.iter().flat_map(|segment| (0..count).map(|page| (page, segment.piece(page))));
    for (_, (_, pattern)) in pieces() {
        sorted.entry(Arc::as_ptr(pattern)).or_insert_with(|| pattern.sorted_runs());
    }
    let pieces = pieces().map(|(page, (base, pattern))| Spread {
        page,
        base: base as usize,
        runs: &sorted[&Arc::as_ptr(pattern)],
    });
    let window = segments.iter().map(|segment| bounds(segment)).reduce(join)?;
    search(&pieces.collect::<Vec<_>>(), window)
}

/// One piece's runs, by ascending offset and apart from each other.
struct Spread<'a> {
    page: usize,
    base: usize,
    runs: &'a [Run],
}

impl Spread<'_> {
    /// The runs that have bytes in `window`.
    fn within(&self, window: &Range<usize>) -> &[Run] {
        let first = self.runs.partition_point(|run| self.base.wrapping_add_signed(run.end()) <= window.start);
        let end = self.runs.partition_point(|run| self.base.wrapping_add_signed(run.offset) < window.end);
        &self.runs[first..end.max(first)]
    }

    /// Start, end and page of the runs that have bytes in `window`, cut to it.
    fn clipped<'a>(&'a self, window: &'a Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> + 'a {
        self.within(window).iter().map(|run| {
            let start = self.base.wrapping_add_signed(run.offset).max(window.start);
            (start, self.base.wrapping_add_signed(run.end()).min(window.end), self.page)
        })
    }
}

/// Two pages that share a byte of `window`. Windows with many fragments are halved, so that few are listed at a time.
fn search(pieces: &[Spread<'_>], window: Range<usize>) -> Option<Pair> {
    let fragments: usize = pieces.iter().map(|piece| piece.within(&window).len()).sum();
    if fragments > BATCH && window.len() > BATCH {
        let middle = window.start + window.len() / 2;
        return search(pieces, window.start..middle).or_else(|| search(pieces, middle..window.end));
    }
    // One fragment more than the window has bytes is enough to find two that share one.
    let enough = window.len().saturating_add(1);
    let mut runs: Vec<_> = pieces.iter().flat_map(|piece| piece.clipped(&window)).take(enough).collect();
    runs.sort_unstable();
    let neighbours = runs.windows(2).find(|pair| pair[1].0 < pair[0].1)?;
    let (first, second) = (neighbours[0].2, neighbours[1].2);
    Some((first.min(second), first.max(second)))
}
