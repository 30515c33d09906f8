//! Words of memory that several processes share: one small file that each of them maps.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::{io, slice};

use crate::error::MemError;
use crate::sync::Mutex;

/// Atomic words, zero at first: of this process alone, or of all that joined the same file.
#[derive(Debug)]
pub struct SharedWords {
    backing: Backing,
    /// Of those in this process; the file's own lock is one for all of them.
    turn: Mutex<()>,
}

#[derive(Debug)]
enum Backing {
    Private(Box<[AtomicU64]>),
    Mapped(Mapping),
}

/// Its lock is shared by the file's other users; it ends with the last of them, however they end.
#[derive(Debug)]
struct Mapping {
    base: NonNull<AtomicU64>,
    count: usize,
    path: PathBuf,
    locked: File,
    process: u32,
}

// SAFETY: the mapping is plain memory, owned by this object and reached only as atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl SharedWords {
    /// `count` words of this process.
    pub fn private(count: usize) -> SharedWords {
        SharedWords::over(Backing::Private((0..count).map(|_| AtomicU64::new(0)).collect()))
    }

    /// `count` words in the file at `path`, made if nobody uses it. What a process that died left there is wiped.
    ///
    /// Fails if the file is another user's, a link, or in use with another number of words.
    pub fn join(path: &Path, count: usize) -> Result<SharedWords, MemError> {
        let failed = |cause: io::Error| MemError::Shared { path: path.display().to_string(), cause };
        loop {
            let file = open(path).map_err(failed)?;
            if let Some(file) = settle(file, count).map_err(failed)? {
                let base = map(&file, count).map_err(failed)?;
                let (path, process) = (path.to_owned(), std::process::id());
                let mapping = Mapping { base, count, path, locked: file, process };
                return Ok(SharedWords::over(Backing::Mapped(mapping)));
            }
        }
    }

    fn over(backing: Backing) -> SharedWords {
        SharedWords { backing, turn: Mutex::new(()) }
    }

    /// Does `work` while none of the others who joined does theirs. Who dies in it lets the next one begin.
    pub fn alone<T>(&self, work: impl FnOnce() -> T) -> Result<T, MemError> {
        let _turn = self.turn.lock();
        let _alone = match &self.backing {
            Backing::Private(_) => None,
            Backing::Mapped(mapping) => Some(Alone::wait(mapping)?),
        };
        Ok(work())
    }

    /// The words.
    pub fn words(&self) -> &[AtomicU64] {
        match &self.backing {
            Backing::Private(words) => words,
            // SAFETY: the mapping holds `count` words as long as this object lives; others use them as atomics only.
            Backing::Mapped(mapping) => unsafe { slice::from_raw_parts(mapping.base.as_ptr(), mapping.count) },
        }
    }

    /// Takes the file's name away, so that nobody else can join and nothing is left behind.
    pub fn close_door(&self) {
        if let Backing::Mapped(mapping) = &self.backing
            && let Err(error) = fs::remove_file(&mapping.path)
        {
            log::debug!("{} is gone already: {error}", mapping.path.display());
        }
    }
}

/// A lock of the file, apart from the one that says who uses it, until dropped.
struct Alone<'a>(&'a File);

impl Alone<'_> {
    fn wait(mapping: &Mapping) -> Result<Alone<'_>, MemError> {
        while let Err(cause) = lock_record(&mapping.locked, libc::F_WRLCK) {
            if cause.kind() != io::ErrorKind::Interrupted {
                return Err(MemError::Shared { path: mapping.path.display().to_string(), cause });
            }
        }
        Ok(Alone(&mapping.locked))
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        if let Err(error) = lock_record(self.0, libc::F_UNLCK) {
            log::warn!("a lock between processes is kept: {error}");
        }
    }
}

/// Waits for a lock that belongs to `file` as it was opened, and not to the process.
fn lock_record(file: &File, how: libc::c_int) -> io::Result<()> {
    // SAFETY: plain numbers, all of them 0 where they are not set.
    let mut record: libc::flock = unsafe { std::mem::zeroed() };
    (record.l_type, record.l_whence) = (how as libc::c_short, libc::SEEK_SET as libc::c_short);
    // SAFETY: the descriptor is open, and `record` lives during the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLKW, &record) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, and nothing borrowed from it outlives it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.count * size_of::<AtomicU64>()) };
        // A child that is about to become another program holds the file for a moment, and must not hold the lock.
        if std::process::id() == self.process {
            let _ = lock(&self.locked, libc::LOCK_UN);
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC).open(path)?;
    let metadata = file.metadata()?;
    // SAFETY: geteuid has no preconditions.
    if !metadata.is_file() || metadata.uid() != unsafe { libc::geteuid() } {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is not a file of this user"));
    }
    Ok(file)
}

