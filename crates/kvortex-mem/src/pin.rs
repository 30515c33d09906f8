//! Page-locking: what lets a GPU's copy engines and kernels reach host memory.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::device::Device;
use crate::error::MemError;
use crate::sync::{Arc, Mutex};

/// Registered at a time: large enough that a boundary is rarely met, small enough to share the work of pinning.
const PIECE: usize = 1 << 30;

/// A mapping that is page-locked for one device, piece by piece, until this is dropped.
#[derive(Debug)]
pub(crate) struct Pin {
    device: Arc<dyn Device>,
    addr: NonNull<u8>,
    len: usize,
    /// Pieces that are registered.
    pieces: Vec<usize>,
}

// SAFETY: the address is that of a mapping, which outlives this; the device may be used from any thread.
unsafe impl Send for Pin {}
// SAFETY: as above; there is no interior mutability.
unsafe impl Sync for Pin {}

impl Pin {
    /// Registers `len` bytes from `addr` with up to `threads` threads; undoes it if a piece is refused.
    ///
    /// # Safety
    ///
    /// The range is mapped, and stays so until this is dropped, and so do all copies from and to it end before.
    pub(crate) unsafe fn new(
        device: &Arc<dyn Device>,
        addr: NonNull<u8>,
        len: usize,
        threads: usize,
    ) -> Result<Pin, MemError> {
        let mut pin = Pin { device: Arc::clone(device), addr, len, pieces: Vec::new() };
        let (pieces, failure) = pin.register_all(threads);
        pin.pieces = pieces;
        if let Some(error) = failure {
            drop(pin);
            return Err(explained(error, len));
        }
        pin.advise(libc::MADV_DONTFORK);
        Ok(pin)
    }

    pub(crate) fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Bytes of one registered piece, counted from the first byte of the mapping.
    pub(crate) fn piece_bytes() -> usize {
        PIECE
    }

    /// The pieces that were registered, and what kept the rest from being so.
    fn register_all(&self, threads: usize) -> (Vec<usize>, Option<MemError>) {
        let count = self.len.div_ceil(PIECE);
        let (next, outcome) = (AtomicUsize::new(0), Mutex::new((Vec::new(), None)));
        let work = || {
            loop {
                let piece = next.fetch_add(1, Ordering::Relaxed);
                if piece >= count || outcome.lock().1.is_some() {
                    return;
                }
                let registered = self.register(piece);
                let mut outcome = outcome.lock();
                match registered {
                    Ok(()) => outcome.0.push(piece),
                    Err(error) => outcome.1 = Some(error),
                }
            }
        };
        thread::scope(|scope| {
            let start = |index| thread::Builder::new().name(format!("kvortex-pin-{index}")).spawn_scoped(scope, work);
            let others: Vec<_> = (1..threads.min(count)).map_while(|index| start(index).ok()).collect();
            work();
            drop(others);
        });
        std::mem::take(&mut *outcome.lock())
    }

    fn register(&self, piece: usize) -> Result<(), MemError> {
        let len = PIECE.min(self.len - piece * PIECE);
        // SAFETY: a piece of the range that the caller of `new` vouches for.
        unsafe { self.device.register(self.piece(piece), len) }
    }

    fn piece(&self, piece: usize) -> NonNull<u8> {
        // SAFETY: in bounds of the range.
        unsafe { self.addr.add(piece * PIECE) }
    }

    /// A forked child must not share pages that a device writes: writing one, it would leave the parent a copy that the
    /// device does not know.
    fn advise(&self, advice: libc::c_int) {
        // SAFETY: the range is mapped; the advice changes no bytes.
        if unsafe { libc::madvise(self.addr.as_ptr().cast(), self.len, advice) } != 0 {
            log::debug!("page-locked memory and fork: {}", std::io::Error::last_os_error());
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        for &piece in &self.pieces {
            // SAFETY: registered, and no copy uses it any more.
            if let Err(error) = unsafe { self.device.unregister(self.piece(piece)) } {
                log::debug!("page-locked memory could not be unlocked: {error}");
            }
        }
        if !self.pieces.is_empty() {
            self.advise(libc::MADV_DOFORK);
        }
    }
}

/// The error with the limits that may be behind it.
fn explained(error: MemError, len: usize) -> MemError {
    let MemError::Device { call, name, code, remedy } = error else { return error };
    let limit = memlock_limit().map_or_else(|| "unlimited".to_owned(), |bytes| format!("{bytes} bytes"));
    let remedy = format!(
        "page-locking {len} bytes needs `ulimit -l` (now {limit}) and the control group's memory to allow it{}{remedy}",
        if remedy.is_empty() { "" } else { "; " }
    );
    MemError::Device { call, name, code, remedy }
}

/// Bytes that this process may lock; `None` without a limit.
pub fn memlock_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid during the call.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) } == 0;
    (known && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use crate::map::{HostMemory, MapOptions, Pinned};
    use crate::sim::Sim;
    use crate::sync::Arc;

    use super::*;

    fn memory(bytes: usize) -> HostMemory {
        HostMemory::map(&MapOptions { bytes, huge_pages: false, numa_node: None, touch_threads: 0 }).unwrap()
    }

    #[test]
    fn memory_is_registered_in_pieces_and_let_go() {
        let sim = Sim::new(1);
        let device: Arc<dyn Device> = sim.clone();
        let mut memory = memory(2 * PIECE + 4096);
        memory.pin(&device, 2).unwrap();
        assert_eq!(memory.pinned(), Pinned::Yes { device: 0, piece_bytes: PIECE });
        let addr = memory.addr();
        // SAFETY: the mapping lives; it is registered already, which is what is asked.
        unsafe {
            assert!(device.register(addr.add(2 * PIECE), 4096).is_err(), "the last piece is not registered");
            drop(memory);
            device.register(addr, 4096).expect("nothing stays registered");
            device.unregister(addr).unwrap();
        }
        assert_eq!(sim.violations(), Vec::<String>::new());
    }

    #[test]
    fn a_refused_piece_leaves_plain_memory_and_says_why() {
        let sim = Sim::new(1);
        let device: Arc<dyn Device> = sim.clone();
        let mut memory = memory(3 * PIECE);
        sim.fail_next("register", 1);
        let error = memory.pin(&device, 2).unwrap_err().to_string();
        assert!(error.contains("ulimit -l") && error.contains(&(3 * PIECE).to_string()), "{error}");
        assert!(matches!(memory.pinned(), Pinned::No { reason } if reason == error));
        for piece in 0..3 {
            // SAFETY: the mapping lives.
            unsafe { device.register(memory.addr().add(piece * PIECE), 4096) }.expect("no piece stays registered");
        }
        (0..3).for_each(|piece| {
            // SAFETY: registered just now.
            unsafe { device.unregister(memory.addr().add(piece * PIECE)) }.unwrap();
        });
        // SAFETY: one byte of the mapping, which is plain memory.
        unsafe { memory.addr().as_ptr().write(1) };
    }
}
