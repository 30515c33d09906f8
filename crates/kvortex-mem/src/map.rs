//! Anonymous host memory: aligned for huge pages, bound to a NUMA node, touched before use.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::device::Device;
use crate::error::MemError;
use crate::numa;
use crate::pin::Pin;
use crate::sync::Arc;

const HUGE_PAGE: usize = 2 << 20;

/// Touching threads take pieces of this size: small enough to share the work evenly, large enough that a system call per
/// piece does not show.
const TOUCH_PIECE: usize = 64 << 20;

/// What to map, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapOptions {
    /// Bytes; rounded up to whole system pages.
    pub bytes: usize,
    /// Ask for transparent huge pages. False leaves it to the system's default.
    pub huge_pages: bool,
    /// The NUMA node whose memory is preferred; `None` leaves it to the system.
    pub numa_node: Option<u32>,
    /// Threads that fill the mapping with pages before [`HostMemory::map`] returns. 0 takes pages as they are first used and
    /// skips the check of available memory.
    pub touch_threads: usize,
}

/// Whether host memory is pinned for a GPU's copy engines.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pinned {
    /// Plain memory.
    No {
        /// Why.
        reason: String,
    },
    /// Page-locked for this device.
    Yes {
        /// Number of the device.
        device: u32,
    },
}

/// A private anonymous mapping, zeroed, given back to the system on drop.
///
/// A forked child sees the bytes as they were at the fork.
#[derive(Debug)]
pub struct HostMemory {
    addr: NonNull<u8>,
    len: usize,
    node: Option<u32>,
    /// Page-locked, plain, or plain because it was refused.
    pin: Result<Option<Pin>, String>,
}

// SAFETY: the mapping is plain memory, owned by this object and reached by others only through raw pointers.
unsafe impl Send for HostMemory {}
// SAFETY: as above; no method reads or writes the bytes after `map` has returned.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Maps and touches memory.
    ///
    /// Fails with [`MemError::TooLarge`] before taking anything if the machine or its control group has not that much left,
    /// because the system would not refuse but end the process halfway through.
    pub fn map(options: &MapOptions) -> Result<HostMemory, MemError> {
        let len = mapped_len(options)?;
        let error = |source| MemError::Map { bytes: options.bytes, source };
        let addr = reserve(len).map_err(error)?;
        let mut memory = HostMemory { addr, len, node: None, pin: Ok(None) };
        if options.huge_pages {
            memory.advise_huge_pages();
        }
        memory.node = options.numa_node.filter(|&node| memory.bind(node));
        touch(&memory, options.touch_threads).map_err(error)?;
        Ok(memory)
    }

    /// Address of the first byte.
    pub fn addr(&self) -> NonNull<u8> {
        self.addr
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that lie in huge pages now; 0 where the system does not tell. Reads `/proc/self/smaps`, which takes
    /// milliseconds in a large process.
    pub fn huge_page_bytes(&self) -> usize {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let start = self.addr.as_ptr() as usize;
        huge_bytes_in(&smaps, start..start + self.len)
    }

    /// The node whose memory is preferred, if the system took the wish.
    pub fn numa_node(&self) -> Option<u32> {
        self.node
    }

    /// Whether the memory is pinned for a GPU.
    pub fn pinned(&self) -> Pinned {
        match &self.pin {
            Ok(Some(pin)) => Pinned::Yes { device: pin.device().info().ordinal },
            Ok(None) => Pinned::No { reason: "no CUDA device: plain memory".to_owned() },
            Err(reason) => Pinned::No { reason: reason.clone() },
        }
    }

    /// Page-locks the memory for `device`. Whoever copies from or to it keeps this object alive.
    ///
    /// If the system refuses, the memory stays what it was, and [`pinned`](HostMemory::pinned) says why.
    pub fn pin(&mut self, device: &Arc<dyn Device>) -> Result<(), MemError> {
        self.pin = Ok(None);
        // SAFETY: the mapping lives until this object is dropped, and drops the pin before it is unmapped.
        match unsafe { Pin::new(device, self.addr, self.len) } {
            Ok(pin) => {
                self.pin = Ok(Some(pin));
                Ok(())
            }
            Err(error) => {
                self.pin = Err(error.to_string());
                Err(error)
            }
        }
    }

    /// As [`pin`](HostMemory::pin), where memory that may not be page-locked is a warning: copies are then slow but right.
    pub fn pin_or_warn(&mut self, device: &Arc<dyn Device>) {
        if let Err(error) = self.pin(device) {
            log::warn!("copies between this memory and {} will be slow: {error}", device.info().name);
        }
    }

    fn advise_huge_pages(&self) {
        // SAFETY: the range is this mapping; the advice changes no bytes.
        let rc = unsafe { libc::madvise(self.addr.as_ptr().cast(), self.len, libc::MADV_HUGEPAGE) };
        if rc != 0 {
            log::info!("no transparent huge pages: {}", io::Error::last_os_error());
        }
    }

    /// True if `node` is preferred from now on. Machines with one node have nothing to choose.
    fn bind(&self, node: u32) -> bool {
        if numa::node_count() < 2 {
            return true;
        }
        match numa::prefer(self.addr, self.len, node) {
            Ok(()) => true,
            Err(error) => {
                log::warn!("memory is not bound to NUMA node {node}: {error}");
                false
            }
        }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        self.pin = Ok(None);
        // SAFETY: the range is this mapping and nothing uses it any more: users keep this object alive.
        unsafe { libc::munmap(self.addr.as_ptr().cast(), self.len) };
    }
}