/// The file with its final length and a shared lock; `None` if it was taken away or wiped meanwhile.
fn settle(file: File, count: usize) -> io::Result<Option<File>> {
    let bytes = (count * size_of::<AtomicU64>()) as u64;
    if lock(&file, libc::LOCK_EX | libc::LOCK_NB)? {
        file.set_len(0)?;
        // SAFETY: the descriptor is open; the call touches no memory.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as libc::off_t) } {
            0 => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
    lock(&file, libc::LOCK_SH)?;
    let metadata = file.metadata()?;
    if metadata.nlink() == 0 || metadata.len() == 0 {
        return Ok(None);
    }
    if metadata.len() != bytes {
        let text = format!("it has {} bytes, not {bytes}: it is in use by another version or setup", metadata.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(Some(file))
}

/// False if somebody else has the lock and `how` does not wait.
fn lock(file: &File, how: libc::c_int) -> io::Result<bool> {
    loop {
        // SAFETY: the descriptor is open; the call touches no memory.
        if unsafe { libc::flock(file.as_raw_fd(), how) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EWOULDBLOCK) => return Ok(false),
            Some(libc::EINTR) => {}
            _ => return Err(error),
        }
    }
}

fn map(file: &File, count: usize) -> io::Result<NonNull<AtomicU64>> {
    let (bytes, access) = (count * size_of::<AtomicU64>(), libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: a new mapping of an open file at an address of the system's choice touches nothing that exists.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("kvortex-test-{name}-{}", std::process::id()))
    }

    #[test]
    fn who_joins_sees_what_others_wrote() {
        let path = path("join");
        let one = SharedWords::join(&path, 8).unwrap();
        one.words()[3].store(7, Ordering::Release);
        let two = SharedWords::join(&path, 8).unwrap();
        assert_eq!(two.words()[3].load(Ordering::Acquire), 7);
        two.close_door();
        assert!(!path.exists());
        let apart = SharedWords::join(&path, 8).unwrap();
        assert_eq!(apart.words()[3].load(Ordering::Acquire), 0, "the name belongs to others now");
        apart.close_door();
        one.close_door();
    }

    #[test]
    fn what_the_dead_left_is_wiped() {
        let path = path("wipe");
        SharedWords::join(&path, 8).unwrap().words()[0].store(7, Ordering::Release);
        let next = SharedWords::join(&path, 4).unwrap();
        assert!(next.words().iter().all(|word| word.load(Ordering::Acquire) == 0));
        next.close_door();
    }

    #[test]
    fn one_works_alone_and_the_others_wait() {
        let path = path("alone");
        let all: Vec<_> = (0..3).map(|_| SharedWords::join(&path, 2).unwrap()).collect();
        all[0].close_door();
        let step = |words: &SharedWords| {
            let seen = words.words()[0].load(Ordering::Relaxed);
            std::thread::yield_now();
            words.words()[0].store(seen + 1, Ordering::Relaxed);
        };
        std::thread::scope(|scope| {
            let work = |words| move || (0..200).for_each(|_| SharedWords::alone(words, || step(words)).unwrap());
            let threads: Vec<_> = all.iter().chain(&all).map(|words| scope.spawn(work(words))).collect();
            // The sanitizer sees a join, and not the end of a scope.
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
        assert_eq!(all[1].words()[0].load(Ordering::Relaxed), 6 * 200);
        assert_eq!(SharedWords::private(1).alone(|| 7).unwrap(), 7);
    }

    #[test]
    fn another_setup_and_a_link_are_refused() {
        let path = path("refuse");
        let words = SharedWords::join(&path, 8).unwrap();
        let refused = SharedWords::join(&path, 16).unwrap_err().to_string();
        assert!(refused.contains("64 bytes, not 128"), "{refused}");
        words.close_door();
        let target = path.with_extension("target");
        fs::write(&target, [0; 64]).unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        assert!(SharedWords::join(&path, 8).is_err());
        fs::remove_file(&path).unwrap();
        fs::remove_file(&target).unwrap();
    }
}
