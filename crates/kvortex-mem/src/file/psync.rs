//! Threads that read and write, one call after the other.

use std::io;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::op::{self, Access, Op};
use super::queue::Queue;
use super::{FileIo, SlabFile};
use crate::arena::Arena;
use crate::error::MemError;
use crate::sync::{Arc, Condvar, Mutex};

/// More threads than this gain nothing.
const MAX_THREADS: usize = 32;

/// The engine of threads: works on every file system, and any of its calls can be made to fail.
pub struct Psync {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    process: u32,
}

struct Shared {
    file: Arc<SlabFile>,
    arena: Arc<Arena>,
    queue: Mutex<Queue>,
    /// An operation may have become ready to begin, or the last one has ended.
    changed: Condvar,
}

impl Psync {
    /// Starts up to `depth` threads.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(file: &Arc<SlabFile>, arena: &Arc<Arena>, depth: usize) -> Result<Psync, MemError> {
        let depth = depth.clamp(2, MAX_THREADS);
        let shared = Arc::new(Shared {
            file: Arc::clone(file),
            arena: Arc::clone(arena),
            queue: Mutex::new(Queue::new(depth)),
            changed: Condvar::new(),
        });
        let this = Psync { shared, threads: Mutex::default(), process: std::process::id() };
        for number in 0..depth {
            let shared = Arc::clone(&this.shared);
            let name = format!("kvortex-disk-{number}");
            let thread = thread::Builder::new().name(name).spawn(move || shared.work()).map_err(MemError::Thread)?;
            this.threads.lock().push(thread);
        }
        Ok(this)
    }
}

impl FileIo for Psync {
    fn submit(&self, ops: Vec<Op>) {
        let refused = self.shared.queue.lock().push(ops);
        self.shared.changed.notify_all();
        refused.into_iter().for_each(|op| op.end(Err(op::cancelled())));
    }

    fn expire(&self) {
        let late = self.shared.queue.lock().expired();
        late.into_iter().for_each(|op| op.end(Err(op::late())));
    }

    fn stop(&self, patience: Duration) -> bool {
        if std::process::id() != self.process {
            return true;
        }
        let dropped = self.shared.queue.lock().close();
        self.shared.changed.notify_all();
        dropped.into_iter().for_each(|op| op.end(Err(op::cancelled())));
        if !self.shared.wait_idle(patience) {
            return false;
        }
        let threads = std::mem::take(&mut *self.threads.lock());
        // The last callback may have dropped what owned this.
        let own = thread::current().id();
        threads.into_iter().filter(|thread| thread.thread().id() != own).for_each(|thread| drop(thread.join()));
        true
    }

    fn name(&self) -> &'static str {
        "psync"
    }
}

impl Drop for Psync {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

impl Shared {
    fn work(&self) {
        while let Some(op) = self.next() {
            let access = op.access;
            let result = if op.is_late() { Err(op::late()) } else { self.carry_out(&op) };
            op.end(result);
            self.queue.lock().ended(access);
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<Op> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(op) = queue.pop() {
                return Some(op);
            }
            if queue.is_closed() {
                return None;
            }
            self.changed.wait(&mut queue);
        }
    }

    fn carry_out(&self, op: &Op) -> io::Result<()> {
        let (addr, len) = op.span(&self.arena)?;
        // SAFETY: the memory is the operation's until its end: a scratch it owns, or a slot that its submitter has claimed
        // or leased and that the arena keeps mapped.
        unsafe { move_all(&self.file, op.access, addr, len, op.offset) }
    }

    fn wait_idle(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut queue = self.queue.lock();
        while !queue.is_idle() {
            if self.changed.wait_until(&mut queue, end).timed_out() {
                return queue.is_idle();
            }
        }
        true
    }
}

/// Moves all of `len` bytes, in as many calls as it takes.
///
/// # Safety
///
/// `len` bytes from `addr` are valid for a read or write of memory, as `access` has it, during the call.
pub(super) unsafe fn move_all(
    file: &SlabFile,
    access: Access,
    addr: *mut u8,
    len: usize,
    offset: u64,
) -> io::Result<()> {
    let mut moved = 0;
    while moved < len {
        // SAFETY: the rest of the caller's range.
        let count = unsafe { file.transfer(access, addr.add(moved), len - moved, offset + moved as u64) }?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        moved += count;
    }
    if access == Access::Read {
        file.forget_read(offset, len as u64);
    }
    Ok(())
}
