//! Stream-ordered device memory: given out and taken back in the order of a stream, so that nobody waits.

use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;

use crate::device::{Device, RawPool, RawStream};
use crate::error::MemError;
use crate::pool::Allocation;
use crate::sync::{Arc, Mutex};

/// What a pool may take, and what it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePoolOptions {
    /// The most bytes given out at once; `None` for all that the device has.
    pub capacity_bytes: Option<usize>,
    /// Bytes that stay with the pool when they are given back: the release threshold. The rest goes back to the device when
    /// it is next synchronized.
    pub keep_bytes: usize,
}

/// Device memory in pieces of any size, from a pool of its own. Safe to share between threads.
///
/// A piece may be used by what its stream is given after [`allocate`](GpuAsyncPool::allocate) and before
/// [`free`](GpuAsyncPool::free), and by other streams that were ordered behind the one and before the other.
#[derive(Debug)]
pub struct GpuAsyncPool {
    device: Arc<dyn Device>,
    raw: RawPool,
    capacity: Option<usize>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes of what is given out, by address.
    live: BTreeMap<usize, usize>,
    /// Former starts of pieces that are not part of another one now: what tells a double free from a foreign pointer.
    freed: BTreeSet<usize>,
    used: usize,
    peak: usize,
    allocations: u64,
    failures: u64,
    closed: bool,
}

/// What a device pool holds, in bytes as asked for, but for `reserved`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePoolStats {
    /// The most that is given out at once, if there is a limit.
    pub capacity: Option<usize>,
    /// Given out.
    pub used: usize,
    /// The most ever given out at once.
    pub peak: usize,
    /// Taken from the device: what is given out, rounded up by the driver, and what is kept.
    pub reserved: usize,
    /// Pieces given out.
    pub live: usize,
    /// Pieces ever given out.
    pub allocations: u64,
    /// Requests refused for want of memory.
    pub failures: u64,
}

impl GpuAsyncPool {
    /// An empty pool on `device`.
    pub fn new(device: &Arc<dyn Device>, options: DevicePoolOptions) -> Result<GpuAsyncPool, MemError> {
        if options.capacity_bytes == Some(0) {
            return Err(MemError::ZeroBytes { what: "the capacity of a pool" });
        }
        let raw = device.create_pool(options.keep_bytes)?;
        let (device, capacity) = (Arc::clone(device), options.capacity_bytes);
        Ok(GpuAsyncPool { device, raw, capacity, state: Mutex::default() })
    }

    /// The device that the memory is on.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// A piece of `bytes` bytes with undefined content, for what `stream` is given from now on.
    ///
    /// [`MemError::OutOfMemory`] beyond the pool's capacity, [`MemError::OutOfDeviceMemory`] when the device has no more.
    pub fn allocate(&self, bytes: usize, stream: RawStream) -> Result<Allocation, MemError> {
        if bytes == 0 {
            return Err(MemError::ZeroBytes { what: "an allocation" });
        }
        let mut state = self.state.lock();
        if state.closed {
            return Err(MemError::Stopped);
        }
        let given = self.within(bytes, state.used).and_then(|()| self.device.pool_allocate(self.raw, bytes, stream));
        match given {
            Ok(addr) => Ok(state.enter(addr.as_ptr() as usize, bytes)),
            Err(error) => {
                state.failures += 1;
                Err(error)
            }
        }
    }

    fn within(&self, requested: usize, used: usize) -> Result<(), MemError> {
        let free = self.capacity.map_or(usize::MAX, |capacity| capacity - used);
        if requested <= free { Ok(()) } else { Err(MemError::OutOfMemory { requested, free, largest: free }) }
    }

    /// Takes back the piece that starts at `addr`, once `stream` has passed what it was given so far.
    ///
    /// [`MemError::DoubleFree`] if there was one and it was given back; [`MemError::ForeignPointer`] for every other address.
    ///
    /// What uses the piece on other streams must have been ordered before; only `unsafe` calls of [`Device`] use it at all.
    pub fn free(&self, addr: usize, stream: RawStream) -> Result<(), MemError> {
        let mut state = self.state.lock();
        let piece = state.leave(addr)?;
        let given = NonNull::new(addr as *mut u8).ok_or(MemError::ForeignPointer { addr })?;
        // SAFETY: given out by this pool and taken out of its books just now; whoever lets the device use it has promised that
        // it stays in place until then.
        let outcome = unsafe { self.device.pool_free(given, stream) };
        if let Err(error) = &outcome
            && !matches!(error, MemError::DeviceLost { .. } | MemError::Forked { .. })
        {
            // The device still has it.
            state.enter_again(addr, piece);
        }
        outcome
    }

    /// Numbers at this moment.
    pub fn stats(&self) -> Result<DevicePoolStats, MemError> {
        let reserved = self.device.pool_numbers(self.raw)?.reserved_bytes;
        let state = self.state.lock();
        Ok(DevicePoolStats {
            capacity: self.capacity,
            used: state.used,
            peak: state.peak,
            reserved,
            live: state.live.len(),
            allocations: state.allocations,
            failures: state.failures,
        })
    }

    /// Returns what is not given out to the device, all but `keep_bytes`; pieces whose stream has not yet passed their end
    /// stay.
    pub fn trim(&self, keep_bytes: usize) -> Result<(), MemError> {
        self.device.pool_trim(self.raw, keep_bytes)
    }

