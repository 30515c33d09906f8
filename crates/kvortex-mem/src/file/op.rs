//! One operation on a file.

use std::io;
use std::time::Instant;

use super::Scratch;
use crate::arena::Arena;
use crate::slots::SlotId;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// The memory of an operation.
///
/// Who submits a read of a slot has its claim and keeps it until `done`; who submits a write keeps what keeps the bytes as
/// they are.
#[derive(Debug)]
pub enum Memory {
    /// A whole slot, its padding included.
    Slot(SlotId),
    /// A buffer, which comes back at the end.
    Scratch(Scratch),
}

/// How an operation ended.
#[derive(Debug)]
pub struct Ended {
    /// All bytes moved, or why not; then some of the memory, or of the file, may be overwritten and other parts not.
    pub result: io::Result<()>,
    /// The operation's memory.
    pub memory: Memory,
}

/// Called when an operation has ended.
pub type Done = Box<dyn FnOnce(Ended) + Send>;

/// One operation.
pub struct Op {
    /// Which way.
    pub access: Access,
    /// Where in the file, a multiple of [`ALIGNMENT`](super::ALIGNMENT).
    pub offset: u64,
    /// From where or to where, all of it.
    pub memory: Memory,
    /// Until when it must have begun.
    pub deadline: Option<Instant>,
    /// Who is told of the end.
    pub done: Done,
}

impl Op {
    /// Ends it.
    pub(super) fn end(self, result: io::Result<()>) {
        (self.done)(Ended { result, memory: self.memory });
    }

    /// Whether it must not begin any more.
    pub(super) fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Address and length of its memory.
    pub(super) fn span(&self, arena: &Arena) -> io::Result<(*mut u8, usize)> {
        match &self.memory {
            Memory::Slot(slot) => match arena.addr(*slot) {
                Some(addr) => Ok((addr.as_ptr(), arena.stride())),
                None => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("there is no slot {}", slot.0))),
            },
            Memory::Scratch(scratch) => Ok((scratch.addr(), scratch.len())),
        }
    }
}

pub(super) fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it had not begun by its deadline")
}

pub(super) fn cancelled() -> io::Error {
    io::Error::new(io::ErrorKind::Interrupted, "cancelled: the tier is being closed")
}
