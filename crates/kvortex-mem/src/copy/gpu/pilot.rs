//! Gives the operations of a flight to the device.

use std::ops::Range;

use super::GpuOptions;
use super::flight::Load;
use super::method::{self, Method, Profile};
use super::program::{self, Halves, Op, Program, Task};
use super::stock::{Stock, TableMemory};
use super::streams::{Role, Streams};
use crate::copy::{Direction, Transfer};
use crate::device::{Device, DeviceMemory, Event, Launch, Row};
use crate::error::MemError;
use crate::map::Pinned;
use crate::sync::Arc;

/// The device's side of an engine: streams, staging and tables. Used under the engine's lock.
pub(super) struct Pilot {
    pub(super) device: Arc<dyn Device>,
    streams: Streams,
    stock: Stock,
    /// For stores and for loads, once one was staged.
    staging: [Option<Staging>; 2],
    options: GpuOptions,
    profile: Profile,
}

struct Staging {
    _memory: DeviceMemory,
    halves: Halves,
}

/// What is in the air after a flight was given to the device, wholly or not.
pub(super) struct Started {
    /// All have passed when nothing of the flight runs any more.
    pub(super) ends: Vec<Arc<Event>>,
    pub(super) tables: Option<TableMemory>,
    /// What kept the flight, or its rest, from being given to the device.
    pub(super) failure: Option<MemError>,
}

/// Thread blocks that copy within the device, which takes more of them than the link.
const LOCAL_BLOCKS: u32 = 48;

impl Pilot {
    pub(super) fn new(device: Arc<dyn Device>, options: GpuOptions, profile: Profile) -> Result<Pilot, MemError> {
        let streams = Streams::new(&device, options.streams)?;
        let stock = Stock::new(&device)?;
        Ok(Pilot { device, streams, stock, staging: [None, None], options, profile })
    }

    pub(super) fn land(&mut self, tables: Option<TableMemory>) {
        if let Some(tables) = tables {
            self.stock.give(tables);
        }
    }

