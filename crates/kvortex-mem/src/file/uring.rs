//! A ring of the kernel: many operations under way with one thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::op::{self, Access, Op};
use super::queue::Queue;
use super::{ALIGNMENT, FileIo, Scratch, SlabFile, psync};
use crate::arena::Arena;
use crate::sync::{Arc, Condvar, Mutex};

/// Registered buffers are at most this long.
const MAX_BUFFER: usize = 1 << 30;
/// More than the kernel takes.
const MAX_BUFFERS: usize = 1 << 14;
const MAX_DEPTH: usize = 256;
/// Names the read of the event by which the ring's thread is woken.
const WAKE: u64 = u64::MAX;
/// How often an operation is tried that the kernel was too busy for, and how often in a row it may be too busy for all.
const MAX_TRIES: u32 = 100;
/// How long a kernel that is too busy is left alone.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// The engine of a ring.
pub struct Uring {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    process: u32,
}

struct Shared {
    file: Arc<SlabFile>,
    arena: Arc<Arena>,
    queue: Mutex<Queue>,
    idle: Condvar,
    wake: OwnedFd,
}

impl Uring {
    /// Makes a ring of `depth` and its thread.
    ///
    /// # Errors
    /// When the kernel refuses either.
    pub fn start(file: &Arc<SlabFile>, arena: &Arc<Arena>, depth: usize) -> io::Result<Uring> {
        let depth = depth.clamp(2, MAX_DEPTH);
        let ring = IoUring::new((depth + 1).next_power_of_two() as u32)?;
        ring.submitter().register_files(&[file.raw_fd()])?;
        // SAFETY: a new descriptor or an error.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            return Err(io::Error::last_os_error());
        }
        let shared = Arc::new(Shared {
            file: Arc::clone(file),
            arena: Arc::clone(arena),
            queue: Mutex::new(Queue::new(depth)),
            idle: Condvar::new(),
            // SAFETY: nobody else owns it.
            wake: unsafe { OwnedFd::from_raw_fd(wake) },
        });
        let driver = Driver::new(Arc::clone(&shared), ring, depth);
        let thread = thread::Builder::new().name("kvortex-disk".to_owned()).spawn(move || driver.run())?;
        Ok(Uring { shared, thread: Mutex::new(Some(thread)), process: std::process::id() })
    }
}

impl FileIo for Uring {
    fn submit(&self, ops: Vec<Op>) {
        let refused = self.shared.queue.lock().push(ops);
        self.shared.wake();
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
        dropped.into_iter().for_each(|op| op.end(Err(op::cancelled())));
        self.shared.wake();
        if !self.shared.wait_idle(patience) {
            return false;
        }
        let own = thread::current().id();
        let thread = self.thread.lock().take().filter(|thread| thread.thread().id() != own);
        thread.is_none_or(|thread| thread.join().is_ok())
    }