    /// Refuses allocations from now on and returns what is still given out, which may still be freed.
    pub fn close(&self) -> Vec<Allocation> {
        let mut state = self.state.lock();
        state.closed = true;
        state.live.iter().map(|(&addr, &bytes)| Allocation { addr, bytes }).collect()
    }
}

impl Drop for GpuAsyncPool {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        if !state.live.is_empty() {
            log::warn!("device pool closed with {} pieces of {} bytes still in use", state.live.len(), state.used);
        }
        self.device.destroy_pool(self.raw);
    }
}

impl State {
    fn enter(&mut self, addr: usize, bytes: usize) -> Allocation {
        while let Some(&inside) = self.freed.range(addr..addr + bytes).next() {
            self.freed.remove(&inside);
        }
        self.enter_again(addr, bytes);
        self.peak = self.peak.max(self.used);
        self.allocations += 1;
        Allocation { addr, bytes }
    }

    fn enter_again(&mut self, addr: usize, bytes: usize) {
        self.freed.remove(&addr);
        self.live.insert(addr, bytes);
        self.used += bytes;
    }

    /// Bytes of the piece that started at `addr`.
    fn leave(&mut self, addr: usize) -> Result<usize, MemError> {
        let Some(bytes) = self.live.remove(&addr) else {
            let again = self.freed.contains(&addr);
            return Err(if again { MemError::DoubleFree { addr } } else { MemError::ForeignPointer { addr } });
        };
        self.freed.insert(addr);
        self.used -= bytes;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use crate::device::{Priority, Stream};
    use crate::sim::{Sim, SimOptions};

    use super::*;

    const MIB: usize = 1 << 20;

    fn pool(capacity_bytes: Option<usize>) -> (Arc<Sim>, GpuAsyncPool, Stream) {
        let sim = Sim::with(&SimOptions { seed: 3, maps_host: true, memory_bytes: 8 * MIB });
        let device: Arc<dyn Device> = sim.clone();
        let pool = GpuAsyncPool::new(&device, DevicePoolOptions { capacity_bytes, keep_bytes: 0 }).unwrap();
        (sim, pool, Stream::new(&device, Priority::Low).unwrap())
    }

    fn free(pool: &GpuAsyncPool, addr: usize, stream: &Stream) -> Result<(), MemError> {
        pool.free(addr, stream.raw())
    }

    #[test]
    fn pieces_are_counted_and_taken_back_once() {
        let (sim, pool, stream) = pool(None);
        let first = pool.allocate(3 * MIB, stream.raw()).unwrap();
        let second = pool.allocate(MIB, stream.raw()).unwrap();
        let stats = pool.stats().unwrap();
        assert_eq!((stats.used, stats.live, stats.allocations, stats.reserved), (4 * MIB, 2, 2, 4 * MIB));
        assert!(matches!(free(&pool, first.addr + 1, &stream), Err(MemError::ForeignPointer { .. })));
        free(&pool, first.addr, &stream).unwrap();
        assert!(matches!(free(&pool, first.addr, &stream), Err(MemError::DoubleFree { .. })));
        assert_eq!(pool.close(), [second]);
        assert!(matches!(pool.allocate(1, stream.raw()), Err(MemError::Stopped)));
        free(&pool, second.addr, &stream).unwrap();
        sim.idle();
        let stats = pool.stats().unwrap();
        assert_eq!((stats.used, stats.live, stats.peak, stats.reserved), (0, 0, 4 * MIB, 0));
        assert_eq!(sim.violations(), Vec::<String>::new());
    }

    #[test]
    fn what_is_not_there_is_refused_with_the_numbers() {
        let (_sim, limited, stream) = pool(Some(2 * MIB));
        let _kept = limited.allocate(MIB, stream.raw()).unwrap();
        let refused = limited.allocate(MIB + 1, stream.raw());
        assert!(
            matches!(refused, Err(MemError::OutOfMemory { requested, free, .. }) if (requested, free) == (MIB + 1, MIB))
        );
        let (_sim, unlimited, stream) = pool(None);
        let refused = unlimited.allocate(9 * MIB, stream.raw());
        assert!(matches!(refused, Err(MemError::OutOfDeviceMemory { requested, .. }) if requested == 9 * MIB));
        assert_eq!((limited.stats().unwrap().failures, unlimited.stats().unwrap().failures), (1, 1));
        assert!(matches!(unlimited.allocate(0, stream.raw()), Err(MemError::ZeroBytes { .. })));
    }

    #[test]
    fn a_piece_is_not_given_out_again_before_its_stream_has_passed() {
        let (sim, pool, stream) = pool(None);
        let first = pool.allocate(6 * MIB, stream.raw()).unwrap();
        sim.pause();
        free(&pool, first.addr, &stream).unwrap();
        assert!(pool.allocate(6 * MIB, stream.raw()).is_err(), "the stream is still using it");
        sim.resume();
        sim.idle();
        pool.allocate(6 * MIB, stream.raw()).unwrap();
    }

    #[test]
    fn a_free_that_the_device_refuses_changes_nothing() {
        let (sim, pool, stream) = pool(None);
        let piece = pool.allocate(MIB, stream.raw()).unwrap();
        sim.fail_next("pool_free", 1);
        assert!(matches!(free(&pool, piece.addr, &stream), Err(MemError::Device { .. })));
        assert_eq!(pool.stats().unwrap().used, MIB);
        free(&pool, piece.addr, &stream).unwrap();
        assert_eq!(pool.stats().unwrap().used, 0);
    }
}
