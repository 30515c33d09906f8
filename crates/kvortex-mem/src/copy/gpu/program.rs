//! A transfer as the device will execute it: tables for the kernel, and operations on streams. Nothing here calls a device.

use std::collections::HashMap;
use std::ops::Range;

use super::method::{Method, Shape};
use super::streams::Role;
use crate::copy::{Direction, Step, Transfer};
use crate::device::{CopyRows, ITEM_BYTES, Item, MAX_PITCH, Row};
use crate::span::{Ids, Pattern, Segment};
use crate::sync::Arc;

/// One operation. Table offsets are in words of 8 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Op {
    Launch {
        on: Role,
        rows: Table,
        items: Table,
        to_slots: bool,
        local: bool,
    },
    Copy {
        on: Role,
        to: usize,
        from: usize,
        bytes: usize,
    },
    CopyRows {
        on: Role,
        copy: CopyRows,
    },
    /// `then` waits for what `first` was given.
    Order {
        first: Role,
        then: Role,
    },
    /// `on` waits until the staging buffer was drained.
    Claim {
        on: Role,
        half: usize,
    },
    /// What `on` was given drains the staging buffer.
    Release {
        on: Role,
        half: usize,
    },
    /// A part of the load is complete once `on` has come here.
    Part {
        on: Role,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) start: usize,
    pub(super) count: usize,
}

/// The staging buffers of one direction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Halves {
    /// Device addresses of the buffers.
    pub(super) addrs: [usize; 2],
    pub(super) bytes: usize,
    /// The one to be used next.
    pub(super) next: usize,
}

/// What a flight gives to the device: tables of all its transfers, and their operations.
#[derive(Debug, Default)]
pub(super) struct Program {
    pub(super) words: Vec<u64>,
    pub(super) ops: Vec<Op>,
    /// Row tables that were written already.
    rows: HashMap<RowKey, Table>,
}

/// Rows are the same for segments whose pages lie at the same distances, and for all parts of a load that are equally long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RowKey {
    distances: Distances,
    steps: (usize, usize),
    /// Bytes of each page in a staging buffer; none between slots and pages.
    staged: Option<usize>,
    transfer: usize,
}

/// How far the pages of a segment lie from where its items say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Distances {
    /// As in every table of this stride.
    Stride(isize),
    /// As in every table of this stride from which these pieces are picked.
    Picked(isize, usize),
    /// As this segment says, for the pieces of this pattern.
    Own(usize, usize),
}

/// The part of a transfer that is given to the device in one go.
#[derive(Debug, Clone)]
pub(super) struct Task<'a> {
    pub(super) transfer: &'a Transfer,
    pub(super) steps: Range<usize>,
    pub(super) method: Method,
    /// Whether one copy takes slots that lie at equal distances: not where the driver has to pick up the bytes by itself.
    pub(super) in_rows: bool,
    /// After how many bytes the copy engine is left to others for a moment, if at all. It goes on with a stream for as long as
    /// that has copies, and the engine's own few bytes, the tokens of a step, would wait for gigabytes of a store.
    pub(super) piece: Option<usize>,
}

/// What one launch or one staging buffer takes.
#[derive(Debug, Clone)]
struct Cut {
    steps: Range<usize>,
    bytes: Range<usize>,
}

impl Task<'_> {
    fn to_slots(&self) -> bool {
        self.transfer.direction() == Direction::Store
    }

    fn steps(&self, range: &Range<usize>) -> &[Step] {
        &self.transfer.steps()[range.clone()]
    }

    fn slot_addr(&self, step: &Step) -> usize {
        let arena = self.transfer.arena();
        arena.memory().addr().as_ptr() as usize + step.slot.0 as usize * arena.stride()
    }

    /// The stream that touches the pages.
    pub(super) fn page_role(&self) -> Role {
        match (self.method, self.to_slots()) {
            (Method::Staged, true) => Role::Gather,
            (Method::Staged, false) => Role::Scatter,
            _ => self.slot_role(),
        }
    }

    /// The stream that touches the slots.
    pub(super) fn slot_role(&self) -> Role {
        if self.to_slots() { Role::Store } else { Role::Load }
    }

    /// The stream of this direction that runs kernels only.
    fn other_role(&self) -> Role {
        if self.to_slots() { Role::Gather } else { Role::Scatter }
    }
}

