//! Gives the operations of a flight to the device.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::GpuOptions;
use super::flight::Load;
use super::method::{Method, Profile};
use super::program::{self, Halves, Op, Program, Task};
use super::stock::{Stock, TableMemory};
use super::streams::{Role, Streams};
use crate::copy::{Direction, Transfer};
use crate::device::{Device, Launch, Row};
use crate::device_pool::{DevicePoolOptions, GpuAsyncPool};
use crate::error::MemError;
use crate::map::Pinned;
use crate::marks::{Mark, Marks};
use crate::pool::Allocation;
use crate::sync::Arc;

/// The device's side of an engine: streams, staging and tables. Used under the engine's lock.
pub(super) struct Pilot {
    pub(super) device: Arc<dyn Device>,
    pub(super) marks: Marks,
    streams: Streams,
    stock: Stock,
    /// What staging is taken from.
    pool: GpuAsyncPool,
    /// For stores and for loads, once one was staged.
    staging: [Option<Staging>; 2],
    /// When the device last had no memory for staging.
    refused: Option<Instant>,
    pub(super) options: GpuOptions,
    profile: Profile,
}

/// Two buffers of device memory for one direction.
struct Staging {
    memory: Allocation,
    /// The stream that it was taken and is given back in: the one that fills the buffers.
    fills: Role,
    halves: Halves,
}

/// When memory for staging is asked for again after it was refused.
const STAGING_AGAIN: Duration = Duration::from_secs(1);

/// What is in the air after a flight was given to the device, wholly or not.
pub(super) struct Started {
    /// All have passed when nothing of the flight runs any more.
    pub(super) ends: Vec<Arc<Mark>>,
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
        let pool = GpuAsyncPool::new(&device, DevicePoolOptions { capacity_bytes: None, keep_bytes: 0 })?;
        Ok(Pilot {
            marks: Marks::new(&device),
            device,
            streams,
            stock,
            pool,
            staging: [None, None],
            refused: None,
            options,
            profile,
        })
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

    fn mark(&self, roles: &[Role]) -> Result<Vec<Arc<Mark>>, MemError> {
        roles.iter().map(|&role| self.marks.mark(self.streams.raw(role))).collect()
    }

    fn task<'a>(&mut self, load: &Load<'a>) -> Task<'a> {
        let in_rows = is_pinned(load.transfer, self.device.info().ordinal);
        let piece = load.transfer.pages().order().background.then_some(self.options.background_bytes);
        let mut task = Task { transfer: load.transfer, steps: load.steps.clone(), method: Method::Dma, in_rows, piece };
        let rates = match load.transfer.direction() {
            Direction::Store => self.profile.store,
            Direction::Load => self.profile.load,
        };
        if !in_rows {
            // The driver copies what it cannot reach by itself: slow, but right.
            return task;
        }
        let shape = program::shape(&task, self.options.staging_bytes, load.parts().map_or(1, |parts| parts.len()));
        let maps_host = self.device.info().maps_host;
        task.method = self.options.method.unwrap_or_else(|| rates.choose(&shape, maps_host));
        if task.method == Method::Staged && !self.has_staging(load.transfer.direction()) {
            task.method = rates.choose_unstaged(&shape, maps_host);
        }
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
            Method::Staged => self.staging[side(task.transfer.direction())].as_ref().map(|staging| staging.halves),
            _ => None,
        }
        .unwrap_or(Halves { addrs: [0; 2], bytes: 0, next: 0 });
        program.add(task, &ranges, load.parts().is_some(), &mut halves);
        if let Some(staging) = &mut self.staging[side(task.transfer.direction())] {
            staging.halves.next = halves.next;
        }
        Ok(())
    }

    /// Whether there are staging buffers, taken now if there were none. Without memory for them, transfers go another way.
    fn has_staging(&mut self, direction: Direction) -> bool {
        if self.staging[side(direction)].is_none() && self.refused.is_none_or(|when| when.elapsed() > STAGING_AGAIN) {
            match self.take_staging(direction) {
                Ok(staging) => self.staging[side(direction)] = Some(staging),
                Err(error) => {
                    if self.refused.replace(Instant::now()).is_none() {
                        log::warn!("copies go without staging, which may be slower (said once): {error}");
                    }
                }
            }
        }
        self.staging[side(direction)].is_some()
    }

    fn take_staging(&self, direction: Direction) -> Result<Staging, MemError> {
        let (bytes, fills) =
            (self.options.staging_bytes, if direction == Direction::Store { Role::Gather } else { Role::Load });
        let memory = self.pool.allocate(2 * bytes, self.streams.raw(fills))?;
        let halves = Halves { addrs: [memory.addr, memory.addr + bytes], bytes, next: 0 };
        Ok(Staging { memory, fills, halves })
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
            // SAFETY: as above.
            Op::CopyRows { on, ref copy } => unsafe { self.device.copy_rows(self.streams.raw(on), copy) },
            Op::Order { first, then } => self.streams.order(first, then),
            Op::Claim { on, half } => self.streams.drained(on, half).hold(self.streams.raw(on)),
            Op::Release { on, half } => self.streams.drained(on, half).record(self.streams.raw(on)),
            Op::Part { on } => {
                let mark = self.marks.mark(self.streams.raw(on))?;
                if let Some(parts) = load.parts() {
                    parts.push(mark);
                }
                Ok(())
            }
        }
    }
}

impl Drop for Pilot {
    /// Nothing is in the air any more.
    fn drop(&mut self) {
        for staging in self.staging.iter_mut().filter_map(Option::take) {
            if let Err(error) = self.pool.free(staging.memory.addr, self.streams.raw(staging.fills)) {
                log::debug!("staging memory was not given back: {error}");
            }
        }
    }
}

fn is_pinned(transfer: &Transfer, ordinal: u32) -> bool {
    matches!(transfer.arena().memory().pinned(), Pinned::Yes { device } if device == ordinal)
}

fn side(direction: Direction) -> usize {
    usize::from(direction == Direction::Load)
}
