//! Calls that fail on demand, for tests.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use super::op::Access;
use super::sys::{Real, Sys};
use crate::sync::{Arc, Mutex};

/// The kinds of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// Open a file or folder.
    Open,
    /// Make a folder.
    Mkdir,
    /// Ask about a file.
    Stat,
    /// Lock.
    Lock,
    /// Take room.
    Allocate,
    /// Set the length.
    Truncate,
    /// Flush.
    Sync,
    /// Take a name away.
    Unlink,
    /// Read.
    Read,
    /// Write.
    Write,
    /// Enter a ring.
    Ring,
}

impl Call {
    /// All that threads make.
    pub const ALL: [Call; 10] = [
        Call::Open,
        Call::Mkdir,
        Call::Stat,
        Call::Lock,
        Call::Allocate,
        Call::Truncate,
        Call::Sync,
        Call::Unlink,
        Call::Read,
        Call::Write,
    ];
}

/// What a call does instead of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Fails with this error number.
    Errno(i32),
    /// Moves at most this many bytes.
    Short(usize),
    /// Waits before its work.
    Delay(Duration),
    /// Kills this process before its work.
    KillBefore,
    /// Kills this process after its work.
    KillAfter,
}

/// Which calls are hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The kind.
    pub call: Call,
    /// The first one hit, counted from 0.
    pub first: u64,
    /// How many from there on.
    pub count: u64,
    /// What they do.
    pub effect: Effect,
}

/// A change of the file, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// Bytes at an offset.
    Bytes(u64, Vec<u8>),
    /// A new length.
    Length(u64),
    /// All before it survives a power cut.
    Sync,
}

/// What goes wrong, and how many calls there were.
#[derive(Debug, Default)]
pub struct FaultPlan {
    faults: Mutex<Vec<Fault>>,
    calls: Mutex<HashMap<Call, u64>>,
    /// Present once the test wants to know what is written.
    written: Mutex<Option<Vec<Written>>>,
}

impl FaultPlan {
    /// Replaces what goes wrong.
    pub fn set(&self, faults: &[Fault]) {
        *self.faults.lock() = faults.to_vec();
    }

    /// From now on, every call of a kind does this.
    pub fn always(&self, call: Call, effect: Effect) {
        self.faults.lock().push(Fault { call, first: 0, count: u64::MAX, effect });
    }

    /// Nothing goes wrong any more.
    pub fn clear(&self) {
        self.faults.lock().clear();
    }

    /// Calls of a kind so far.
    pub fn count(&self, call: Call) -> u64 {
        self.calls.lock().get(&call).copied().unwrap_or(0)
    }

    /// Keeps what is written from now on.
    pub fn record(&self) {
        *self.written.lock() = Some(Vec::new());
    }

    /// What was written since [`record`](Self::record).
    pub fn written(&self) -> Vec<Written> {
        self.written.lock().clone().unwrap_or_default()
    }

    fn note(&self, written: impl FnOnce() -> Written) {
        if let Some(list) = &mut *self.written.lock() {
            list.push(written());
        }
    }

    fn effect(&self, call: Call) -> Option<Effect> {
        let number = {
            let mut calls = self.calls.lock();
            let count = calls.entry(call).or_default();
            *count += 1;
            *count - 1
        };
        let hits = |fault: &&Fault| fault.call == call && number >= fault.first && number - fault.first < fault.count;
        self.faults.lock().iter().find(hits).map(|fault| fault.effect)
    }

    /// Makes a call of at most `len` bytes, or what the plan has in its place.
    fn around<T>(&self, call: Call, len: usize, work: impl FnOnce(usize) -> io::Result<T>) -> io::Result<T> {
        match self.effect(call) {
            None => work(len),
            Some(Effect::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Effect::Short(most)) => work(len.min(most)),
            Some(Effect::Delay(time)) => {
                std::thread::sleep(time);
                work(len)
            }
            Some(Effect::KillBefore) => kill_self(),
            Some(Effect::KillAfter) => {
                let _ = work(len);
                kill_self()
            }
        }
    }
}

fn kill_self() -> ! {
    // SAFETY: ends this process; nothing of it runs on.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    std::process::abort()
}

/// The system, but for what a plan says.
#[derive(Debug)]
pub(super) struct Faulty(Arc<FaultPlan>);

impl Faulty {
    pub(super) fn new(plan: Arc<FaultPlan>) -> Faulty {
        Faulty(plan)
    }
}

impl Sys for Faulty {
    fn open(&self, at: Option<BorrowedFd<'_>>, name: &CStr, flags: libc::c_int) -> io::Result<OwnedFd> {
        self.0.around(Call::Open, 0, |_| Real.open(at, name, flags))
    }

    fn make_folder(&self, at: Option<BorrowedFd<'_>>, name: &CStr) -> io::Result<()> {
        self.0.around(Call::Mkdir, 0, |_| Real.make_folder(at, name))
    }

    fn stat(&self, fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
        self.0.around(Call::Stat, 0, |_| Real.stat(fd))
    }

    fn stat_system(&self, fd: BorrowedFd<'_>) -> io::Result<libc::statvfs> {
        self.0.around(Call::Stat, 0, |_| Real.stat_system(fd))
    }

    fn lock(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.0.around(Call::Lock, 0, |_| Real.lock(fd))
    }

    fn allocate(&self, fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
        self.0.around(Call::Allocate, 0, |_| Real.allocate(fd, offset, len))?;
        self.0.note(|| Written::Length(offset + len));
        Ok(())
    }

    fn truncate(&self, fd: BorrowedFd<'_>, len: u64) -> io::Result<()> {
        self.0.around(Call::Truncate, 0, |_| Real.truncate(fd, len))?;
        self.0.note(|| Written::Length(len));
        Ok(())
    }

    fn sync(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.0.around(Call::Sync, 0, |_| Real.sync(fd))?;
        self.0.note(|| Written::Sync);
        Ok(())
    }

    fn unlink(&self, at: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        self.0.around(Call::Unlink, 0, |_| Real.unlink(at, name))
    }

    unsafe fn read(&self, fd: BorrowedFd<'_>, addr: *mut u8, len: usize, offset: u64) -> io::Result<usize> {
        // SAFETY: as the caller promises; never more than `len`.
        self.0.around(Call::Read, len, |len| unsafe { Real.read(fd, addr, len, offset) })
    }

    unsafe fn write(&self, fd: BorrowedFd<'_>, addr: *const u8, len: usize, offset: u64) -> io::Result<usize> {
        // SAFETY: as the caller promises; never more than `len`.
        let count = self.0.around(Call::Write, len, |len| unsafe { Real.write(fd, addr, len, offset) })?;
        // SAFETY: what was just written, which nobody changes during the call.
        self.0.note(|| Written::Bytes(offset, unsafe { std::slice::from_raw_parts(addr, count) }.to_vec()));
        Ok(count)
    }

    fn by_ring(&self, access: Access, len: usize) -> io::Result<usize> {
        let call = if access == Access::Read { Call::Read } else { Call::Write };
        self.0.around(call, len, Ok)
    }

    fn enter_ring(&self) -> io::Result<()> {
        self.0.around(Call::Ring, 0, |_| Ok(()))
    }
}
