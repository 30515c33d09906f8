//! Requests, the lanes they wait in, and the flights that carry them.

use std::collections::VecDeque;
use std::ops::Range;

use super::GpuOptions;
use super::pilot::Started;
use super::stock::TableMemory;
use crate::copy::{Direction, Done, Transfer};
use crate::error::MemError;
use crate::marks::Mark;
use crate::span::Parts;
use crate::sync::Arc;

/// What is given to the device of one request in one flight.
pub(super) struct Load<'a> {
    pub(super) transfer: &'a Transfer,
    pub(super) steps: Range<usize>,
    /// What must have passed before the pages are touched.
    pub(super) after: &'a [Arc<Mark>],
}

impl Load<'_> {
    pub(super) fn parts(&self) -> Option<&Arc<Parts>> {
        self.transfer.pages().order().parts.as_ref()
    }
}

/// Which requests go in order of their tickets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Stores.
    Store,
    /// Loads that somebody waits for.
    Load,
    /// Loads in the background.
    Background,
}

impl Lane {
    /// All of them.
    pub const ALL: [Lane; 3] = [Lane::Store, Lane::Load, Lane::Background];

    pub(super) fn of(transfer: &Transfer) -> Lane {
        match (transfer.direction(), transfer.pages().order().background) {
            (Direction::Store, _) => Lane::Store,
            (Direction::Load, false) => Lane::Load,
            (Direction::Load, true) => Lane::Background,
        }
    }

    /// Flights in the air at once; further requests wait, and are carried together.
    pub(super) fn flights(self) -> usize {
        match self {
            Lane::Load => 8,
            Lane::Store | Lane::Background => 2,
        }
    }

    /// The most bytes of one flight. The device's queue would not hold much more, and submitting would wait for it.
    pub(super) fn flight_bytes(self, options: &GpuOptions) -> usize {
        match self {
            Lane::Background => options.background_bytes,
            Lane::Store | Lane::Load => options.flight_bytes,
        }
    }
}

/// The most requests of one flight.
pub(super) const FLIGHT_REQUESTS: usize = 32;

/// One accepted transfer.
pub(super) struct Request {
    pub(super) lane: Lane,
    pub(super) transfer: Transfer,
    pub(super) done: Done,
    /// Earlier requests that must be given to the device before this one.
    pub(super) earlier: Vec<u64>,
    /// What must have passed before the pages are touched.
    pub(super) after: Vec<Arc<Mark>>,
    /// Steps that were given to the device.
    pub(super) started: usize,
    /// What the flights of this request end with; complete once all steps were given to the device.
    pub(super) ends: Vec<Arc<Mark>>,
    pub(super) failure: Option<Failure>,
}

/// Why a request failed; several may share a flight.
pub(super) type Failure = Arc<MemError>;

impl Request {
    pub(super) fn is_started(&self) -> bool {
        self.started == self.transfer.steps().len() || self.failure.is_some()
    }

    /// The steps that go next: as many as fit into `most` bytes, but at least one. All of them if the load is awaited part by
    /// part.
    pub(super) fn next_steps(&self, most: usize) -> Range<usize> {
        let all = self.transfer.steps().len();
        if self.transfer.pages().order().parts.is_some() {
            return self.started..all;
        }
        let count = (most / self.transfer.pages().page_bytes().max(1)).max(1);
        self.started..all.min(self.started + count)
    }
}

/// Something given to the device.
pub(super) struct Flight {
    /// The requests whose last steps it carries.
    pub(super) last_of: Vec<u64>,
    pub(super) ends: Vec<Arc<Mark>>,
    pub(super) tables: Option<TableMemory>,
}

impl Flight {
    pub(super) fn new(started: Started, last_of: Vec<u64>) -> Flight {
        Flight { last_of, ends: started.ends, tables: started.tables }
    }
}

/// One lane: ids of requests that wait, oldest first, and what is in the air.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) waiting: VecDeque<u64>,
    pub(super) flying: VecDeque<Flight>,
}