impl Program {
    /// Adds the bytes `ranges` of each page of `task`, one range after the other; each is marked as a part if `parts`.
    pub(super) fn add(&mut self, task: &Task<'_>, ranges: &[Range<usize>], parts: bool, halves: &mut Halves) {
        for range in ranges {
            let whole = Cut { steps: task.steps.clone(), bytes: range.clone() };
            match task.method {
                Method::Dma => self.add_copies(task, &whole),
                Method::Kernel => {
                    let groups = self.write_groups(task, &whole, 0);
                    self.add_launches(task, &whole, &groups, None);
                }
                Method::Staged => self.add_staged(task, &whole, halves),
            }
            if parts {
                self.ops.push(Op::Part { on: task.page_role() });
            }
        }
    }

    fn add_copies(&mut self, task: &Task<'_>, cut: &Cut) {
        let (on, pages) = (task.slot_role(), task.transfer.pages());
        // Pages may lie in several allocations, which one copy of rows must not cross.
        let mut copies = Copies::new(false);
        for step in task.steps(&cut.steps) {
            let mut slot = task.slot_addr(step) + cut.bytes.start;
            pages.for_each_run_in(step.page as usize, cut.bytes.clone(), |page, len| {
                copies.push(page as usize, slot, len);
                slot += len;
            });
        }
        if let Some(piece) = task.piece {
            self.add_pieces(task, copies.pieces(piece), piece);
        } else {
            self.ops.extend(copies.ops(on, task.to_slots()));
        }
    }

    /// Copies, between which the stream waits for another that waits for it: a moment without work after each `piece` bytes.
    fn add_pieces(&mut self, task: &Task<'_>, copies: Copies, piece: usize) {
        let (on, other) = (task.slot_role(), task.other_role());
        let mut left = 0;
        for copy in copies.found {
            if copy.bytes > left {
                self.ops.extend([Op::Order { first: on, then: other }, Op::Order { first: other, then: on }]);
                left = piece;
            }
            left -= copy.bytes;
            self.ops.push(copy.op(on, task.to_slots()));
        }
    }

    fn add_staged(&mut self, task: &Task<'_>, whole: &Cut, halves: &mut Halves) {
        let (page, slot) = (task.page_role(), task.slot_role());
        // Which bytes are copied, and their groups for each buffer.
        let (mut bytes, mut groups) = (0..0, [None, None]);
        for cut in cuts(whole, task.piece.map_or(halves.bytes, |piece| piece.min(halves.bytes))) {
            if bytes != cut.bytes {
                (bytes, groups) = (cut.bytes.clone(), [None, None]);
            }
            let half = halves.next;
            halves.next ^= 1;
            let groups = groups[half].get_or_insert_with(|| {
                let all = Cut { steps: whole.steps.clone(), bytes: cut.bytes.clone() };
                // Where a page's byte 0 would lie.
                self.write_groups(task, &all, halves.addrs[half].wrapping_sub(cut.bytes.start))
            });
            let (first, last) = if task.to_slots() { (page, slot) } else { (slot, page) };
            if task.piece.is_some() {
                self.ops.push(Op::Order { first: last, then: first });
            }
            self.ops.push(Op::Claim { on: first, half });
            if task.to_slots() {
                self.add_launches(task, &cut, groups, Some(cut.bytes.len()));
                self.ops.push(Op::Order { first, then: last });
                self.add_slot_copies(task, &cut, halves.addrs[half]);
            } else {
                self.add_slot_copies(task, &cut, halves.addrs[half]);
                self.ops.push(Op::Order { first, then: last });
                self.add_launches(task, &cut, groups, Some(cut.bytes.len()));
            }
            self.ops.push(Op::Release { on: last, half });
        }
    }

