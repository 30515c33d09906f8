//! One file of blocks, in a folder of its own.

use std::ffi::{CStr, CString, OsStr};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::op::Access;
use super::sys::{Patient, Real, Sys};
use super::{ALIGNMENT, Scratch, psync, uring};
use crate::error::MemError;
use crate::sync::Arc;

/// The folder inside the user's, named after the version of what lies in it.
const FOLDER: &CStr = c"v1";
const FILE: &CStr = c"blocks";
const PROBE: &CStr = c"probe";

/// What to open.
#[derive(Clone)]
pub struct SlabOptions {
    /// The user's folder; made, for its owner alone, if it is not there.
    pub folder: PathBuf,
    /// Whether it lies in a folder that is made as well, and must be the user's own too.
    nested: bool,
    /// False goes through the system's page cache.
    pub direct: bool,
    /// False only opens what is there, and writes nothing.
    pub create: bool,
    sys: Arc<dyn Sys>,
}

impl fmt::Debug for SlabOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlabOptions({}, direct {}, create {})", self.folder.display(), self.direct, self.create)
    }
}

impl SlabOptions {
    /// The usual ones for `folder`.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>) -> SlabOptions {
        SlabOptions { folder: folder.into(), nested: false, direct: true, create: true, sys: Arc::new(Patient(Real)) }
    }

    /// As these, for a folder `name` in that one.
    #[must_use]
    pub fn inside(self, name: &str) -> SlabOptions {
        SlabOptions { folder: self.folder.join(name), nested: true, ..self }
    }

    /// Opens the folder.
    fn enter(&self) -> io::Result<OwnedFd> {
        let named = |path: &OsStr| CString::new(path.as_bytes()).map_err(io::Error::from);
        let enter = |at: Option<BorrowedFd<'_>>, path: &OsStr| enter(&*self.sys, at, &named(path)?, self.create);
        match (self.folder.parent(), self.folder.file_name()) {
            (Some(parent), Some(name)) if self.nested => {
                let parent = enter(None, parent.as_os_str())?;
                enter(Some(parent.as_fd()), name)
            }
            _ => enter(None, self.folder.as_os_str()),
        }
    }

    /// As these, with calls that fail as `plan` says.
    #[cfg(any(test, feature = "suite"))]
    #[must_use]
    pub fn with_faults(self, plan: &Arc<super::FaultPlan>) -> SlabOptions {
        SlabOptions { sys: Arc::new(Patient(super::faults::Faulty::new(Arc::clone(plan)))), ..self }
    }
}

/// A file of blocks that is open and locked: no other opening of its folder succeeds as long as this lives.
pub struct SlabFile {
    path: PathBuf,
    sys: Arc<dyn Sys>,
    folder: OwnedFd,
    file: OwnedFd,
    direct: bool,
    ring: bool,
    process: u32,
}

impl fmt::Debug for SlabFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlabFile({}, {})", self.path.display(), if self.direct { "direct" } else { "buffered" })
    }
}

impl Drop for SlabFile {
    fn drop(&mut self) {
        // A child that is about to become another program holds the folder for a moment, and must not hold the lock.
        if std::process::id() == self.process {
            self.unlock();
        }
    }
}

impl SlabFile {
    /// Opens the file of a folder, and learns by writing and reading there whether direct I/O and the ring work.
    ///
    /// # Errors
    /// When the folder is a link, somebody else's, open to others, locked, or cannot be used.
    pub fn open(options: &SlabOptions) -> Result<SlabFile, MemError> {
        let failed = |cause| MemError::Disk { path: options.folder.display().to_string(), cause };
        let SlabOptions { folder: path, sys, .. } = options;
        let outer = options.enter().map_err(failed)?;
        let folder = enter(&**sys, Some(outer.as_fd()), FOLDER, options.create).map_err(failed)?;
        sys.lock(folder.as_fd()).map_err(taken).map_err(failed)?;
        let direct = options.direct && options.create && probe(sys, folder.as_fd()).map_err(failed)?;
        let flags = if options.create { libc::O_RDWR | libc::O_CREAT } else { libc::O_RDONLY };
        let flags = if direct { flags | libc::O_DIRECT } else { flags };
        let file = sys.open(Some(folder.as_fd()), FILE, flags).map_err(failed)?;
        let (path, sys, process) = (path.clone(), Arc::clone(sys), std::process::id());
        let mut slab = SlabFile { path, sys, folder, file, direct, ring: false, process };
        slab.check_own().map_err(failed)?;
        slab.ring = options.create && slab.probe_ring();
        Ok(slab)
    }

