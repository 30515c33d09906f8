//! What the copies need of a GPU: streams, events, copies, one kernel, memory. Nothing here knows which GPU it is.
//!
//! Two devices keep this contract: [`cuda`](crate::cuda), which is a CUDA driver found at run time, and `sim`, which is host
//! memory with simulated streams for the tests of everything that is built on top.
//!
//! A device address may be anywhere: this module never reads or writes through one.

use std::fmt;
use std::ptr::NonNull;

use crate::error::MemError;
use crate::sync::Arc;

/// The handle of a stream as the device's own programs know it (`CUstream`), 0 for its default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RawStream(pub u64);

/// The handle of an event as the device knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RawEvent(pub u64);

/// The handle of a memory pool as the device knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RawPool(pub u64);

/// Which of two ready streams goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Before others, a serving engine's among them.
    High,
    /// After others.
    Low,
}

/// What is known of a device. Nothing changes while the process lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Number among the devices that this process sees.
    pub ordinal: u32,
    /// Name, "NVIDIA H100 80GB HBM3" say.
    pub name: String,
    /// Where it is plugged in, "0000:9b:00.0" say; empty where there is no bus.
    pub bus_id: String,
    /// The driver's version of CUDA: 13.0 is (13, 0).
    pub driver: (u32, u32),
    /// Compute capability: 9.0 is (9, 0).
    pub capability: (u32, u32),
    /// Memory in bytes.
    pub memory_bytes: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Whether kernels reach registered host memory at the address that the CPU uses.
    pub maps_host: bool,
    /// NUMA node that it is attached to, where the system says.
    pub numa_node: Option<u32>,
}

/// The places of one step: where its page and its slot begin. Offsets of [`Item`] are added to them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// What the page's side adds, wrapping.
    pub page: u64,
    /// What the slot's side adds, wrapping.
    pub slot: u64,
}

/// One stretch of bytes that every step of a launch copies.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// Where it lies on the page's side, to be added to [`Row::page`].
    pub page: u64,
    /// Where it lies on the slot's side, to be added to [`Row::slot`].
    pub slot: u64,
    /// Length in bytes, at most [`ITEM_BYTES`].
    pub bytes: u64,
}

/// The most bytes of one [`Item`]: what one warp copies at a time.
pub const ITEM_BYTES: usize = 4096;

/// One start of the copy kernel: every item of every row. Both tables must be readable by the device until the stream has
/// passed the launch.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    /// Address of `row_count` values of [`Row`].
    pub rows: usize,
    /// Number of rows.
    pub row_count: usize,
    /// Address of `item_count` values of [`Item`].
    pub items: usize,
    /// Number of items.
    pub item_count: usize,
    /// True copies from the pages to the slots, false the other way.
    pub to_slots: bool,
    /// Thread blocks to start at most, at least 1.
    pub blocks: u32,
}

/// Rows of `bytes` bytes at equal distances on each side, which one copy takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyRows {
    /// Where the first row goes.
    pub to: usize,
    /// From one row to the next there: at least `bytes`, at most [`MAX_PITCH`].
    pub to_pitch: usize,
    /// Where the first row is.
    pub from: usize,
    /// As `to_pitch`.
    pub from_pitch: usize,
    /// Length of a row.
    pub bytes: usize,
    /// Number of rows, at least 1.
    pub rows: usize,
}

/// The greatest distance between two rows.
pub const MAX_PITCH: usize = i32::MAX as usize;

impl CopyRows {
    /// From the first byte to the end of the last row, on each side.
    #[must_use]
    pub fn spans(&self) -> [(usize, usize); 2] {
        let span = |pitch: usize| pitch * (self.rows - 1) + self.bytes;
        [(self.to, span(self.to_pitch)), (self.from, span(self.from_pitch))]
    }
}

/// Numbers about a memory pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolNumbers {
    /// Bytes that the pool holds of the device's memory.
    pub reserved_bytes: usize,
    /// Bytes of them that are given out.
    pub used_bytes: usize,
    /// The most that was ever given out at once.
    pub peak_used_bytes: usize,
}

