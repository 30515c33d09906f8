//! The system calls of a slab, one method each, so that a test can fail any of them.

use std::ffi::CStr;
use std::fmt::Debug;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::op::Access;

/// What is asked of the system. Every method is one call.
pub(crate) trait Sys: Debug + Send + Sync {
    /// Opens `name` in the folder `at`, or from the current folder without one. Never follows a link at the end of the name.
    fn open(&self, at: Option<BorrowedFd<'_>>, name: &CStr, flags: libc::c_int) -> io::Result<OwnedFd>;
    /// Makes a folder that only its owner can enter.
    fn make_folder(&self, at: Option<BorrowedFd<'_>>, name: &CStr) -> io::Result<()>;
    /// What the system knows of an open file.
    fn stat(&self, fd: BorrowedFd<'_>) -> io::Result<libc::stat>;
    /// What the system knows of the file system of an open file.
    fn stat_system(&self, fd: BorrowedFd<'_>) -> io::Result<libc::statvfs>;
    /// Locks a file against every other opening of it; `WouldBlock` if somebody has it.
    fn lock(&self, fd: BorrowedFd<'_>) -> io::Result<()>;
    /// Takes room for the bytes from `offset` on, so that writing there cannot run out of it.
    fn allocate(&self, fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()>;
    /// Sets the length of a file.
    fn truncate(&self, fd: BorrowedFd<'_>, len: u64) -> io::Result<()>;
    /// Returns when what was written would survive a power cut.
    fn sync(&self, fd: BorrowedFd<'_>) -> io::Result<()>;
    /// Takes a name away.
    fn unlink(&self, at: BorrowedFd<'_>, name: &CStr) -> io::Result<()>;
    /// Reads up to `len` bytes.
    ///
    /// # Safety
    ///
    /// `len` bytes from `addr` are valid for writes during the call, and nobody else uses them.
    unsafe fn read(&self, fd: BorrowedFd<'_>, addr: *mut u8, len: usize, offset: u64) -> io::Result<usize>;
    /// Writes up to `len` bytes.
    ///
    /// # Safety
    ///
    /// `len` bytes from `addr` are valid for reads during the call, and nobody writes them.
    unsafe fn write(&self, fd: BorrowedFd<'_>, addr: *const u8, len: usize, offset: u64) -> io::Result<usize>;
    /// Asked before a ring is given `len` bytes to move: how many it is given, or how the ring is to end that.
    fn by_ring(&self, _access: Access, len: usize) -> io::Result<usize> {
        Ok(len)
    }
    /// Asked before a ring is entered: whether that fails.
    fn enter_ring(&self) -> io::Result<()> {
        Ok(())
    }
    /// Tells the system that the pages of a range are not needed in its cache. Never fails.
    fn forget(&self, fd: BorrowedFd<'_>, offset: u64, len: u64) {
        // SAFETY: the descriptor is open; the call touches no memory.
        unsafe { libc::posix_fadvise(fd.as_raw_fd(), offset as i64, len as i64, libc::POSIX_FADV_DONTNEED) };
    }
}

/// The system itself.
#[derive(Debug)]
pub(crate) struct Real;

impl Sys for Real {
    fn open(&self, at: Option<BorrowedFd<'_>>, name: &CStr, flags: libc::c_int) -> io::Result<OwnedFd> {
        let flags = flags | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: the name ends with a zero and the descriptor is open.
        let fd = told(unsafe { libc::openat(folder(at), name.as_ptr(), flags, 0o600) } as isize)?;
        // SAFETY: a new descriptor, which nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    fn make_folder(&self, at: Option<BorrowedFd<'_>>, name: &CStr) -> io::Result<()> {
        // SAFETY: as in `open`.
        told(unsafe { libc::mkdirat(folder(at), name.as_ptr(), 0o700) } as isize).map(drop)
    }

    fn stat(&self, fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
        let mut stat = std::mem::MaybeUninit::uninit();
        // SAFETY: `stat` has room for what the call writes.
        told(unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) } as isize)?;
        // SAFETY: the call succeeded, so it was written.
        Ok(unsafe { stat.assume_init() })
    }

    fn stat_system(&self, fd: BorrowedFd<'_>) -> io::Result<libc::statvfs> {
        let mut stat = std::mem::MaybeUninit::uninit();
        // SAFETY: `stat` has room for what the call writes.
        told(unsafe { libc::fstatvfs(fd.as_raw_fd(), stat.as_mut_ptr()) } as isize)?;
        // SAFETY: the call succeeded, so it was written.
        Ok(unsafe { stat.assume_init() })
    }

    fn lock(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: the descriptor is open; the call touches no memory.
        told(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } as isize).map(drop)
    }

    fn allocate(&self, fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
        // SAFETY: as in `lock`.
        told(unsafe { libc::fallocate(fd.as_raw_fd(), 0, offset as i64, len as i64) } as isize).map(drop)
    }

    fn truncate(&self, fd: BorrowedFd<'_>, len: u64) -> io::Result<()> {
        // SAFETY: as in `lock`.
        told(unsafe { libc::ftruncate(fd.as_raw_fd(), len as i64) } as isize).map(drop)
    }

    fn sync(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: as in `lock`.
        told(unsafe { libc::fdatasync(fd.as_raw_fd()) } as isize).map(drop)
    }

    fn unlink(&self, at: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        // SAFETY: as in `open`.
        told(unsafe { libc::unlinkat(at.as_raw_fd(), name.as_ptr(), 0) } as isize).map(drop)
    }

    unsafe fn read(&self, fd: BorrowedFd<'_>, addr: *mut u8, len: usize, offset: u64) -> io::Result<usize> {
        // SAFETY: as the caller promises.
        told(unsafe { libc::pread(fd.as_raw_fd(), addr.cast(), len, offset as i64) }).map(|n| n as usize)
    }

    unsafe fn write(&self, fd: BorrowedFd<'_>, addr: *const u8, len: usize, offset: u64) -> io::Result<usize> {
        // SAFETY: as the caller promises.
        told(unsafe { libc::pwrite(fd.as_raw_fd(), addr.cast(), len, offset as i64) }).map(|n| n as usize)
    }
}

fn folder(at: Option<BorrowedFd<'_>>) -> libc::c_int {
    at.map_or(libc::AT_FDCWD, |at| at.as_raw_fd())
}

/// What a call returned, or why it failed.
fn told(returned: isize) -> io::Result<isize> {
    if returned >= 0 { Ok(returned) } else { Err(io::Error::last_os_error()) }
}

/// Makes every call of another until it is not interrupted.
#[derive(Debug)]
pub(crate) struct Patient<S>(pub(crate) S);

fn again<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            ended => return ended,
        }
    }
}

impl<S: Sys> Sys for Patient<S> {
    fn open(&self, at: Option<BorrowedFd<'_>>, name: &CStr, flags: libc::c_int) -> io::Result<OwnedFd> {
        again(|| self.0.open(at, name, flags))
    }

    fn make_folder(&self, at: Option<BorrowedFd<'_>>, name: &CStr) -> io::Result<()> {
        again(|| self.0.make_folder(at, name))
    }

    fn stat(&self, fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
        again(|| self.0.stat(fd))
    }

    fn stat_system(&self, fd: BorrowedFd<'_>) -> io::Result<libc::statvfs> {
        again(|| self.0.stat_system(fd))
    }

    fn lock(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        again(|| self.0.lock(fd))
    }

    fn allocate(&self, fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
        again(|| self.0.allocate(fd, offset, len))
    }

    fn truncate(&self, fd: BorrowedFd<'_>, len: u64) -> io::Result<()> {
        again(|| self.0.truncate(fd, len))
    }

    fn sync(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        again(|| self.0.sync(fd))
    }

    fn unlink(&self, at: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        again(|| self.0.unlink(at, name))
    }

    unsafe fn read(&self, fd: BorrowedFd<'_>, addr: *mut u8, len: usize, offset: u64) -> io::Result<usize> {
        // SAFETY: as the caller promises.
        again(|| unsafe { self.0.read(fd, addr, len, offset) })
    }

    unsafe fn write(&self, fd: BorrowedFd<'_>, addr: *const u8, len: usize, offset: u64) -> io::Result<usize> {
        // SAFETY: as the caller promises.
        again(|| unsafe { self.0.write(fd, addr, len, offset) })
    }

    // A ring is patient by itself.
    fn by_ring(&self, access: Access, len: usize) -> io::Result<usize> {
        self.0.by_ring(access, len)
    }

    fn enter_ring(&self) -> io::Result<()> {
        self.0.enter_ring()
    }
}
