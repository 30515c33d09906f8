//! Which pages unfinished copies read or write.

use std::ops::Range;

use crate::span::{Ids, Pages, Pattern, Run, Segment};
use crate::sync::Arc;

/// What a copy does with its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Reads,
    Writes,
}

/// The bytes of some pages, in few words: equal stretches at equal distances are not listed.
#[derive(Debug)]
pub(super) struct Access {
    /// By their lowest address.
    spans: Vec<Span>,
}

#[derive(Debug)]
struct Span {
    /// From the first to the last byte.
    bounds: Range<usize>,
    form: Form,
}

#[derive(Debug)]
enum Form {
    /// `len` bytes from `base + id * stride`, for each id.
    Comb { base: usize, len: usize, stride: isize, ids: Arc<[u32]> },
    /// Ascending.
    Listed(Vec<Range<usize>>),
}

/// Patterns with more stretches than this are taken for everything between their ends.
const MAX_TEETH: usize = 64;

impl Access {
    /// The bytes of the pages `wanted`.
    pub(super) fn of(pages: &Pages, wanted: impl Iterator<Item = usize>) -> Access {
        let wanted: Vec<u32> = wanted.map(|page| page as u32).collect();
        let all = sorted(wanted.clone());
        let mut picked: Vec<(*const Ids, Arc<[u32]>)> = Vec::new();
        let mut spans = Vec::new();
        for (segment, _) in pages.segments().filter(|(segment, _)| segment.count() > 0 && !wanted.is_empty()) {
            match segment {
                Segment::Table { region, pattern, first, stride, .. } => {
                    let base = region.base().wrapping_offset(*first) as usize;
                    combs(&mut spans, (base, *stride), pattern, &all);
                }
                Segment::Picked { region, pattern, first, stride, ids, .. } => {
                    let key = Arc::as_ptr(ids);
                    let known = picked.iter().find(|(other, _)| *other == key).map(|(_, list)| Arc::clone(list));
                    let list = known.unwrap_or_else(|| {
                        let list = sorted(wanted.iter().map(|&page| ids.list()[page as usize]).collect());
                        picked.push((key, Arc::clone(&list)));
                        list
                    });
                    let base = region.base().wrapping_offset(*first) as usize;
                    combs(&mut spans, (base, *stride), pattern, &list);
                }
                Segment::List(_) => spans.push(listed(segment, &all)),
            }
        }
        spans.sort_unstable_by_key(|span| span.bounds.start);
        Access { spans }
    }

    /// True if a byte belongs to both. It may be true without one where pages of different forms lie between each other;
    /// false is always right.
    fn meets(&self, other: &Access) -> bool {
        let mut last = None;
        self.spans.iter().any(|span| {
            let below = other.spans.partition_point(|other| other.bounds.start < span.bounds.end);
            other.spans[..below]
                .iter()
                .filter(|other| other.bounds.end > span.bounds.start)
                .any(|other| span.meets(other, &mut last))
        })
    }
}

/// Whether two lists of ids have one in common, for the lists that were last compared.
type Compared = Option<(*const u32, *const u32, bool)>;

impl Span {
    fn meets(&self, other: &Span, last: &mut Compared) -> bool {
        if let (Form::Comb { base, len, stride, ids }, Form::Comb { base: at, len: longer, stride: pace, ids: others }) =
            (&self.form, &other.form)
            && (base, stride) == (at, pace)
            && (*len).max(*longer) <= stride.unsigned_abs()
        {
            let (one, two) = (ids.as_ptr(), others.as_ptr());
            if let Some((a, b, known)) = *last
                && (a, b) == (one, two)
            {
                return known;
            }
            let known = share_one(ids, others);
            *last = Some((one, two, known));
            return known;
        }
        ranges_meet(&self.ranges(), &other.ranges())
    }

    fn ranges(&self) -> Vec<Range<usize>> {
        match &self.form {
            Form::Listed(ranges) => ranges.clone(),
            Form::Comb { base, len, stride, ids } => {
                let at = |id: &u32| base.wrapping_add_signed(stride * *id as isize);
                let mut ranges: Vec<_> = ids.iter().map(|id| at(id)..at(id) + len).collect();
                ranges.sort_unstable_by_key(|range| range.start);
                ranges
            }
        }
    }
}

fn sorted(mut ids: Vec<u32>) -> Arc<[u32]> {
    ids.sort_unstable();
    ids.dedup();
    ids.into()
}