    fn name(&self) -> &'static str {
        "io_uring"
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

impl Shared {
    fn wake(&self) {
        let one = 1u64;
        // SAFETY: eight bytes that live through the call.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Takes the event back, so that the next one wakes again.
    fn awake(&self) {
        let mut count = 0u64;
        // SAFETY: eight bytes that live through the call.
        unsafe { libc::read(self.wake.as_raw_fd(), (&raw mut count).cast(), 8) };
    }

    /// Returns when the event has come, or an error.
    fn wait_woken(&self) {
        let mut event = libc::pollfd { fd: self.wake.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor of this object, in memory that lives through the call.
        unsafe { libc::poll(&raw mut event, 1, -1) };
        self.awake();
    }

    fn wait_idle(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut queue = self.queue.lock();
        while !queue.is_idle() {
            if self.idle.wait_until(&mut queue, end).timed_out() {
                return queue.is_idle();
            }
        }
        true
    }

    /// Ends an operation, and only then counts it as ended.
    fn end(&self, op: Op, result: io::Result<()>) {
        let access = op.access;
        if access == Access::Read {
            self.file.forget_read(op.offset, op.span(&self.arena).map_or(0, |(_, len)| len as u64));
        }
        op.end(result);
        let mut queue = self.queue.lock();
        queue.ended(access);
        if queue.is_idle() {
            self.idle.notify_all();
        }
    }
}

/// An operation that the kernel has, or that goes to it.
struct Flight {
    op: Op,
    addr: *mut u8,
    len: usize,
    moved: usize,
    tries: u32,
}

/// The ring's thread. Whatever goes wrong with the ring, no memory of an operation is let go of while the kernel may use it.
struct Driver {
    shared: Arc<Shared>,
    ring: IoUring,
    /// Slots of one registered buffer; 0 if none is registered.
    slots_per_buffer: usize,
    flights: Vec<Option<Flight>>,
    vacant: Vec<usize>,
    /// What is in the submission queue and not taken by the kernel, in order.
    unsubmitted: VecDeque<u64>,
    /// What a test wants to end with an error, as if the kernel had said so.
    refused: Vec<(usize, i32)>,
    armed: bool,
    /// How often in a row the kernel was too busy.
    busy: u32,
}

// SAFETY: the raw pointers are into memory that any thread may use and that the operations own.
unsafe impl Send for Driver {}

impl Driver {
    fn new(shared: Arc<Shared>, ring: IoUring, depth: usize) -> Driver {
        Driver {
            shared,
            ring,
            slots_per_buffer: 0,
            flights: (0..depth).map(|_| None).collect(),
            vacant: (0..depth).rev().collect(),
            unsubmitted: VecDeque::new(),
            refused: Vec::new(),
            armed: false,
            busy: 0,
        }
    }

    fn run(mut self) {
        self.slots_per_buffer = self.register_arena();
        while !self.is_over() {
            self.begin();
            if let Err(error) = self.enter() {
                return self.give_up(&error);
            }
            let ended = self.collect();
            // The device gets its next work before time is spent on what has come.
            self.begin();
            if let Err(error) = self.push_on() {
                ended.into_iter().for_each(|(op, result)| self.shared.end(op, result));
                return self.give_up(&error);
            }
            ended.into_iter().for_each(|(op, result)| self.shared.end(op, result));
        }
    }

    fn is_over(&self) -> bool {
        let queue = self.shared.queue.lock();
        queue.is_closed() && queue.is_idle()
    }

    /// Registers the arena in buffers of whole slots. Without, the kernel looks the pages up for each operation.
    fn register_arena(&self) -> usize {
        let arena = &self.shared.arena;
        let (stride, total) = (arena.stride(), arena.slots().total());
        let slots = MAX_BUFFER / stride;
        if slots == 0 || total.div_ceil(slots) > MAX_BUFFERS {
            return 0;
        }
        let base = arena.memory().addr().as_ptr();
        let buffer = |first: usize| libc::iovec {
            iov_base: base.wrapping_add(first * stride).cast(),
            iov_len: slots.min(total - first) * stride,
        };
        let buffers: Vec<_> = (0..total).step_by(slots).map(buffer).collect();
        // SAFETY: the arena is mapped as long as this thread lives, which holds it.
        match unsafe { self.ring.submitter().register_buffers(&buffers) } {
            Ok(()) => slots,
            Err(error) => {
                log::debug!("the arena is not registered with the ring: {error}");
                0
            }
        }
    }

    /// Moves operations from the queue into the submission queue.
    fn begin(&mut self) {
        if !self.armed {
            self.arm();
        }
        while let Some(&index) = self.vacant.last() {
            let Some(op) = self.shared.queue.lock().pop() else { return };
            if op.is_late() {
                self.shared.end(op, Err(op::late()));
                continue;
            }
            match op.span(&self.shared.arena) {
                Ok((addr, len)) => {
                    self.vacant.pop();
                    self.flights[index] = Some(Flight { op, addr, len, moved: 0, tries: 0 });
                    self.push(index);
                }
                Err(error) => self.shared.end(op, Err(error)),
            }
        }
    }

    /// Asks to be woken when operations come.
    fn arm(&mut self) {
        let fd = types::Fd(self.shared.wake.as_raw_fd());
        let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(WAKE);
        self.push_entry(&entry, WAKE);
        self.armed = true;
    }

    fn push(&mut self, index: usize) {
        let Some(flight) = &self.flights[index] else { return };
        let offset = flight.op.offset + flight.moved as u64;
        let len = match self.shared.file.by_ring(flight.op.access, flight.len - flight.moved) {
            Ok(len) => len as u32,
            Err(error) => return self.refused.push((index, error.raw_os_error().unwrap_or(libc::EIO))),
        };
        let addr = flight.addr.wrapping_add(flight.moved);
        let file = types::Fixed(0);
        let entry = match (flight.op.access, self.buffer_of(&flight.op)) {
            (Access::Read, Some(buffer)) => opcode::ReadFixed::new(file, addr, len, buffer).offset(offset).build(),
            (Access::Write, Some(buffer)) => opcode::WriteFixed::new(file, addr, len, buffer).offset(offset).build(),
            (Access::Read, None) => opcode::Read::new(file, addr, len).offset(offset).build(),
            (Access::Write, None) => opcode::Write::new(file, addr, len).offset(offset).build(),
        };
        self.push_entry(&entry.user_data(index as u64), index as u64);
    }

    fn buffer_of(&self, op: &Op) -> Option<u16> {
        match op.memory {
            super::Memory::Slot(slot) if self.slots_per_buffer > 0 => {
                u16::try_from(slot.0 as usize / self.slots_per_buffer).ok()
            }
            _ => None,
        }
    }

    fn push_entry(&mut self, entry: &squeue::Entry, name: u64) {
        // SAFETY: the memory that the entry names stays until its completion: the flight's operation owns or keeps it.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the ring has room for its depth and the event");
        self.unsubmitted.push_back(name);
    }

    /// Submits, and waits for at least one completion.
    fn enter(&mut self) -> io::Result<()> {
        self.submit(usize::from(self.refused.is_empty()))
    }

    fn push_on(&mut self) -> io::Result<()> {
        if self.unsubmitted.is_empty() { Ok(()) } else { self.submit(0) }
    }

    fn submit(&mut self, want: usize) -> io::Result<()> {
        let entered = self.shared.file.enter_ring();
        let outcome = entered.and_then(|()| self.ring.submitter().submit_and_wait(want));
        let left = self.ring.submission().len();
        self.unsubmitted.drain(..self.unsubmitted.len() - left);
        let Err(error) = outcome else {
            self.busy = 0;
            return Ok(());
        };
        match error.raw_os_error() {
            Some(libc::EINTR) => Ok(()),
            Some(libc::EAGAIN | libc::EBUSY) if self.busy < MAX_TRIES => {
                self.busy += 1;
                thread::sleep(BUSY_PAUSE);
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// What has ended. What has not moved all of its bytes goes on.
    fn collect(&mut self) -> Vec<(Op, io::Result<()>)> {
        let completions: Vec<cqueue::Entry> = self.ring.completion().collect();
        let mut ended = Vec::with_capacity(completions.len());
        for (index, errno) in std::mem::take(&mut self.refused) {
            ended.extend(self.advance(index, -errno));
        }
        for completion in completions {
            match completion.user_data() {
                WAKE => {
                    self.armed = false;
                    self.shared.awake();
                }
                index => ended.extend(self.advance(index as usize, completion.result())),
            }
        }
        ended
    }

    fn advance(&mut self, index: usize, returned: i32) -> Option<(Op, io::Result<()>)> {
        let flight = self.flights[index].as_mut()?;
        flight.moved += returned.max(0) as usize;
        flight.tries += 1;
        let verdict = match -returned {
            libc::EINTR | libc::EAGAIN if flight.tries < MAX_TRIES => None,
            errno @ 1.. => Some(Err(io::Error::from_raw_os_error(errno))),
            _ if flight.moved == flight.len => Some(Ok(())),
            0 => Some(Err(io::ErrorKind::UnexpectedEof.into())),
            _ if !flight.moved.is_multiple_of(ALIGNMENT) => Some(Err(io::Error::other("a part of a page was moved"))),
            _ => None,
        };
        let Some(result) = verdict else {
            self.push(index);
            return None;
        };
        self.vacant.push(index);
        self.flights[index].take().map(|flight| (flight.op, result))
    }

    /// The ring takes no more. What the kernel has is waited for, the rest is done by this thread, call by call.
    fn give_up(mut self, error: &io::Error) {
        log::warn!("{}: io_uring failed, one thread goes on without it: {error}", self.shared.file.path().display());
        for name in std::mem::take(&mut self.unsubmitted) {
            if name == WAKE {
                continue;
            }
            if let Some(flight) = self.flights[name as usize].take() {
                self.carry_out(flight.op);
            }
        }
        for (index, _) in std::mem::take(&mut self.refused) {
            if let Some(flight) = self.flights[index].take() {
                self.carry_out(flight.op);
            }
        }
        while self.flights.iter().any(Option::is_some) {
            let completions: Vec<cqueue::Entry> = self.ring.completion().collect();
            if completions.is_empty() {
                thread::sleep(Duration::from_millis(1));
            }
            for completion in completions.iter().filter(|completion| completion.user_data() != WAKE) {
                if let Some(flight) = self.flights[completion.user_data() as usize].take() {
                    // Whatever it says: once more, by a call that tells.
                    self.carry_out(flight.op);
                }
            }
        }
        self.go_on_alone();
    }

    fn go_on_alone(&self) {
        while !self.is_over() {
            let next = self.shared.queue.lock().pop();
            match next {
                Some(op) => self.carry_out(op),
                None => self.shared.wait_woken(),
            }
        }
    }

    fn carry_out(&self, op: Op) {
        let result = match op.span(&self.shared.arena) {
            _ if op.is_late() => Err(op::late()),
            // SAFETY: the operation owns or keeps its memory, and the kernel does not have it.
            Ok((addr, len)) => unsafe { psync::move_all(&self.shared.file, op.access, addr, len, op.offset) },
            Err(error) => Err(error),
        };
        self.shared.end(op, result);
    }
}

/// Writes a page to `file` by a ring and reads it back.
pub(super) fn works_on(file: BorrowedFd<'_>) -> io::Result<()> {
    let mut ring = IoUring::new(2)?;
    let mut written = Scratch::new(ALIGNMENT);
    written.iter_mut().enumerate().for_each(|(at, byte)| *byte = at as u8 ^ 0xA5);
    let read = Scratch::new(ALIGNMENT);
    let (fd, len) = (types::Fd(file.as_raw_fd()), ALIGNMENT as u32);
    for entry in [opcode::Write::new(fd, written.addr(), len).build(), opcode::Read::new(fd, read.addr(), len).build()]
    {
        // SAFETY: both buffers live until the completion has come, or the process ends.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        let moved = ring.completion().next().map_or(-libc::EIO, |completion| completion.result());
        if moved != len as i32 {
            return Err(io::Error::from_raw_os_error(if moved < 0 { -moved } else { libc::EIO }));
        }
    }
    if *read == *written { Ok(()) } else { Err(io::Error::other("a ring read back something else")) }
}