fn mapped_len(options: &MapOptions) -> Result<usize, MemError> {
    let bytes = options.bytes;
    if bytes == 0 {
        return Err(MemError::ZeroBytes { what: "the memory to map" });
    }
    let available = numa::available_memory();
    let len = bytes.checked_next_multiple_of(page_bytes()).ok_or(MemError::TooLarge { bytes, available })?;
    if options.touch_threads > 0 && len > available {
        return Err(MemError::TooLarge { bytes, available });
    }
    if let Some(node) = options.numa_node {
        numa::check_node(node)?;
    }
    Ok(len)
}

/// The system's page size in bytes, at least 4 KiB.
fn page_bytes() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096).max(4096)
}

/// Maps `len` bytes, at a multiple of the huge page size if they fill one.
fn reserve(len: usize) -> io::Result<NonNull<u8>> {
    if len < HUGE_PAGE {
        return map_anonymous(len);
    }
    let padded = len.checked_add(HUGE_PAGE).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    let start = map_anonymous(padded)?;
    let skip = start.align_offset(HUGE_PAGE);
    unmap(start, 0..skip);
    unmap(start, skip + len..padded);
    // SAFETY: `skip` is less than the padding.
    Ok(unsafe { start.add(skip) })
}

fn map_anonymous(len: usize) -> io::Result<NonNull<u8>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping at an address of the system's choice touches nothing that exists.
    let addr = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
    if addr == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(addr.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))
}

fn unmap(start: NonNull<u8>, range: std::ops::Range<usize>) {
    if !range.is_empty() {
        // SAFETY: called with the unused ends of a mapping that was just made and that nobody else knows.
        unsafe { libc::munmap(start.as_ptr().add(range.start).cast(), range.len()) };
    }
}

