//! Where the pages of the suite lie.

use std::any::Any;
use std::ptr::NonNull;

use crate::map::HostMemory;
use crate::span::{Place, Region};

/// Memory of one kind, with a way for the CPU to see it.
pub trait World: Sync {
    /// `len` bytes, and what keeps them alive.
    fn memory(&self, len: usize) -> (NonNull<u8>, Box<dyn Any + Send + Sync>);

    /// Where the memory is.
    fn place(&self) -> Place;

    /// Writes memory of this world that nothing else uses.
    fn write(&self, addr: NonNull<u8>, bytes: &[u8]);

    /// Reads memory of this world that nothing else writes.
    fn read(&self, addr: NonNull<u8>, len: usize) -> Vec<u8>;

    /// Makes host memory fit for copies from and to this world.
    fn pin(&self, memory: &mut HostMemory);

    /// A region with these bytes.
    fn region(&self, bytes: &[u8], writable: bool) -> Region {
        let (addr, owner) = self.memory(bytes.len());
        self.write(addr, bytes);
        // SAFETY: the memory lives until its owner is dropped, and the suite only reaches it between transfers.
        unsafe { Region::from_raw(addr, bytes.len(), writable, owner) }.at(self.place())
    }

    /// The bytes of a region of this world.
    fn bytes(&self, region: &Region) -> Vec<u8> {
        let addr = NonNull::new(region.base()).expect("a region is not at address 0");
        self.read(addr, region.len())
    }
}

/// Memory of the process.
pub struct HostWorld;

/// A boxed slice held by its raw pointer.
struct Bytes(*mut [u8]);

// SAFETY: the box is owned, and its bytes are plain.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `Box::into_raw` and is freed once.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

impl World for HostWorld {
    fn memory(&self, len: usize) -> (NonNull<u8>, Box<dyn Any + Send + Sync>) {
        let bytes = Bytes(Box::into_raw(vec![0u8; len].into_boxed_slice()));
        (NonNull::new(bytes.0.cast()).expect("a box is not null"), Box::new(bytes))
    }

    fn place(&self) -> Place {
        Place::Host
    }

    fn write(&self, addr: NonNull<u8>, bytes: &[u8]) {
        // SAFETY: memory of this world, which nothing else uses.
        unsafe { addr.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    fn read(&self, addr: NonNull<u8>, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: memory of this world, which nothing else writes.
        unsafe { addr.as_ptr().copy_to_nonoverlapping(bytes.as_mut_ptr(), len) };
        bytes
    }

    fn pin(&self, _: &mut HostMemory) {}
}

#[cfg(not(shuttle))]
pub use there::DeviceWorld;

#[cfg(not(shuttle))]
mod there {
    use super::{Any, HostMemory, NonNull, Place, World};
    use crate::device::{Device, DeviceMemory, Event, Priority, Stream};
    use crate::map::MapOptions;
    use crate::sync::{Arc, Mutex};

    /// Memory of a device.
    pub struct DeviceWorld {
        device: Arc<dyn Device>,
        stream: Stream,
        passed: Event,
        /// Pinned memory between the device and the suite.
        bounce: Mutex<HostMemory>,
    }

    const BOUNCE_BYTES: usize = 4 << 20;

    impl DeviceWorld {
        /// Memory of `device`.
        pub fn new(device: &Arc<dyn Device>) -> DeviceWorld {
            let options = MapOptions { bytes: BOUNCE_BYTES, huge_pages: false, numa_node: None, touch_threads: 1 };
            let mut bounce = HostMemory::map(&options).expect("memory for the suite");
            bounce.pin(device).expect("pinned memory for the suite");
            DeviceWorld {
                device: Arc::clone(device),
                stream: Stream::new(device, Priority::Low).expect("a stream for the suite"),
                passed: Event::new(device).expect("an event for the suite"),
                bounce: Mutex::new(bounce),
            }
        }

        /// Copies by the device and waits. Both ranges belong to the suite.
        fn copy(&self, to: usize, from: usize, len: usize) {
            // SAFETY: pinned memory of this object and memory of the device, which nothing else uses now.
            unsafe { self.device.copy(self.stream.raw(), to, from, len) }.expect("a copy of the suite");
            self.passed.record(self.stream.raw()).expect("an event of the suite");
            self.passed.synchronize().expect("the end of a copy of the suite");
        }
    }

    impl World for DeviceWorld {
        fn memory(&self, len: usize) -> (NonNull<u8>, Box<dyn Any + Send + Sync>) {
            let memory = DeviceMemory::new(&self.device, len).expect("device memory for the suite");
            (memory.addr(), Box::new(memory))
        }

        fn place(&self) -> Place {
            Place::Device(self.device.info().ordinal)
        }

        fn write(&self, addr: NonNull<u8>, bytes: &[u8]) {
            let bounce = self.bounce.lock();
            for (index, part) in bytes.chunks(BOUNCE_BYTES).enumerate() {
                // SAFETY: in bounds; no copy is using the memory.
                unsafe { bounce.addr().as_ptr().copy_from_nonoverlapping(part.as_ptr(), part.len()) };
                let to = addr.as_ptr() as usize + index * BOUNCE_BYTES;
                self.copy(to, bounce.addr().as_ptr() as usize, part.len());
            }
        }

        fn read(&self, addr: NonNull<u8>, len: usize) -> Vec<u8> {
            let bounce = self.bounce.lock();
            let mut bytes = vec![0; len];
            for (index, part) in bytes.chunks_mut(BOUNCE_BYTES).enumerate() {
                let from = addr.as_ptr() as usize + index * BOUNCE_BYTES;
                self.copy(bounce.addr().as_ptr() as usize, from, part.len());
                // SAFETY: in bounds; no copy is using the memory.
                unsafe { bounce.addr().as_ptr().copy_to_nonoverlapping(part.as_mut_ptr(), part.len()) };
            }
            bytes
        }

        fn pin(&self, memory: &mut HostMemory) {
            memory.pin(&self.device).expect("pinned memory for the suite");
        }
    }
}