/// Adds the stretches of `pattern` at every piece; neighbours that one stride covers go together.
fn combs(spans: &mut Vec<Span>, (origin, stride): (usize, isize), pattern: &Pattern, ids: &Arc<[u32]>) {
    let (&lowest, &highest) = match (ids.first(), ids.last()) {
        (Some(first), Some(last)) => (first, last),
        _ => return,
    };
    for tooth in teeth(pattern, stride.unsigned_abs()) {
        let base = origin.wrapping_add_signed(tooth.start);
        let len = tooth.end.wrapping_sub(tooth.start) as usize;
        let at = |id: u32| base.wrapping_add_signed(stride * id as isize);
        let (a, b) = (at(lowest), at(highest));
        let bounds = a.min(b)..a.max(b) + len;
        spans.push(Span { bounds, form: Form::Comb { base, len, stride, ids: Arc::clone(ids) } });
    }
}

/// Stretches that hold all of `pattern`'s fragments, none longer than `most` unless one fragment is.
fn teeth(pattern: &Pattern, most: usize) -> Vec<Range<isize>> {
    if pattern.runs().len() > MAX_TEETH {
        return vec![pattern.bounds()];
    }
    let mut runs: Vec<Run> = pattern.runs().to_vec();
    runs.sort_unstable();
    let mut teeth: Vec<Range<isize>> = Vec::new();
    for run in runs {
        match teeth.last_mut() {
            Some(last) if (run.end() - last.start) as usize <= most => last.end = last.end.max(run.end()),
            _ => teeth.push(run.offset..run.end()),
        }
    }
    teeth
}

fn listed(segment: &Segment, pages: &[u32]) -> Span {
    let mut ranges: Vec<Range<usize>> = pages
        .iter()
        .map(|&page| {
            let (base, pattern) = segment.piece(page as usize);
            let bounds = pattern.bounds();
            (base as usize).wrapping_add_signed(bounds.start)..(base as usize).wrapping_add_signed(bounds.end)
        })
        .collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let end = ranges.iter().map(|range| range.end).max().unwrap_or(0);
    Span { bounds: ranges.first().map_or(0, |range| range.start)..end, form: Form::Listed(ranges) }
}

/// Whether two ascending lists have a number in common.
fn share_one(one: &[u32], two: &[u32]) -> bool {
    let mut two = two.iter().peekable();
    one.iter().any(|id| {
        while two.next_if(|other| *other < id).is_some() {}
        two.peek().is_some_and(|other| *other == id)
    })
}

/// Whether two lists of ranges, ascending by their starts, have a byte in common.
fn ranges_meet(one: &[Range<usize>], two: &[Range<usize>]) -> bool {
    let (mut one, mut two) = (one.iter().peekable(), two.iter().peekable());
    while let (Some(a), Some(b)) = (one.peek(), two.peek()) {
        if a.start < b.end && b.start < a.end {
            return true;
        }
        // The one that starts first lies wholly before the other, and before all that follow that one.
        if a.start < b.start {
            one.next();
        } else {
            two.next();
        }
    }
    false
}

/// The unfinished copies, in the order in which they were accepted.
#[derive(Debug, Default)]
pub(super) struct Scoreboard {
    uses: Vec<(u64, Arc<Access>, Use)>,
}

impl Scoreboard {
    pub(super) fn new() -> Scoreboard {
        Scoreboard::default()
    }

    /// A copy with a greater number than any before.
    pub(super) fn enter(&mut self, id: u64, access: Arc<Access>, how: Use) {
        self.uses.push((id, access, how));
    }

    pub(super) fn leave(&mut self, id: u64) {
        self.uses.retain(|(other, ..)| *other != id);
    }

    pub(super) fn contains(&self, id: u64) -> bool {
        self.uses.iter().any(|(other, ..)| *other == id)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.uses.is_empty()
    }

