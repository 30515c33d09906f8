//! What to copy: plain data, checked once.

use std::ops::Range;
use std::ptr;

use super::stream;
use crate::arena::Arena;
use crate::error::MemError;
use crate::slots::SlotId;
use crate::span::Pages;
use crate::sync::Arc;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Pages to slots.
    Store,
    /// Slots to pages.
    Load,
}

/// One slot and the page it is copied from or to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Step {
    /// The slot.
    pub slot: SlotId,
    /// The page, as an index into the transfer's pages.
    pub page: u32,
}

/// A checked set of copies of one direction, together with all memory that they touch.
///
/// Each step copies all bytes of its page; a slot with more room keeps its remaining bytes.
#[derive(Debug)]
pub struct Transfer {
    direction: Direction,
    arena: Arc<Arena>,
    steps: Vec<Step>,
    pages: Pages,
}

/// Checks that a load from `arena` may write `pages`: that they are writable, lie outside the arena and share no bytes.
pub fn check_targets(pages: &Pages, arena: &Arena) -> Result<(), MemError> {
    if !pages.is_writable() {
        return Err(MemError::ReadOnly);
    }
    let start = arena.memory().addr().as_ptr() as usize;
    let end = start + arena.memory().len();
    if pages.regions().any(|region| region.addr() < end && start < region.addr() + region.len()) {
        return Err(MemError::TargetInArena);
    }
    pages.first_overlap().map_or(Ok(()), |(first, second)| Err(MemError::Overlap { first, second }))
}

impl Transfer {
    /// Checks that every slot and page exists, that a page fits into a slot, that no place is written twice and, for loads,
    /// that the pages are writable, share no bytes and lie outside the arena.
    pub fn new(direction: Direction, arena: Arc<Arena>, steps: Vec<Step>, pages: Pages) -> Result<Transfer, MemError> {
        let transfer = Transfer { direction, arena, steps, pages };
        transfer.check_sizes()?;
        transfer.check_steps()?;
        if let Some(parts) = &transfer.pages.order().parts {
            parts.ranges(transfer.pages.page_bytes())?;
        }
        if direction == Direction::Load && !transfer.steps.is_empty() {
            check_targets(&transfer.pages, &transfer.arena)?;
        }
        Ok(transfer)
    }

    /// Which way the bytes go.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// The slots' arena.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// The copies, in no particular order of execution.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The pages.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Bytes that will be copied.
    pub fn bytes(&self) -> usize {
        self.steps.len() * self.pages.page_bytes()
    }

    /// As [`Transfer::steps`], sorted by slot, so that neighbours in the arena follow each other.
    pub(super) fn sort_by_slot(&mut self) {
        if !self.steps.is_sorted_by_key(|step| step.slot) {
            self.steps.sort_unstable_by_key(|step| step.slot);
        }
    }

    fn check_sizes(&self) -> Result<(), MemError> {
        let (actual, expected) = (self.pages.page_bytes(), self.arena.slot_bytes());
        if actual > expected {
            return Err(MemError::PagesMismatch { what: "bytes of a page (at most the slot's)", expected, actual });
        }
        Ok(())
    }

    fn check_steps(&self) -> Result<(), MemError> {
        let (slots, pages) = (self.arena.slots().total(), self.pages.count());
        for step in &self.steps {
            in_range("slot", step.slot.0 as usize, slots)?;
            in_range("page", step.page as usize, pages)?;
        }
        let (what, bound) = match self.direction {
            Direction::Store => ("slot", slots),
            Direction::Load => ("page", pages),
        };
        self.written_twice(bound).map_or(Ok(()), |index| Err(MemError::WrittenTwice { what, index }))
    }

    /// A target of two steps; all targets are below `bound`.
    fn written_twice(&self, bound: usize) -> Option<usize> {
        /// Up to here comparing all with all takes less than clearing a bit for each slot of an arena.
        const FEW: usize = 32;

        let target = |step: &Step| match self.direction {
            Direction::Store => step.slot.0 as usize,
            Direction::Load => step.page as usize,
        };
        let mut targets = self.steps.iter().map(target);
        if self.steps.len() <= FEW {
            let earlier = |index: usize, wanted| self.steps[..index].iter().any(|step| target(step) == wanted);
            return targets.enumerate().find(|&(index, wanted)| earlier(index, wanted)).map(|(_, found)| found);
        }
        let mut seen = vec![0u64; bound.div_ceil(64)];
        targets.find(|&index| {
            let (word, bit) = (&mut seen[index / 64], 1 << (index % 64));
            let before = *word & bit != 0;
            *word |= bit;
            before
        })
    }