/// A device. Its errors are values; no call panics.
///
/// Work given to one stream is done in order; streams run beside each other unless an event orders them. After the device was
/// lost every call fails with [`MemError::DeviceLost`], and nothing that was given to it runs any more. In a forked child
/// every call fails with [`MemError::Forked`].
pub trait Device: Send + Sync {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// Fails if the device was lost or this is a forked child.
    fn check(&self) -> Result<(), MemError>;

    /// A new stream, ordered against no other.
    fn create_stream(&self, priority: Priority) -> Result<RawStream, MemError>;

    /// Gives a stream back. What it was given goes on.
    fn destroy_stream(&self, stream: RawStream);

    /// A new event, which counts as passed until it is first recorded. Only a timed one can be given to
    /// [`elapsed_ms`](Device::elapsed_ms).
    fn create_event(&self, timed: bool) -> Result<RawEvent, MemError>;

    /// Gives an event back. Streams that wait for it still do.
    fn destroy_event(&self, event: RawEvent);

    /// Lets `event` stand for what `stream` was given so far, and no longer for what it stood for.
    fn record(&self, event: RawEvent, stream: RawStream) -> Result<(), MemError>;

    /// Makes what `stream` is given from now on wait for what `event` stands for now.
    fn wait(&self, stream: RawStream, event: RawEvent) -> Result<(), MemError>;

    /// Whether what `event` stands for is done.
    fn is_passed(&self, event: RawEvent) -> Result<bool, MemError>;

    /// Waits, blocking, until what `event` stands for is done.
    fn synchronize(&self, event: RawEvent) -> Result<(), MemError>;

    /// Milliseconds between two timed events that have passed.
    fn elapsed_ms(&self, start: RawEvent, end: RawEvent) -> Result<f64, MemError>;

    /// Copies `bytes` bytes in the order of `stream`; either side may be device or registered host memory.
    ///
    /// # Safety
    ///
    /// Both ranges are such memory, do not overlap, lie each within one allocation or registration, and stay so, with
    /// `to` touched and `from` written by nobody else, until the stream has passed the copy.
    unsafe fn copy(&self, stream: RawStream, to: usize, from: usize, bytes: usize) -> Result<(), MemError>;

    /// As [`copy`](Device::copy), of many rows.
    ///
    /// # Safety
    ///
    /// As for [`copy`](Device::copy), where the ranges are those of [`CopyRows::spans`]; what lies between the rows is
    /// neither read nor written.
    unsafe fn copy_rows(&self, stream: RawStream, copy: &CopyRows) -> Result<(), MemError>;

    /// Starts the copy kernel in the order of `stream`.
    ///
    /// # Safety
    ///
    /// As for [`copy`](Device::copy), for the tables and for every item of every row.
    unsafe fn launch(&self, stream: RawStream, launch: &Launch) -> Result<(), MemError>;

    /// Takes device memory, aligned to at least 256 bytes.
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>, MemError>;

    /// Gives memory of [`allocate`](Device::allocate) back; waits for whatever uses it.
    ///
    /// # Safety
    ///
    /// `addr` came from `allocate` of this device and was not given back; nobody uses it from now on.
    unsafe fn free(&self, addr: NonNull<u8>);

    /// Page-locks host memory, so that copies and kernels reach it.
    ///
    /// # Safety
    ///
    /// The range is mapped, and stays mapped until it is unregistered.
    unsafe fn register(&self, addr: NonNull<u8>, bytes: usize) -> Result<(), MemError>;

    /// Undoes [`register`](Device::register).
    ///
    /// # Safety
    ///
    /// The range at `addr` was registered, and nothing that the device was given uses it any more.
    unsafe fn unregister(&self, addr: NonNull<u8>) -> Result<(), MemError>;

    /// A pool of stream-ordered memory that keeps up to `keep_bytes` of what was given back.
    fn create_pool(&self, keep_bytes: usize) -> Result<RawPool, MemError>;

    /// Gives a pool back. Allocations stay until they are freed.
    fn destroy_pool(&self, pool: RawPool);

