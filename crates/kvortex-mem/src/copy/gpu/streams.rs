//! The streams of one engine, and what each is for.

use crate::device::{Device, Event, Priority, RawStream, Stream};
use crate::error::MemError;
use crate::sync::Arc;

/// What a stream does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Role {
    /// Writes slots.
    Store,
    /// Reads slots.
    Load,
    /// From pages into staging.
    Gather,
    /// From staging into pages.
    Scatter,
}

impl Role {
    /// Which of `count` streams plays this role.
    fn stream(self, count: usize) -> usize {
        let table = match count {
            1 => [0, 0, 0, 0],
            2 => [0, 1, 0, 1],
            3 => [0, 1, 2, 2],
            _ => [0, 1, 2, 3],
        };
        table[self as usize]
    }
}

/// The most streams that make a difference.
pub const MAX_STREAMS: usize = 4;

/// Streams by role, and the events that order them and their buffers. All of them live as long as the engine.
pub(super) struct Streams {
    streams: Vec<Stream>,
    order: Vec<Event>,
    /// For each direction and buffer: what drained it last.
    drained: [[Event; 2]; 2],
}

impl Streams {
    pub(super) fn new(device: &Arc<dyn Device>, count: usize) -> Result<Streams, MemError> {
        let count = count.clamp(1, MAX_STREAMS);
        let event = || Event::new(device);
        Ok(Streams {
            // Stores never delay anybody else's work; loads are waited for.
            streams: (0..count).map(|index| Stream::new(device, priority(index, count))).collect::<Result<_, _>>()?,
            order: (0..count).map(|_| event()).collect::<Result<_, _>>()?,
            drained: [[event()?, event()?], [event()?, event()?]],
        })
    }

    pub(super) fn raw(&self, role: Role) -> RawStream {
        self.streams[role.stream(self.streams.len())].raw()
    }

    /// Makes `then` wait for what `first` was given.
    pub(super) fn order(&self, first: Role, then: Role) -> Result<(), MemError> {
        let count = self.streams.len();
        if first.stream(count) == then.stream(count) {
            return Ok(());
        }
        let event = &self.order[first.stream(count)];
        event.record(self.raw(first))?;
        event.hold(self.raw(then))
    }

    /// The event that says that buffer `half` was drained; stores and loads have buffers of their own.
    pub(super) fn drained(&self, on: Role, half: usize) -> &Event {
        let loads = matches!(on, Role::Load | Role::Scatter);
        &self.drained[usize::from(loads)][half]
    }
}

fn priority(index: usize, count: usize) -> Priority {
    let stores_only = count > 1 && index == Role::Store as usize || count >= 4 && index == Role::Gather as usize;
    if stores_only { Priority::Low } else { Priority::High }
}