    /// Gives `loads`, which all have one direction, to the device.
    pub(super) fn start(&mut self, loads: &[Load<'_>]) -> Started {
        let tasks: Vec<Task<'_>> = loads.iter().map(|load| self.task(load)).collect();
        let mut tables = None;
        let failure = self.give(loads, &tasks, &mut tables).err();
        // Both sides: after a failure in between, neither stream need have waited for the other.
        let mut roles: Vec<Role> = tasks.iter().flat_map(|task| [task.slot_role(), task.page_role()]).collect();
        roles.sort_unstable_by_key(|role| *role as usize);
        roles.dedup();
        match self.mark(&roles) {
            Ok(ends) => Started { ends, tables, failure },
            // Without an event nobody could tell when the copies end; only a lost device refuses one.
            Err(error) => {
                let failure = Some(MemError::DeviceLost { cause: failure.unwrap_or(error).to_string() });
                Started { ends: Vec::new(), tables, failure }
            }
        }
    }

    fn mark(&self, roles: &[Role]) -> Result<Vec<Arc<Event>>, MemError> {
        roles.iter().map(|&role| self.mark_one(role)).collect()
    }

    fn mark_one(&self, role: Role) -> Result<Arc<Event>, MemError> {
        let event = Event::new(&self.device)?;
        event.record(self.streams.raw(role))?;
        Ok(Arc::new(event))
    }

    fn task<'a>(&self, load: &Load<'a>) -> Task<'a> {
        let mut task = Task { transfer: load.transfer, steps: load.steps.clone(), method: Method::Dma };
        let rates = match load.transfer.direction() {
            Direction::Store => &self.profile.store,
            Direction::Load => &self.profile.load,
        };
        if !is_pinned(load.transfer, self.device.info().ordinal) {
            // The driver copies what it cannot reach by itself: slow, but right.
            return task;
        }
        task.method = self.options.method.unwrap_or_else(|| {
            let shape = program::shape(&task, self.options.staging_bytes);
            method::choose(rates, &shape, self.device.info().maps_host)
        });
        task
    }

    fn give(
        &mut self,
        loads: &[Load<'_>],
        tasks: &[Task<'_>],
        tables: &mut Option<TableMemory>,
    ) -> Result<(), MemError> {
        let mut program = Program::default();
        let mut marks = Vec::new();
        for (load, task) in loads.iter().zip(tasks) {
            self.compile(load, task, &mut program)?;
            marks.push(program.ops.len());
        }
        let tables_at = self.upload(&program, tasks, tables)?;
        let mut next = 0;
        for ((load, task), end) in loads.iter().zip(tasks).zip(marks) {
            let held = load.after.iter().try_for_each(|event| event.hold(self.streams.raw(task.page_role())));
            let outcome =
                held.and_then(|()| program.ops[next..end].iter().try_for_each(|op| self.execute(op, tables_at, load)));
            next = end;
            if let (Err(error), Some(parts)) = (&outcome, load.parts()) {
                parts.fail(error);
            }
            outcome?;
        }
        Ok(())
    }

    fn compile(&mut self, load: &Load<'_>, task: &Task<'_>, program: &mut Program) -> Result<(), MemError> {
        let page_bytes = task.transfer.pages().page_bytes();
        let whole: Vec<Range<usize>> = std::iter::once(0..page_bytes).collect();
        let ranges = load.parts().map_or(Ok(whole), |parts| parts.ranges(page_bytes))?;
        let mut halves = match task.method {
            Method::Staged => self.staging(task.transfer.direction())?.halves,
            _ => Halves { addrs: [0; 2], bytes: 0, next: 0 },
        };
        program.add(task, &ranges, load.parts().is_some(), &mut halves);
        if let Some(staging) = &mut self.staging[side(task.transfer.direction())] {
            staging.halves.next = halves.next;
        }
        Ok(())
    }

    fn staging(&mut self, direction: Direction) -> Result<&Staging, MemError> {
        let (device, bytes) = (Arc::clone(&self.device), self.options.staging_bytes);
        let place = &mut self.staging[side(direction)];
        if place.is_none() {
            let memory = DeviceMemory::new(&device, 2 * bytes)?;
            let first = memory.addr().as_ptr() as usize;
            let halves = Halves { addrs: [first, first + bytes], bytes, next: 0 };
            *place = Some(Staging { _memory: memory, halves });
        }
        Ok(place.as_ref().expect("just made"))
    }

    /// Brings the tables to the device, before whatever launches kernels; returns where they are.
    fn upload(
        &mut self,
        program: &Program,
        tasks: &[Task<'_>],
        tables: &mut Option<TableMemory>,
    ) -> Result<usize, MemError> {
        if program.words.is_empty() {
            return Ok(0);
        }
        let bytes = size_of_val(program.words.as_slice());
        let (from, to) = tables.insert(self.stock.take(bytes)?).write(&program.words);
        let first = tasks[0].page_role();
        // SAFETY: both sides hold `bytes` bytes and belong to this flight until it has landed.
        unsafe { self.device.copy(self.streams.raw(first), to, from, bytes)? };
        for task in tasks.iter().filter(|task| task.page_role() != first) {
            self.streams.order(first, task.page_role())?;
        }
        Ok(to)
    }

    fn execute(&self, op: &Op, tables: usize, load: &Load<'_>) -> Result<(), MemError> {
        match *op {
            Op::Launch { on, rows, items, to_slots, local } => {
                let launch = Launch {
                    rows: tables + rows.start * size_of::<u64>(),
                    row_count: rows.count,
                    items: tables + items.start * size_of::<u64>(),
                    item_count: items.count,
                    to_slots,
                    blocks: if local { LOCAL_BLOCKS } else { self.options.blocks },
                };
                const { assert!(size_of::<Row>() == 16) };
                // SAFETY: the transfer's memory is checked, kept alive and left alone by others until the flight has
                // landed; tables and staging are this flight's, by the order of the streams.
                unsafe { self.device.launch(self.streams.raw(on), &launch) }
            }
            // SAFETY: as above.
            Op::Copy { on, to, from, bytes } => unsafe { self.device.copy(self.streams.raw(on), to, from, bytes) },
            Op::Order { first, then } => self.streams.order(first, then),
            Op::Claim { on, half } => self.streams.drained(on, half).hold(self.streams.raw(on)),
            Op::Release { on, half } => self.streams.drained(on, half).record(self.streams.raw(on)),
            Op::Part { on } => self.mark_one(on).map(|event| load.parts().map_or((), |parts| parts.push(event))),
        }
    }
}

fn is_pinned(transfer: &Transfer, ordinal: u32) -> bool {
    matches!(transfer.arena().memory().pinned(), Pinned::Yes { device } if device == ordinal)
}

fn side(direction: Direction) -> usize {
    usize::from(direction == Direction::Load)
}
