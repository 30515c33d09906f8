//! Host memory, of one process or of several: aligned for huge pages, bound to a NUMA node, touched before use.

mod area;
mod file;
mod huge;
mod touch;

use std::io;
use std::ptr::NonNull;

use crate::device::Device;
use crate::error::MemError;
use crate::numa;
use crate::pin::Pin;
use crate::sync::Arc;

pub use file::{SharedFile, SharedPlace};

const HUGE_PAGE: usize = 2 << 20;

/// What to map, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapOptions {
    /// Bytes; rounded up to whole system pages.
    pub bytes: usize,
    /// Ask for transparent huge pages, and for shared memory take reserved ones. False leaves it to the system's default.
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

/// A mapping, zeroed when it is new, given back to the system on drop.
///
/// Of this process only, or [shared](HostMemory::share) with others. A forked child sees the private one's bytes as they were
/// at the fork.
#[derive(Debug)]
pub struct HostMemory {
    addr: NonNull<u8>,
    len: usize,
    node: Option<u32>,
    /// What others attach to, kept by who made it.
    file: Option<SharedFile>,
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
        check_available(options, len)?;
        let error = |source| MemError::Map { bytes: options.bytes, source };
        let addr = area::private(len).map_err(error)?;
        let mut memory = HostMemory { addr, len, node: None, file: None, pin: Ok(None) };
        memory.settle(options);
        touch::fill_new(addr, len, options.touch_threads).map_err(error)?;
        Ok(memory)
    }

    /// As [`map`](HostMemory::map), for other processes to [attach](HostMemory::attach) to. All of it is taken at once: too
    /// small a `/dev/shm` is an error here, and not the end of whoever touches the first page that it lacks.
    pub fn share(options: &MapOptions) -> Result<HostMemory, MemError> {
        let len = mapped_len(options)?;
        let huge = if options.huge_pages { SharedFile::of_huge_pages(len) } else { None };
        if let Some(file) = huge {
            match HostMemory::filled(file, options) {
                Ok(memory) => return Ok(memory),
                Err(error) => log::info!("no reserved huge pages: {error}"),
            }
        }
        check_available(options, len)?;
        HostMemory::filled(SharedFile::of_pages(len)?, options)
    }

    /// Maps what another process has made for `options.bytes`, and touches it as it is.
    pub fn attach(file: &SharedFile, options: &MapOptions) -> Result<HostMemory, MemError> {
        let (found, asked) = (file.len(), options.bytes);
        let rounded = |unit| asked.checked_next_multiple_of(unit) == Some(found);
        if !rounded(page_bytes()) && !rounded(HUGE_PAGE) {
            return Err(MemError::OtherLength { found, asked });
        }
        let memory = HostMemory::over(file)?;
        if options.huge_pages {
            memory.advise_huge_pages();
        }
        if touch::fill(memory.addr, found, options.touch_threads).is_err() {
            touch::read_each_page(memory.addr, found);
        }
        Ok(memory)
    }

    /// Where others find this memory, if it was made for them.
    pub fn place(&self) -> Option<SharedPlace> {
        self.file.as_ref().map(|file| *file.place())
    }

    fn over(file: &SharedFile) -> Result<HostMemory, MemError> {
        let len = file.len();
        let addr = area::shared(file.file(), len).map_err(|source| MemError::Map { bytes: len, source })?;
        Ok(HostMemory { addr, len, node: None, file: None, pin: Ok(None) })
    }

    fn filled(file: SharedFile, options: &MapOptions) -> Result<HostMemory, MemError> {
        let mut memory = HostMemory::over(&file)?;
        // Before there are pages, whose places both decide.
        memory.settle(options);
        memory.take_pages(&file, options.touch_threads)?;
        memory.file = Some(file);
        Ok(memory)
    }

    fn settle(&mut self, options: &MapOptions) {
        if options.huge_pages {
            self.advise_huge_pages();
        }
        self.node = options.numa_node.filter(|&node| self.bind(node));
    }

    /// By several threads where the system fills a mapping and says so if it cannot; else by the call that takes memory for a
    /// file. That one first would leave the system no choice of huge pages.
    fn take_pages(&self, file: &SharedFile, threads: usize) -> Result<(), MemError> {
        if threads > 0 && touch::fill(self.addr, self.len, threads).is_ok() {
            return Ok(());
        }
        file.allocate()?;
        if threads > 0 {
            touch::read_each_page(self.addr, self.len);
        }
        Ok(())
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
        huge::bytes_in(&smaps, start..start + self.len)
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
    if let Some(node) = options.numa_node {
        numa::check_node(node)?;
    }
    let too_large = || MemError::TooLarge { bytes, available: numa::available_memory() };
    bytes.checked_next_multiple_of(page_bytes()).ok_or_else(too_large)
}

fn check_available(options: &MapOptions, len: usize) -> Result<(), MemError> {
    let available = numa::available_memory();
    if options.touch_threads > 0 && len > available {
        return Err(MemError::TooLarge { bytes: options.bytes, available });
    }
    Ok(())
}

/// The system's page size in bytes, at least 4 KiB.
fn page_bytes() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096).max(4096)
}