    /// Copies between a staging buffer, where pages follow each other, and the slots.
    fn add_slot_copies(&mut self, task: &Task<'_>, cut: &Cut, buffer: usize) {
        let (on, len) = (task.slot_role(), cut.bytes.len());
        let mut copies = Copies::new(task.in_rows);
        for (index, step) in task.steps(&cut.steps).iter().enumerate() {
            copies.push(buffer + index * len, task.slot_addr(step) + cut.bytes.start, len);
        }
        self.ops.extend(copies.ops(on, task.to_slots()));
    }

    /// Launches between the pages and the slots, or a staging buffer with `staged` bytes of each page.
    fn add_launches(&mut self, task: &Task<'_>, cut: &Cut, groups: &[(Rows<'_>, Table)], staged: Option<usize>) {
        let transfer = std::ptr::from_ref(task.transfer) as usize;
        for (distances, items) in groups {
            let steps = (cut.steps.start, cut.steps.end);
            let key = RowKey { distances: distances.key(), steps, staged, transfer };
            let rows = match self.rows.get(&key) {
                Some(&rows) => rows,
                None => *self.rows.entry(key).or_insert(write_rows(&mut self.words, task, distances, cut, staged)),
            };
            if rows.count > 0 {
                let (on, to_slots, items) = (task.page_role(), task.to_slots(), *items);
                self.ops.push(Op::Launch { on, rows, items, to_slots, local: staged.is_some() });
            }
        }
    }

    /// The groups of `cut`, with their items in the tables; `base` is where byte 0 of a page lies beyond what its row says.
    fn write_groups<'a>(&mut self, task: &Task<'a>, cut: &Cut, base: usize) -> Vec<(Rows<'a>, Table)> {
        let groups = groups(task, cut).into_iter();
        groups.map(|(rows, items)| (rows, write_items(&mut self.words, &items, base as u64))).collect()
    }
}

/// Where the rows of a group come from.
enum Rows<'a> {
    Stride(isize),
    Picked(isize, &'a Arc<Ids>),
    /// Pieces of this segment that have this pattern.
    Own(&'a Segment, &'a Arc<Pattern>),
}

impl Rows<'_> {
    fn key(&self) -> Distances {
        match self {
            Rows::Stride(stride) => Distances::Stride(*stride),
            Rows::Picked(stride, ids) => Distances::Picked(*stride, Arc::as_ptr(ids) as usize),
            Rows::Own(segment, pattern) => {
                Distances::Own(std::ptr::from_ref(*segment) as usize, Arc::as_ptr(pattern) as usize)
            }
        }
    }

    /// What the row of page `index` adds; `None` if it is not of this group.
    fn distance(&self, index: usize) -> Option<u64> {
        match self {
            Rows::Stride(stride) => Some((stride * index as isize) as u64),
            Rows::Picked(stride, ids) => Some((stride * ids.list()[index] as isize) as u64),
            Rows::Own(segment, pattern) => {
                let (base, own) = segment.piece(index);
                Arc::ptr_eq(own, pattern).then_some(base as u64)
            }
        }
    }
}

/// The items of all segments, those together whose pages lie at the same distances.
fn groups<'a>(task: &Task<'a>, cut: &Cut) -> Vec<(Rows<'a>, Vec<Item>)> {
    let mut groups: Vec<(Rows<'a>, Vec<Item>)> = Vec::new();
    for (segment, range) in task.transfer.pages().segments() {
        let wanted = cut.bytes.start.max(range.start)..cut.bytes.end.min(range.end);
        if wanted.is_empty() || segment.count() == 0 {
            continue;
        }
        let inner = wanted.start - range.start..wanted.end - range.start;
        match segment {
            Segment::Table { region, pattern, first, stride, .. } => {
                let base = region.base().wrapping_offset(*first) as u64;
                push_items(group(&mut groups, Rows::Stride(*stride)), base, pattern, (inner, wanted.start));
            }
            Segment::Picked { region, pattern, first, stride, ids, .. } => {
                let base = region.base().wrapping_offset(*first) as u64;
                push_items(group(&mut groups, Rows::Picked(*stride, ids)), base, pattern, (inner, wanted.start));
            }
            Segment::List(_) => {
                for pattern in patterns(task.steps(&cut.steps), segment) {
                    let mut items = Vec::new();
                    push_items(&mut items, 0, pattern, (inner.clone(), wanted.start));
                    groups.push((Rows::Own(segment, pattern), items));
                }
            }
        }
    }
    groups
}

/// The items of the group with these rows, which is new if there is none.
fn group<'a, 'b>(groups: &'b mut Vec<(Rows<'a>, Vec<Item>)>, rows: Rows<'a>) -> &'b mut Vec<Item> {
    let index = groups.iter().position(|(other, _)| other.key() == rows.key()).unwrap_or_else(|| {
        groups.push((rows, Vec::new()));
        groups.len() - 1
    });
    &mut groups[index].1
}

/// The patterns of the pieces that `steps` name.
fn patterns<'a>(steps: &[Step], segment: &'a Segment) -> Vec<&'a Arc<Pattern>> {
    let mut found: Vec<&Arc<Pattern>> = Vec::new();
    for step in steps {
        let pattern = segment.piece(step.page as usize).1;
        if !found.iter().rev().any(|other| Arc::ptr_eq(other, pattern)) {
            found.push(pattern);
        }
    }
    found
}