/// Fills the whole mapping with pages.
fn touch(memory: &HostMemory, threads: usize) -> io::Result<()> {
    let pieces = memory.len.div_ceil(TOUCH_PIECE);
    let next = AtomicUsize::new(0);
    let work = || -> io::Result<()> {
        loop {
            let start = next.fetch_add(1, Ordering::Relaxed).saturating_mul(TOUCH_PIECE);
            if start >= memory.len {
                return Ok(());
            }
            populate(memory, start, TOUCH_PIECE.min(memory.len - start))?;
        }
    };
    if threads == 0 {
        return Ok(());
    }
    thread::scope(|scope| {
        let start = |index| thread::Builder::new().name(format!("kvortex-touch-{index}")).spawn_scoped(scope, work);
        // A thread that cannot be started leaves its share to the others and to this one.
        let others: Vec<_> = (1..threads.min(pieces)).map_while(|index| start(index).ok()).collect();
        let own = work();
        others.into_iter().fold(own, |result, other| {
            result.and(other.join().unwrap_or_else(|_| Err(io::Error::other("a touching thread panicked"))))
        })
    })
}

fn populate(memory: &HostMemory, start: usize, len: usize) -> io::Result<()> {
    // SAFETY: callers pass a piece of the mapping.
    let addr = unsafe { memory.addr.as_ptr().add(start) };
    loop {
        // SAFETY: the range is a piece of the mapping; filling it changes no bytes.
        if unsafe { libc::madvise(addr.cast(), len, libc::MADV_POPULATE_WRITE) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => continue,
            // Before Linux 5.14, and in sandboxes that answer unknown calls in their own way.
            Some(libc::EINVAL | libc::ENOSYS | libc::EPERM) => {
                write_each_page(addr, len);
                return Ok(());
            }
            _ => return Err(error),
        }
    }
}

fn write_each_page(addr: *mut u8, len: usize) {
    for offset in (0..len).step_by(4096) {
        // SAFETY: in bounds of the piece; nobody else uses the new mapping, whose bytes are 0 already.
        unsafe { addr.add(offset).write_volatile(0) };
    }
}

/// Sums `AnonHugePages` over the areas of `smaps` that intersect `range`.
fn huge_bytes_in(smaps: &str, range: std::ops::Range<usize>) -> usize {
    let mut inside = false;
    let mut kib = 0usize;
    for line in smaps.lines() {
        if let Some(area) = area_of(line) {
            inside = area.start < range.end && range.start < area.end;
        } else if inside && let Some(value) = line.strip_prefix("AnonHugePages:") {
            kib += value.trim_end_matches("kB").trim().parse::<usize>().unwrap_or(0);
        }
    }
    // Areas may be joined with a neighbour's.
    (kib << 10).min(range.len())
}

/// The addresses of a line that opens an area: `start-end perms ...`.
fn area_of(line: &str) -> Option<std::ops::Range<usize>> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_touched_one_by_one_where_the_system_cannot_fill_them() {
        let len = 1 << 20;
        let memory =
            HostMemory::map(&MapOptions { bytes: len, huge_pages: false, numa_node: None, touch_threads: 0 }).unwrap();
        write_each_page(memory.addr.as_ptr(), len);
        let mut pages = vec![0u8; len / 4096];
        // SAFETY: one byte per page of the mapping.
        assert_eq!(unsafe { libc::mincore(memory.addr.as_ptr().cast(), len, pages.as_mut_ptr()) }, 0);
        assert!(pages.iter().all(|page| page & 1 == 1));
    }

    #[test]
    fn huge_bytes_are_those_of_the_own_area() {
        let smaps = "\
            1000-3000 rw-p 00000000 00:00 0 [heap]\nSize: 8 kB\nAnonHugePages:        4 kB\n\
            400000-800000 rw-p 00000000 00:00 0 \nSize: 4096 kB\nAnonHugePages:     2048 kB\nVmFlags: rd\n\
            800000-900000 rw-p 00000000 00:00 0 \nAnonHugePages:     1024 kB\n";
        assert_eq!(huge_bytes_in(smaps, 0x400000..0x800000), 2 << 20);
        assert_eq!(huge_bytes_in(smaps, 0x400000..0x900000), 3 << 20);
        assert_eq!(huge_bytes_in(smaps, 0x500000..0x501000), 4096);
        assert_eq!(huge_bytes_in("", 0..4096), 0);
    }
}
