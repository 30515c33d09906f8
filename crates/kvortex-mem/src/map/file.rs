//! Memory that several processes map: one file, known by what nobody else's file has.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::{ffi::CString, process};

use super::{HUGE_PAGE, huge};
use crate::error::MemError;

/// Where memory is a file with a name.
const FOLDER: &str = "/dev/shm";

/// Where memory is that several processes map, and how it is told from anything else that may be there by now: numbers that
/// a board can carry.
///
/// Without a name the file is a descriptor of the process that made it, and gone with the last who has it. Only where others
/// may not look at that process's descriptors it has a name, until [`close_door`](SharedPlace::close_door).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedPlace {
    pid: u32,
    /// `None` for a file with a name.
    descriptor: Option<u32>,
    /// Random; part of the file's name, which a file without a place in a folder has too.
    token: u64,
    device: u64,
    inode: u64,
    len: u64,
}

/// The memory at a [`SharedPlace`], held open: it stays whoever ends.
#[derive(Debug)]
pub struct SharedFile {
    file: File,
    place: SharedPlace,
    /// Whether its name goes with this.
    made_here: bool,
}

impl SharedPlace {
    /// Numbers of a place.
    pub const WORDS: usize = 5;

    /// As numbers.
    pub fn words(&self) -> [u64; SharedPlace::WORDS] {
        let descriptor = self.descriptor.map_or(0, |descriptor| u64::from(descriptor) + 1);
        [u64::from(self.pid) << 32 | descriptor, self.token, self.device, self.inode, self.len]
    }

    /// The place with these numbers.
    pub fn from_words([whose, token, device, inode, len]: [u64; SharedPlace::WORDS]) -> SharedPlace {
        let descriptor = (whose as u32).checked_sub(1);
        SharedPlace { pid: (whose >> 32) as u32, descriptor, token, device, inode, len }
    }

    /// Opens what is there if it is the very memory that was meant, of this length and this user.
    pub fn open(&self) -> Result<SharedFile, MemError> {
        let failed = |cause| MemError::NotShared { pid: self.pid, cause };
        // A descriptor's number may stand for something else by now, which is not even to be opened.
        let seen =
            if self.descriptor.is_some() { fs::metadata(self.path()) } else { fs::symlink_metadata(self.path()) };
        seen.and_then(|seen| self.check(&seen)).map_err(failed)?;
        let file = self.open_unseen().map_err(failed)?;
        Ok(SharedFile { file, place: *self, made_here: false })
    }

    fn open_unseen(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if self.descriptor.is_none() {
            options.custom_flags(libc::O_NOFOLLOW);
        }
        let file = options.open(self.path())?;
        self.check(&file.metadata()?)?;
        self.check_name(&file)?;
        Ok(file)
    }

    /// Takes the file's name away, if it has one, so that nothing is left behind. To be called once all have opened it.
    pub fn close_door(&self) {
        if self.descriptor.is_none()
            && let Err(error) = fs::remove_file(self.path())
        {
            log::debug!("{} is gone already: {error}", self.path().display());
        }
    }

    fn path(&self) -> PathBuf {
        match self.descriptor {
            Some(descriptor) => format!("/proc/{}/fd/{descriptor}", self.pid).into(),
            None => PathBuf::from(FOLDER).join(name_of(self.token)),
        }
    }

    fn check(&self, found: &Metadata) -> io::Result<()> {
        let refuse = |text: String| Err(io::Error::new(io::ErrorKind::InvalidData, text));
        // SAFETY: geteuid has no preconditions.
        if !found.is_file() || found.uid() != unsafe { libc::geteuid() } {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is not a file of this user"));
        }
        if (found.dev(), found.ino()) != (self.device, self.inode) {
            return refuse("something else has its place".to_owned());
        }
        if found.len() != self.len {
            return refuse(format!("it has {} bytes, not {}", found.len(), self.len));
        }
        Ok(())
    }

    fn check_name(&self, file: &File) -> io::Result<()> {
        let name = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        if name.to_string_lossy().contains(&name_of(self.token)) {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} has its place", name.display())))
    }
}