/// The bytes `inner` of a piece, which start at byte `at` of the page.
fn push_items(items: &mut Vec<Item>, base: u64, pattern: &Pattern, (inner, at): (Range<usize>, usize)) {
    let mut slot = at as u64;
    pattern.for_each_in(inner, |offset, len| {
        let mut page = base.wrapping_add(offset as u64);
        let mut left = len as u64;
        while left > 0 {
            let bytes = left.min(ITEM_BYTES as u64);
            items.push(Item { page, slot, bytes });
            (page, slot, left) = (page.wrapping_add(bytes), slot + bytes, left - bytes);
        }
    });
}

fn write_items(words: &mut Vec<u64>, items: &[Item], base: u64) -> Table {
    let start = words.len();
    words.reserve(items.len() * 3);
    items.iter().for_each(|item| words.extend([item.page, base.wrapping_add(item.slot), item.bytes]));
    Table { start, count: items.len() }
}

/// One row for each step; `staged` is how many bytes of each page lie in a staging buffer.
fn write_rows(words: &mut Vec<u64>, task: &Task<'_>, rows: &Rows<'_>, cut: &Cut, staged: Option<usize>) -> Table {
    // Rows are read 16 bytes at a time.
    words.resize(words.len().next_multiple_of(2), 0);
    let start = words.len();
    words.reserve(cut.steps.len() * 2);
    for (index, step) in task.steps(&cut.steps).iter().enumerate() {
        let slot = match staged {
            Some(len) => index * len,
            None => task.slot_addr(step),
        };
        if let Some(page) = rows.distance(step.page as usize) {
            let row = Row { page, slot: slot as u64 };
            words.extend([row.page, row.slot]);
        }
    }
    Table { start, count: (words.len() - start) / 2 }
}

/// Cuts that fit a buffer: as many whole pages as fit, or pieces of one page.
fn cuts(whole: &Cut, buffer: usize) -> Vec<Cut> {
    let len = whole.bytes.len();
    if len <= buffer {
        let steps = whole.steps.clone().step_by((buffer / len).max(1));
        let each = (buffer / len).max(1);
        return steps
            .map(|first| Cut { steps: first..(first + each).min(whole.steps.end), bytes: whole.bytes.clone() })
            .collect();
    }
    let pieces = |step: usize| {
        whole
            .bytes
            .clone()
            .step_by(buffer)
            .map(move |start| Cut { steps: step..step + 1, bytes: start..(start + buffer).min(whole.bytes.end) })
    };
    whole.steps.clone().flat_map(pieces).collect()
}

/// Copies of the copy engine, joined where both sides continue, or go on at the distances that they had before.
struct Copies {
    found: Vec<Stretch>,
    in_rows: bool,
}

/// Rows of equal length; only one has no pitch yet.
#[derive(Clone, Copy)]
struct Stretch {
    /// Of the first row.
    page: usize,
    slot: usize,
    bytes: usize,
    rows: usize,
    page_pitch: usize,
    slot_pitch: usize,
}