    /// Takes memory that what `stream` is given from now on may use.
    fn pool_allocate(&self, pool: RawPool, bytes: usize, stream: RawStream) -> Result<NonNull<u8>, MemError>;

    /// Gives memory back once `stream` has passed what it was given so far.
    ///
    /// # Safety
    ///
    /// `addr` came from `pool_allocate` of this device and was not given back; other streams' uses of it are ordered before.
    unsafe fn pool_free(&self, addr: NonNull<u8>, stream: RawStream) -> Result<(), MemError>;

    /// Numbers about a pool.
    fn pool_numbers(&self, pool: RawPool) -> Result<PoolNumbers, MemError>;

    /// Returns what is not given out to the system, all but `keep_bytes`.
    fn pool_trim(&self, pool: RawPool, keep_bytes: usize) -> Result<(), MemError>;

    /// Free and total bytes of the device's memory.
    fn memory(&self) -> Result<(usize, usize), MemError>;
}

impl fmt::Debug for dyn Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}: {})", self.info().ordinal, self.info().name)
    }
}

/// A stream that is given back on drop.
#[derive(Debug)]
pub struct Stream {
    device: Arc<dyn Device>,
    raw: RawStream,
}

impl Stream {
    /// A new stream of `device`.
    pub fn new(device: &Arc<dyn Device>, priority: Priority) -> Result<Stream, MemError> {
        Ok(Stream { raw: device.create_stream(priority)?, device: Arc::clone(device) })
    }

    /// Its handle, valid while this lives.
    pub fn raw(&self) -> RawStream {
        self.raw
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.device.destroy_stream(self.raw);
    }
}

/// An event that is given back on drop.
#[derive(Debug)]
pub struct Event {
    device: Arc<dyn Device>,
    raw: RawEvent,
}

impl Event {
    /// A new event of `device` for ordering; it counts as passed until it is recorded.
    pub fn new(device: &Arc<dyn Device>) -> Result<Event, MemError> {
        Ok(Event { raw: device.create_event(false)?, device: Arc::clone(device) })
    }

    /// A new event of `device` that can also be used to take the time.
    pub fn timed(device: &Arc<dyn Device>) -> Result<Event, MemError> {
        Ok(Event { raw: device.create_event(true)?, device: Arc::clone(device) })
    }

    /// Its handle, valid while this lives.
    pub fn raw(&self) -> RawEvent {
        self.raw
    }

    /// Lets it stand for what `stream` was given so far.
    pub fn record(&self, stream: RawStream) -> Result<(), MemError> {
        self.device.record(self.raw, stream)
    }

    /// Makes what `stream` is given from now on wait for it.
    pub fn hold(&self, stream: RawStream) -> Result<(), MemError> {
        self.device.wait(stream, self.raw)
    }

    /// Whether what it stands for is done.
    pub fn is_passed(&self) -> Result<bool, MemError> {
        self.device.is_passed(self.raw)
    }

    /// Waits, blocking, until what it stands for is done.
    pub fn synchronize(&self) -> Result<(), MemError> {
        self.device.synchronize(self.raw)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.device.destroy_event(self.raw);
    }
}

/// Device memory that is given back on drop. Whoever copies to or from it keeps it alive until the copy is done.
#[derive(Debug)]
pub struct DeviceMemory {
    device: Arc<dyn Device>,
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: the address is a number to everybody but the device, which may be used from any thread.
unsafe impl Send for DeviceMemory {}
// SAFETY: as above; there is no interior mutability.
unsafe impl Sync for DeviceMemory {}

impl DeviceMemory {
    /// `bytes` bytes of `device`, with undefined content.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<DeviceMemory, MemError> {
        Ok(DeviceMemory { addr: device.allocate(bytes)?, len: bytes, device: Arc::clone(device) })
    }

    /// Address of the first byte. Only the device can follow it.
    pub fn addr(&self) -> NonNull<u8> {
        self.addr
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device it belongs to.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: taken in `new`, given back once, and users keep this object alive.
        unsafe { self.device.free(self.addr) };
    }
}