impl SharedFile {
    /// A file of reserved huge pages that hold `len` bytes, if they are enough and others may open it.
    pub(super) fn of_huge_pages(len: usize) -> Option<SharedFile> {
        let len = len.checked_next_multiple_of(HUGE_PAGE).filter(|&len| huge::reserved() >= len)?;
        match SharedFile::without_name(len, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) {
            Ok(shared) => shared.is_for_others().then_some(shared),
            Err(error) => {
                log::info!("no reserved huge pages: {error}");
                None
            }
        }
    }

    /// A file of `len` bytes of whatever pages there are.
    pub(super) fn of_pages(len: usize) -> Result<SharedFile, MemError> {
        let nameless = SharedFile::without_name(len, 0).inspect_err(|error| log::info!("a name is needed: {error}"));
        match nameless.ok().filter(SharedFile::is_for_others) {
            Some(shared) => Ok(shared),
            None => SharedFile::with_name(len).map_err(|cause| MemError::CannotShare { bytes: len, cause }),
        }
    }

    fn without_name(len: usize, how: libc::c_uint) -> io::Result<SharedFile> {
        let token = random()?;
        let name = CString::new(name_of(token))?;
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | how;
        // SAFETY: the name lives during the call.
        let descriptor = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        let file = unsafe { File::from_raw_fd(descriptor) };
        let shared = SharedFile::sized(file, token, len, Some(descriptor as u32))?;
        shared.seal();
        Ok(shared)
    }

    fn with_name(len: usize) -> io::Result<SharedFile> {
        let token = random()?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
        let file = options.open(PathBuf::from(FOLDER).join(name_of(token)))?;
        SharedFile::sized(file, token, len, None)
    }

    fn sized(file: File, token: u64, len: usize, descriptor: Option<u32>) -> io::Result<SharedFile> {
        let place = SharedPlace { pid: process::id(), descriptor, token, device: 0, inode: 0, len: len as u64 };
        let mut shared = SharedFile { file, place, made_here: true };
        shared.file.set_len(len as u64)?;
        let metadata = shared.file.metadata()?;
        (shared.place.device, shared.place.inode) = (metadata.dev(), metadata.ino());
        Ok(shared)
    }

    /// Where it is.
    pub fn place(&self) -> &SharedPlace {
        &self.place
    }

    /// Its length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a file of no bytes is never made")]
    pub fn len(&self) -> usize {
        self.place.len as usize
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Takes memory for all of it, so that touching it cannot end a process for want of some.
    pub(super) fn allocate(&self) -> Result<(), MemError> {
        loop {
            // SAFETY: the descriptor is open; the call touches no memory.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), 0, 0, self.place.len as libc::off_t) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EINTR) {
                return Err(MemError::CannotShare { bytes: self.len(), cause: error });
            }
        }
    }

    /// Nobody can cut it shorter under the others. Systems that cannot promise that do without.
    fn seal(&self) {
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: the descriptor is open; the call touches no memory.
        if unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            log::debug!("shared memory is not sealed: {}", io::Error::last_os_error());
        }
    }

    /// Whether other processes of this user may open it through this one.
    fn is_for_others(&self) -> bool {
        // SAFETY: asks for a number; touches no memory.
        let dumpable = unsafe { libc::prctl(libc::PR_GET_DUMPABLE) } == 1;
        dumpable && self.place.open().is_ok()
    }
}

impl Drop for SharedFile {
    /// A name that nobody took away goes with the file's maker.
    fn drop(&mut self) {
        if self.made_here && self.place.pid == process::id() {
            self.place.close_door();
        }
    }
}

fn name_of(token: u64) -> String {
    format!("kvortex-row-{token:016x}")
}

fn random() -> io::Result<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: writes at most the 8 bytes that `bytes` has.
    let found = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if found == 8 { Ok(u64::from_ne_bytes(bytes)) } else { Err(io::Error::last_os_error()) }
}
