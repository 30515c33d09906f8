//! Memory for the kernel's tables: written by the CPU in pinned memory, read by the kernel in device memory.

use std::ptr;

use crate::device::{Device, DeviceMemory};
use crate::error::MemError;
use crate::map::{HostMemory, MapOptions};
use crate::sync::Arc;

/// Room for the tables of one flight.
pub(super) struct TableMemory {
    host: HostMemory,
    device: DeviceMemory,
}

/// Table memory that is used again and again.
pub(super) struct Stock {
    device: Arc<dyn Device>,
    free: Vec<TableMemory>,
}

/// Enough for the rows of 8,000 pages of a thousand fragments each; larger ones are made when needed, and kept.
const USUAL_BYTES: usize = 256 << 10;

/// Flights that are usually in the air.
const USUAL_COUNT: usize = 4;

impl TableMemory {
    fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<TableMemory, MemError> {
        let options = MapOptions { bytes, huge_pages: false, numa_node: None, touch_threads: 1 };
        let mut host = HostMemory::map(&options)?;
        host.pin(device)?;
        Ok(TableMemory { host, device: DeviceMemory::new(device, bytes)? })
    }

    fn bytes(&self) -> usize {
        self.device.len()
    }

    /// Copies `words` into the pinned side; returns the addresses of both sides.
    pub(super) fn write(&mut self, words: &[u64]) -> (usize, usize) {
        assert!(size_of_val(words) <= self.bytes(), "tables larger than their memory");
        let addr = self.host.addr().as_ptr();
        // SAFETY: in bounds as asserted; the device has passed the flight that used this memory before.
        unsafe { ptr::copy_nonoverlapping(words.as_ptr(), addr.cast(), words.len()) };
        (addr as usize, self.device.addr().as_ptr() as usize)
    }
}

impl Stock {
    pub(super) fn new(device: &Arc<dyn Device>) -> Result<Stock, MemError> {
        let free = (0..USUAL_COUNT).map(|_| TableMemory::new(device, USUAL_BYTES)).collect::<Result<_, _>>()?;
        Ok(Stock { device: Arc::clone(device), free })
    }

    /// Memory for `bytes` bytes.
    pub(super) fn take(&mut self, bytes: usize) -> Result<TableMemory, MemError> {
        match self.free.iter().position(|memory| memory.bytes() >= bytes) {
            Some(index) => Ok(self.free.swap_remove(index)),
            None => TableMemory::new(&self.device, bytes.next_power_of_two().max(USUAL_BYTES)),
        }
    }

    /// Takes memory back that no flight uses any more.
    pub(super) fn give(&mut self, memory: TableMemory) {
        self.free.push(memory);
    }
}
