//! The thread that executes what the streams were given.

use std::ptr;
use std::time::{Duration, Instant};

use super::{Op, Shared, State};
use crate::copy::job::guarded;
use crate::device::{CopyRows, ITEM_BYTES, Item, Launch, MAX_PITCH, Row};
use crate::sync::Arc;

/// The most bytes, or items of a launch, that are executed before another stream may go on.
const GRAIN_BYTES: usize = 1 << 20;
const GRAIN_ITEMS: usize = 512;

pub(super) fn execute(shared: &Arc<Shared>) {
    let mut state = shared.state.lock();
    loop {
        let next = if state.paused && !state.closing { None } else { state.pick() };
        match next {
            Some(stream) => {
                let op = state.streams.get_mut(&stream).and_then(|stream| stream.queue.pop_front());
                let Some(op) = op else { continue };
                if let Op::Compute(work) = op {
                    state.busy = true;
                    drop(state);
                    if let Err(reason) = guarded(work) {
                        log::error!("simulated work panicked: {reason}");
                    }
                    state = shared.state.lock();
                    state.busy = false;
                } else if let Some(rest) = state.step(op) {
                    state.streams.entry(stream).or_default().queue.push_front(rest);
                }
                shared.done.notify_all();
                if state.below(64) == 0 {
                    // Others submit in the meantime, so that streams overlap.
                    drop(state);
                    std::thread::sleep(Duration::from_micros(20));
                    state = shared.state.lock();
                }
            }
            None if state.closing => return,
            None => shared.work.wait(&mut state),
        }
    }
}

impl State {
    /// A random one of the streams that can go on.
    fn pick(&mut self) -> Option<u64> {
        let ready: Vec<u64> = self
            .streams
            .iter()
            .filter(|(_, stream)| stream.queue.front().is_some_and(|op| self.is_ready(op)))
            .map(|(&id, _)| id)
            .collect();
        if ready.is_empty() { None } else { Some(ready[self.below(ready.len())]) }
    }

    fn is_ready(&self, op: &Op) -> bool {
        match op {
            Op::Wait { event, number } => self.events.get(event).is_none_or(|event| event.passed >= *number),
            Op::Copy { bytes, .. } => *bytes < self.longest || self.closing,
            Op::CopyRows { copy, .. } => copy.bytes * copy.rows < self.longest || self.closing,
            _ => true,
        }
    }

    /// Executes a piece of `op`; returns what is left of it.
    fn step(&mut self, op: Op) -> Option<Op> {
        match op {
            Op::Copy { to, from, bytes, done } => self.step_copy((to, from, bytes), done),
            Op::CopyRows { copy, next } => self.step_rows(copy, next),
            Op::Launch { launch, next } => self.step_launch(launch, next),
            Op::Record { event, number } => {
                if let Some(found) = self.events.get_mut(&event) {
                    found.passed = found.passed.max(number);
                    found.when = Some(Instant::now());
                }
                None
            }
            Op::Wait { event, .. } => {
                self.forget_event(event);
                None
            }
            Op::Free { addr } => {
                self.give_back(addr);
                None
            }
            Op::Compute(_) => None,
        }
    }

    /// A wait of a destroyed event has passed.
    fn forget_event(&mut self, id: u64) {
        if let Some(event) = self.events.get_mut(&id) {
            event.waiters -= 1;
            if event.destroyed && event.waiters == 0 {
                self.events.remove(&id);
            }
        }
    }

    fn step_copy(&mut self, (to, from, bytes): (usize, usize, usize), done: usize) -> Option<Op> {
        for (addr, what) in [(to, "to"), (from, "from")] {
            if !self.is_reachable(addr, bytes, false) {
                self.violate(format!("a copy {what} {addr:#x}, {bytes} bytes, which is not one range"));
                return None;
            }
        }
        let most = self.below(GRAIN_BYTES) + 1;
        let len = most.min(bytes - done);
        // SAFETY: both ranges were found in memory that is kept until it is freed or unregistered.
        unsafe { ptr::copy((from + done) as *const u8, (to + done) as *mut u8, len) };
        self.counts.bytes += len;
        if done + len < bytes {
            return Some(Op::Copy { to, from, bytes, done: done + len });
        }
        self.counts.copies += 1;
        None
    }

    fn step_rows(&mut self, copy: CopyRows, next: usize) -> Option<Op> {
        let pitches = [copy.to_pitch, copy.from_pitch];
        let fits = copy.rows > 0 && pitches.into_iter().all(|pitch| (copy.bytes..=MAX_PITCH).contains(&pitch));
        if !fits || copy.spans().into_iter().any(|(addr, bytes)| !self.is_reachable(addr, bytes, false)) {
            self.violate(format!("{copy:?}: rows that overlap, or that do not lie in one range"));
            return None;
        }
        let end = copy.rows.min(next + 1 + self.below(GRAIN_ITEMS));
        for row in next..end {
            let (to, from) = (copy.to + row * copy.to_pitch, copy.from + row * copy.from_pitch);
            // SAFETY: both spans were found in memory that is kept until it is freed or unregistered.
            unsafe { ptr::copy(from as *const u8, to as *mut u8, copy.bytes) };
        }
        self.counts.bytes += copy.bytes * (end - next);
        if end < copy.rows {
            return Some(Op::CopyRows { copy, next: end });
        }
        self.counts.copies += 1;
        None
    }

    fn step_launch(&mut self, launch: Launch, next: usize) -> Option<Op> {
        let units = launch.row_count * launch.item_count;
        let tables =
            [(launch.rows, launch.row_count * size_of::<Row>()), (launch.items, launch.item_count * size_of::<Item>())];
        if let Some((addr, _)) = tables.into_iter().find(|&(addr, bytes)| !self.is_reachable(addr, bytes, true)) {
            self.violate(format!("a table at {addr:#x} is not one range"));
            return None;
        }
        let end = units.min(next + 1 + self.below(GRAIN_ITEMS));
        for unit in next..end {
            // SAFETY: the tables were found in memory; rows and items are plain numbers.
            let (row, item) = unsafe {
                let row = (launch.rows as *const Row).add(unit / launch.item_count).read_unaligned();
                (row, (launch.items as *const Item).add(unit % launch.item_count).read_unaligned())
            };
            if !self.copy_item(&launch, row, item) {
                return None;
            }
        }
        if end < units {
            return Some(Op::Launch { launch, next: end });
        }
        self.counts.launches += 1;
        None
    }

    fn copy_item(&mut self, launch: &Launch, row: Row, item: Item) -> bool {
        let page = row.page.wrapping_add(item.page) as usize;
        let slot = row.slot.wrapping_add(item.slot) as usize;
        let bytes = item.bytes as usize;
        let fits = bytes <= ITEM_BYTES && self.is_reachable(page, bytes, true) && self.is_reachable(slot, bytes, true);
        if !fits {
            self.violate(format!("a kernel copies {bytes} bytes between {page:#x} and {slot:#x}"));
            return false;
        }
        let (to, from) = if launch.to_slots { (slot, page) } else { (page, slot) };
        // SAFETY: both ranges were found in memory.
        unsafe { ptr::copy(from as *const u8, to as *mut u8, bytes) };
        self.counts.bytes += bytes;
        true
    }
}
