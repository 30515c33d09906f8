//! Page-locking: what lets a GPU's copy engines and kernels reach host memory.

use std::ptr::NonNull;

use crate::device::Device;
use crate::error::MemError;
use crate::sync::Arc;

/// A mapping that is page-locked for one device until this is dropped.
///
/// It is registered in one piece. Several pieces, registered by several threads, take nearly as long, because the driver
/// takes one at a time (H100, driver 580: 0.50 s instead of 0.60 s for 7.8 GiB), and then no copy, of ours or of a user who
/// reads blocks in place, may reach from one into the next: the driver refuses it.
#[derive(Debug)]
pub(crate) struct Pin {
    device: Arc<dyn Device>,
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: the address is that of a mapping, which outlives this; the device may be used from any thread.
unsafe impl Send for Pin {}
// SAFETY: as above; there is no interior mutability.
unsafe impl Sync for Pin {}

impl Pin {
    /// Registers `len` bytes from `addr`.
    ///
    /// # Safety
    ///
    /// The range is mapped, and stays so until this is dropped, and all copies from and to it end before.
    pub(crate) unsafe fn new(device: &Arc<dyn Device>, addr: NonNull<u8>, len: usize) -> Result<Pin, MemError> {
        // SAFETY: as the caller promises.
        unsafe { device.register(addr, len) }.map_err(|error| explained(error, len))?;
        let pin = Pin { device: Arc::clone(device), addr, len };
        // A forked child must not share pages that a device writes: writing one, the child or its parent would be left with
        // a copy that the device does not know.
        pin.advise(libc::MADV_DONTFORK);
        Ok(pin)
    }

    pub(crate) fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn advise(&self, advice: libc::c_int) {
        // SAFETY: the range is mapped; the advice changes no bytes.
        if unsafe { libc::madvise(self.addr.as_ptr().cast(), self.len, advice) } != 0 {
            log::debug!("page-locked memory and fork: {}", std::io::Error::last_os_error());
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if matches!(self.device.check(), Err(MemError::Forked { .. })) {
            return;
        }
        // SAFETY: registered, and no copy uses it any more.
        if let Err(error) = unsafe { self.device.unregister(self.addr) } {
            log::debug!("page-locked memory could not be unlocked: {error}");
        }
        self.advise(libc::MADV_DOFORK);
    }
}

/// The error with the limits that may be behind it.
fn explained(error: MemError, len: usize) -> MemError {
    let MemError::Device { call, name, code, remedy } = error else { return error };
    let limit = memlock_limit().map_or_else(|| "unlimited".to_owned(), |bytes| format!("{bytes} bytes"));
    let more = if remedy.is_empty() { String::new() } else { format!("; {remedy}") };
    let remedy = format!(
        "page-locking {len} bytes needs `ulimit -l` (now {limit}) and the control group's memory to allow it{more}"
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

    use super::*;

    const LEN: usize = 1 << 20;

    fn memory() -> HostMemory {
        HostMemory::map(&MapOptions { bytes: LEN, huge_pages: false, numa_node: None, touch_threads: 0 }).unwrap()
    }

    #[test]
    fn memory_is_registered_and_let_go() {
        let sim = Sim::new(1);
        let device: Arc<dyn Device> = sim.clone();
        let mut memory = memory();
        memory.pin(&device).unwrap();
        assert_eq!(memory.pinned(), Pinned::Yes { device: 0 });
        let addr = memory.addr();
        // SAFETY: only numbers are compared: the simulation follows no address that no copy names.
        unsafe {
            assert!(device.register(addr.add(LEN - 4096), 4096).is_err(), "the end is not registered");
            drop(memory);
            device.register(addr, LEN).expect("nothing stays registered");
            device.unregister(addr).unwrap();
        }
        assert_eq!(sim.violations(), Vec::<String>::new());
    }

    #[test]
    fn memory_that_may_not_be_locked_stays_plain_and_says_why() {
        let sim = Sim::new(1);
        let device: Arc<dyn Device> = sim.clone();
        let mut memory = memory();
        sim.fail_next("register", 1);
        let error = memory.pin(&device).unwrap_err().to_string();
        assert!(error.contains("ulimit -l") && error.contains(&LEN.to_string()), "{error}");
        assert!(matches!(memory.pinned(), Pinned::No { reason } if reason == error));
        // SAFETY: one byte of the mapping, which is plain memory.
        unsafe { memory.addr().as_ptr().write(1) };
        drop(memory);
        assert_eq!(sim.violations(), Vec::<String>::new());
    }
}