    /// The user's folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether bytes pass by the system's page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether a ring wrote and read in this folder.
    pub(super) fn ring_works(&self) -> bool {
        self.ring
    }

    /// Lets others open the folder, since the file has lost its name.
    pub fn unlock(&self) {
        // SAFETY: the descriptor is open; the call touches no memory.
        unsafe { libc::flock(self.folder.as_raw_fd(), libc::LOCK_UN) };
    }

    /// Length of the file, and the bytes that it takes on the device.
    ///
    /// # Errors
    /// What the system says.
    pub fn size(&self) -> io::Result<(u64, u64)> {
        let stat = self.sys.stat(self.file.as_fd())?;
        Ok((stat.st_size as u64, stat.st_blocks as u64 * 512))
    }

    /// Whether the file still has its name in its folder.
    ///
    /// # Errors
    /// What the system says.
    pub fn is_linked(&self) -> io::Result<bool> {
        Ok(self.sys.stat(self.file.as_fd())?.st_nlink > 0)
    }

    /// Bytes that the file system has left for this user, and bytes that it has in all.
    ///
    /// # Errors
    /// What the system says.
    pub fn left(&self) -> io::Result<(u64, u64)> {
        let stat = self.sys.stat_system(self.file.as_fd())?;
        Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
    }

    /// Makes the file `len` bytes long, with room for all of them taken. Where a file system cannot take room ahead, the file
    /// only becomes longer.
    ///
    /// # Errors
    /// What the system says; the file is then as long as before.
    pub fn grow(&self, len: u64) -> io::Result<()> {
        let (old, _) = self.size()?;
        if len <= old {
            return Ok(());
        }
        match self.sys.allocate(self.file.as_fd(), old, len - old) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                self.sys.truncate(self.file.as_fd(), len)
            }
            Err(error) => {
                // Some file systems keep what they could take.
                let _ = self.sys.truncate(self.file.as_fd(), old);
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }

    /// Cuts the file to `len` bytes.
    ///
    /// # Errors
    /// What the system says.
    pub fn cut(&self, len: u64) -> io::Result<()> {
        self.sys.truncate(self.file.as_fd(), len)
    }

    /// Returns when what was written would survive a power cut.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&self) -> io::Result<()> {
        self.sys.sync(self.file.as_fd())?;
        if !self.direct {
            self.sys.forget(self.file.as_fd(), 0, 0);
        }
        Ok(())
    }

    /// Fills `scratch` from `offset`, now.
    ///
    /// # Errors
    /// What the system says; the end of the file is an error.
    pub fn read_now(&self, scratch: &mut Scratch, offset: u64) -> io::Result<()> {
        // SAFETY: the scratch is borrowed exclusively.
        unsafe { psync::move_all(self, Access::Read, scratch.addr(), scratch.len(), offset) }
    }

    /// Writes `scratch` at `offset`, now.
    ///
    /// # Errors
    /// What the system says.
    pub fn write_now(&self, scratch: &Scratch, offset: u64) -> io::Result<()> {
        // SAFETY: a write only reads the memory, which is borrowed.
        unsafe { psync::move_all(self, Access::Write, scratch.addr(), scratch.len(), offset) }
    }

    /// One call.
    ///
    /// # Safety
    ///
    /// As [`psync::move_all`].
    pub(super) unsafe fn transfer(&self, access: Access, addr: *mut u8, len: usize, at: u64) -> io::Result<usize> {
        // SAFETY: as the caller promises.
        unsafe { call(&*self.sys, access, self.file.as_fd(), (addr, len), at) }
    }

    /// Lets the page cache go of what was read, if it went there.
    pub(super) fn forget_read(&self, offset: u64, len: u64) {
        if !self.direct {
            self.sys.forget(self.file.as_fd(), offset, len);
        }
    }

    /// How many of `len` bytes a ring is given at once, or how it is to end what it is not given.
    pub(super) fn by_ring(&self, access: Access, len: usize) -> io::Result<usize> {
        self.sys.by_ring(access, len)
    }

    /// Whether a ring may be entered.
    pub(super) fn enter_ring(&self) -> io::Result<()> {
        self.sys.enter_ring()
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn check_own(&self) -> io::Result<()> {
        let stat = self.sys.stat(self.file.as_fd())?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFREG || stat.st_uid != own_user() {
            return Err(refused("its file `blocks` is not a file of this user: remove it"));
        }
        Ok(())
    }

    /// Whether a ring can write and read here, with the flags that the blocks' file is opened with.
    fn probe_ring(&self) -> bool {
        let flags = libc::O_RDWR | libc::O_CREAT | if self.direct { libc::O_DIRECT } else { 0 };
        let Ok(file) = self.sys.open(Some(self.folder.as_fd()), PROBE, flags) else { return false };
        let works = uring::works_on(file.as_fd());
        let _ = self.sys.unlink(self.folder.as_fd(), PROBE);
        // A ring that tells of no room works.
        works.map_or_else(|error| is_full(&error), |()| true)
    }
}