impl Copies {
    fn new(in_rows: bool) -> Copies {
        Copies { found: Vec::new(), in_rows }
    }

    fn push(&mut self, page: usize, slot: usize, bytes: usize) {
        let joined = self.found.last_mut().is_some_and(|last| {
            last.continues(page, slot, bytes) || (self.in_rows && last.takes_row(page, slot, bytes))
        });
        if !joined {
            self.found.push(Stretch { page, slot, bytes, rows: 1, page_pitch: 0, slot_pitch: 0 });
        }
    }

    /// The same, none longer than `piece` bytes.
    fn pieces(self, piece: usize) -> Copies {
        let cut = |copy: Stretch| {
            (0..copy.bytes).step_by(piece).map(move |start| Stretch {
                page: copy.page + start,
                slot: copy.slot + start,
                bytes: piece.min(copy.bytes - start),
                ..copy
            })
        };
        debug_assert!(!self.in_rows, "rows are not cut");
        Copies { found: self.found.into_iter().flat_map(cut).collect(), in_rows: false }
    }

    fn ops(self, on: Role, to_slots: bool) -> impl Iterator<Item = Op> {
        self.found.into_iter().map(move |found| found.op(on, to_slots))
    }
}

impl Stretch {
    fn op(self, on: Role, to_slots: bool) -> Op {
        let Stretch { page, slot, bytes, rows, page_pitch, slot_pitch } = self;
        let ((to, to_pitch), (from, from_pitch)) =
            if to_slots { ((slot, slot_pitch), (page, page_pitch)) } else { ((page, page_pitch), (slot, slot_pitch)) };
        match rows {
            1 => Op::Copy { on, to, from, bytes },
            _ => Op::CopyRows { on, copy: CopyRows { to, to_pitch, from, from_pitch, bytes, rows } },
        }
    }

    fn continues(&mut self, page: usize, slot: usize, bytes: usize) -> bool {
        let joins = self.rows == 1 && self.page + self.bytes == page && self.slot + self.bytes == slot;
        self.bytes += if joins { bytes } else { 0 };
        joins
    }

    fn takes_row(&mut self, page: usize, slot: usize, bytes: usize) -> bool {
        let pitch = |first: usize, next: usize, known: usize| {
            let last = first + known * (self.rows - 1);
            next.checked_sub(last)
                .filter(|pitch| (bytes..=MAX_PITCH).contains(pitch) && (self.rows == 1 || *pitch == known))
        };
        let pitches = pitch(self.page, page, self.page_pitch).zip(pitch(self.slot, slot, self.slot_pitch));
        let Some((page_pitch, slot_pitch)) = pitches.filter(|_| bytes == self.bytes) else { return false };
        (self.page_pitch, self.slot_pitch, self.rows) = (page_pitch, slot_pitch, self.rows + 1);
        true
    }
}

/// What matters of `task` for the choice of its method. Fragments are those of the first page, for every page; `parts` is the
/// number of pieces in which each page is copied.
pub(super) fn shape(task: &Task<'_>, half: usize, parts: usize) -> Shape {
    let (pages, steps) = (task.transfer.pages(), task.steps(&task.steps));
    let stride = task.transfer.arena().stride();
    let runs = 1 + steps.windows(2).filter(|pair| pair[0].slot.0 + 1 != pair[1].slot.0).count();
    let mut fragments = 0;
    if let Some(step) = steps.first() {
        pages.for_each_run(step.page as usize, |_, _| fragments += 1);
    }
    let bytes = steps.len() * pages.page_bytes();
    // Slots of one run are one stretch of bytes, unless something lies between what is copied of them.
    let whole = parts == 1 && pages.page_bytes() == stride;
    let rows = if whole { runs } else { steps.len() * parts };
    let slots = if whole || task.in_rows { runs * parts + bytes / half.max(1) } else { rows };
    let order = pages.order();
    let beside = task.to_slots() || order.background || order.parts.is_some();
    Shape { bytes, fragments: fragments.max(parts) * steps.len(), slots, rows: rows.max(slots), beside }
}