    /// Copies the bytes `range` of each page of `steps`.
    pub(super) fn copy(&self, steps: Range<usize>, range: Range<usize>) {
        // One loop for each case, which is not decided per fragment.
        match (stream::pays(self.bytes(), self.pages.mean_run_bytes()), self.direction) {
            (true, Direction::Store) => self.store_streaming(steps, range),
            (true, Direction::Load) => self.load_streaming(steps, range),
            (false, Direction::Store) => self.for_each_run(steps, range, |slot, page, len| {
                // SAFETY: see `for_each_run`.
                unsafe { copy_run(page, slot, len) };
            }),
            (false, Direction::Load) => self.for_each_run(steps, range, |slot, page, len| {
                // SAFETY: see `for_each_run`.
                unsafe { copy_run(slot, page, len) };
            }),
        }
    }

    fn load_streaming(&self, steps: Range<usize>, range: Range<usize>) {
        self.for_each_run(steps, range, |slot, page, len| {
            // SAFETY: see `for_each_run`; streaming pays, and is fenced below.
            unsafe { stream::copy(slot, page, len) };
        });
        stream::fence();
    }

    /// One fragment behind, so that the start of the next can be asked for in time.
    fn store_streaming(&self, steps: Range<usize>, range: Range<usize>) {
        let nothing = (ptr::dangling_mut(), ptr::dangling_mut(), 0);
        let mut pending = nothing;
        let mut next = |slot: *mut u8, page: *mut u8, len| {
            stream::expect(page, len);
            let (slot, page, len) = std::mem::replace(&mut pending, (slot, page, len));
            // SAFETY: see `for_each_run`; at first there is nothing to copy; streaming pays, and is fenced below.
            unsafe { stream::copy(page, slot, len) };
        };
        self.for_each_run(steps, range, &mut next);
        next(nothing.0, nothing.1, nothing.2);
        stream::fence();
    }

    /// Calls `f` with the addresses in slot and page, and the length, of each fragment.
    ///
    /// `Transfer::new` and `Pages::new` have checked what makes it sound to copy between them: slot and fragment are in bounds
    /// of memory that this transfer keeps alive, the fragments of a page add up to at most a slot, and loads have writable
    /// pages outside the arena.
    fn for_each_run(&self, steps: Range<usize>, range: Range<usize>, mut f: impl FnMut(*mut u8, *mut u8, usize)) {
        let base = self.arena.memory().addr().as_ptr().wrapping_add(range.start);
        for step in &self.steps[steps] {
            let mut slot = base.wrapping_add(step.slot.0 as usize * self.arena.stride());
            self.pages.for_each_run_in(step.page as usize, range.clone(), |page, len| {
                f(slot, page, len);
                slot = slot.wrapping_add(len);
            });
        }
    }
}

fn in_range(what: &'static str, index: usize, count: usize) -> Result<(), MemError> {
    if index < count { Ok(()) } else { Err(MemError::OutOfRange { what, index, count }) }
}

/// Copies one fragment. The ranges may overlap.
///
/// Items of a strided array are copied here one by one, so their sizes are told apart: a call for each would take several
/// times as long as moving it.
///
/// # Safety
///
/// `from` is valid for reads and `to` for writes of `len` bytes.
#[inline(always)]
unsafe fn copy_run(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        match len {
            1 => to.write(from.read()),
            2 => copy_item::<2>(from, to),
            4 => copy_item::<4>(from, to),
            8 => copy_item::<8>(from, to),
            16 => copy_item::<16>(from, to),
            32 => copy_item::<32>(from, to),
            _ => ptr::copy(from, to, len),
        }
    }
}

#[inline(always)]
unsafe fn copy_item<const LEN: usize>(from: *const u8, to: *mut u8) {
    // SAFETY: as the caller promises; an array of bytes has no alignment.
    unsafe { to.cast::<[u8; LEN]>().write(from.cast::<[u8; LEN]>().read()) };
}