/// # Safety
///
/// As [`psync::move_all`], of one call.
unsafe fn call(
    sys: &dyn Sys,
    access: Access,
    fd: BorrowedFd<'_>,
    (addr, len): (*mut u8, usize),
    at: u64,
) -> io::Result<usize> {
    // SAFETY: as the caller promises.
    unsafe {
        match access {
            Access::Read => sys.read(fd, addr, len, at),
            Access::Write => sys.write(fd, addr, len, at),
        }
    }
}

/// Opens a folder of this user, made if it may be.
fn enter(sys: &dyn Sys, at: Option<BorrowedFd<'_>>, name: &CStr, create: bool) -> io::Result<OwnedFd> {
    if create {
        match sys.make_folder(at, name) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    let folder = sys.open(at, name, libc::O_RDONLY | libc::O_DIRECTORY).map_err(no_folder)?;
    let stat = sys.stat(folder.as_fd())?;
    if stat.st_uid != own_user() {
        return Err(refused("it belongs to another user: give a folder of your own"));
    }
    if stat.st_mode & 0o022 != 0 {
        return Err(refused("others may write there: chmod go-w it"));
    }
    Ok(folder)
}

/// Whether direct I/O works in a folder. An error is one that says that nothing works there.
fn probe(sys: &Arc<dyn Sys>, folder: BorrowedFd<'_>) -> io::Result<bool> {
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_DIRECT;
    let file = match sys.open(Some(folder), PROBE, flags) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(false),
        Err(error) => return Err(error),
    };
    let mut written = Scratch::new(ALIGNMENT);
    written.iter_mut().enumerate().for_each(|(at, byte)| *byte = at as u8 ^ 0x5A);
    let read = Scratch::new(ALIGNMENT);
    // SAFETY: both are whole and owned here.
    let moved = unsafe {
        call(&**sys, Access::Write, file.as_fd(), (written.addr(), ALIGNMENT), 0)
            .and_then(|_| call(&**sys, Access::Read, file.as_fd(), (read.addr(), ALIGNMENT), 0))
    };
    let _ = sys.unlink(folder, PROBE);
    match moved {
        Ok(moved) => Ok(moved == ALIGNMENT && *read == *written),
        // The file system took the flag and has no room: what it has kept can be read.
        Err(error) => Ok(is_full(&error)),
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

fn own_user() -> libc::uid_t {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() }
}

fn refused(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

fn taken(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock {
        return io::Error::new(
            error.kind(),
            "another process uses it: end that one, or give each engine a folder of its own",
        );
    }
    error
}

fn no_folder(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::NotADirectory {
        return io::Error::new(error.kind(), "it is a link or a file: give the path of a folder itself");
    }
    error
}