    /// The unfinished copies that a use of `access` must come after, ascending: those that write what it reads or writes, and
    /// those that read what it writes.
    pub(super) fn before(&self, access: &Access, how: Use) -> Vec<u64> {
        let conflicts = |other: Use| how == Use::Writes || other == Use::Writes;
        self.uses
            .iter()
            .filter(|(_, other, used)| conflicts(*used) && access.meets(other))
            .map(|(id, ..)| *id)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    use crate::span::Region;
    use proptest::prelude::*;

    const BYTES: usize = 4096;

    fn table(region: &Region, (count, stride, first): (usize, isize, isize), pattern: Pattern) -> Option<Pages> {
        let (region, pattern) = (region.clone(), Arc::new(pattern));
        Pages::new(vec![Segment::Table { region, pattern, first, stride, count }]).ok()
    }

    fn bytes(pages: &Pages, ids: &[usize]) -> BTreeSet<usize> {
        let mut bytes = BTreeSet::new();
        for &id in ids {
            pages.for_each_run(id, |addr, len| bytes.extend(addr as usize..addr as usize + len));
        }
        bytes
    }

    fn pages(region: &Region) -> impl Strategy<Value = (Pages, Vec<usize>)> + use<> {
        let region = region.clone();
        let form = (1usize..40, 1usize..12, 1usize..5, 1isize..700);
        (
            form,
            prop_oneof![Just(64isize), Just(128), -100isize..200],
            0isize..800,
            any::<bool>(),
            prop::collection::vec(any::<u16>(), 1..8),
        )
            .prop_filter_map("out of bounds", move |((len, count, runs, gap), stride, first, picked, ids)| {
                let pattern = Pattern::strided(1, &[runs, len], &[gap, 1]).ok()?;
                let ids: Vec<usize> = ids.iter().map(|&id| id as usize % count).collect();
                if !picked {
                    return Some((table(&region, (count, stride, first), pattern)?, ids));
                }
                let list = Arc::new(Ids::from(ids.iter().map(|&id| id as u32).collect::<Vec<_>>()));
                let (region, pattern) = (region.clone(), Arc::new(pattern));
                let segment = Segment::Picked { region, pattern, first, stride, ids: list, table_count: count };
                Some((Pages::new(vec![segment]).ok()?, (0..ids.len()).collect()))
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn shared_bytes_are_never_missed(
            (one, two) in Just(Region::from_vec(vec![0; BYTES])).prop_flat_map(|region| (pages(&region), pages(&region))),
        ) {
            let shared = !bytes(&one.0, &one.1).is_disjoint(&bytes(&two.0, &two.1));
            let (a, b) = (Access::of(&one.0, one.1.into_iter()), Access::of(&two.0, two.1.into_iter()));
            prop_assert!(a.meets(&b) || !shared);
            prop_assert_eq!(a.meets(&b), b.meets(&a));
        }
    }

    #[test]
    fn pages_of_one_form_meet_only_where_their_numbers_do() {
        let region = Region::from_vec(vec![0; BYTES]);
        // Two fragments a page, far apart: keys and values.
        let pattern = || Pattern::strided(1, &[2, 64], &[2048, 1]).unwrap();
        let (one, two) =
            (table(&region, (32, 64, 0), pattern()).unwrap(), table(&region, (32, 64, 0), pattern()).unwrap());
        let access = |pages: &Pages, ids: &[usize]| Access::of(pages, ids.iter().copied());
        assert!(!access(&one, &[0, 2, 4, 30]).meets(&access(&two, &[1, 3, 31])));
        assert!(access(&one, &[0, 2, 4, 30]).meets(&access(&two, &[1, 30])));
        let elsewhere = Region::from_vec(vec![0; BYTES]);
        let other = table(&elsewhere, (32, 64, 0), pattern()).unwrap();
        assert!(!access(&one, &[1]).meets(&access(&other, &[1])));
    }

    #[test]
    fn readers_do_not_wait_for_readers() {
        let region = Region::from_vec(vec![0; BYTES]);
        let pages = table(&region, (32, 64, 0), Pattern::contiguous(64)).unwrap();
        let access = |ids: Range<usize>| Arc::new(Access::of(&pages, ids));
        let mut board = Scoreboard::new();
        board.enter(1, access(0..8), Use::Reads);
        board.enter(2, access(8..16), Use::Writes);
        board.enter(3, access(4..8), Use::Reads);
        assert_eq!(board.before(&access(0..16), Use::Reads), [2]);
        assert_eq!(board.before(&access(0..8), Use::Writes), [1, 3]);
        assert_eq!(board.before(&access(0..4), Use::Writes), [1]);
        assert!(board.before(&access(16..32), Use::Writes).is_empty());
        board.leave(1);
        assert_eq!(board.before(&access(0..16), Use::Writes), [2, 3]);
    }
}
