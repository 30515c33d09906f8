//! The contract of a device, call by call.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::{self, NonNull};

use super::driver::{CopyOfRows, Handle, Side};
use super::{Cuda, Current, error_name};
use crate::device::{CopyRows, Device, DeviceInfo, Launch, PoolNumbers, Priority, RawEvent, RawPool, RawStream};
use crate::error::MemError;

const OUT_OF_MEMORY: u32 = 2;
const NOT_READY: u32 = 600;
const ALREADY_REGISTERED: u32 = 712;

const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_BLOCKING_SYNC: c_uint = 1;
const EVENT_DISABLE_TIMING: c_uint = 2;
const REGISTER_PORTABLE_MAPPED: c_uint = 1 | 2;

const THREADS_PER_BLOCK: c_uint = 256;
const WARPS_PER_BLOCK: usize = 8;

/// Numbers of `CUmemPool_attribute`.
mod pool {
    use std::ffi::c_int;

    pub(super) const RELEASE_THRESHOLD: c_int = 4;
    pub(super) const RESERVED: c_int = 5;
    pub(super) const USED: c_int = 7;
    pub(super) const PEAK_USED: c_int = 8;
}

/// `CUmemPoolProps`, the same from CUDA 11.2 on; `max_size` was reserved, and zero, before 12.2.
#[repr(C)]
struct PoolProperties {
    kind: c_int,
    handle_types: c_int,
    location_kind: c_int,
    location: c_int,
    security: *mut c_void,
    max_size: usize,
    reserved: [u8; 56],
}

/// Errors after which nothing works in the context any more.
fn ends_the_context(code: u32) -> bool {
    const DEINITIALIZED: u32 = 4;
    const ECC_UNCORRECTABLE: u32 = 214;
    const NVLINK_UNCORRECTABLE: u32 = 220;
    // Illegal address, launch timeout, a context that was destroyed, assertions and the other faults of a kernel.
    matches!(code, DEINITIALIZED | ECC_UNCORRECTABLE | NVLINK_UNCORRECTABLE | 700 | 702 | 709 | 710 | 714..=719)
}

fn handle(raw: u64) -> Handle {
    raw as usize as Handle
}

fn raw(handle: Handle) -> u64 {
    handle as usize as u64
}

impl Cuda {
    /// Runs `body` with the context current, and says what its code means.
    fn call(&self, call: &'static str, body: impl FnOnce() -> u32) -> Result<(), MemError> {
        match self.code(body)? {
            0 => Ok(()),
            code => Err(self.fault(call, code)),
        }
    }

    /// Runs `body` with the context current.
    fn code(&self, body: impl FnOnce() -> u32) -> Result<u32, MemError> {
        self.check()?;
        let current = Current::enter(self.driver, self.context);
        let _current = current.map_err(|code| self.fault("cuCtxPushCurrent", code))?;
        Ok(body())
    }

    fn fault(&self, call: &'static str, code: u32) -> MemError {
        let name = error_name(self.driver, code);
        if ends_the_context(code) {
            let cause = self.lost.get_or_init(|| format!("{call} failed with {name} ({code})"));
            return MemError::DeviceLost { cause: cause.clone() };
        }
        let remedy = match (call, code) {
            ("cuMemHostRegister", ALREADY_REGISTERED) => "the memory is page-locked already",
            ("cuMemHostRegister", _) => "raise `ulimit -l` and the control group's memory limit",
            _ => "",
        };
        MemError::Device { call, name, code, remedy: remedy.to_owned() }
    }

    /// As `call`, with the numbers if memory ran out.
    fn allocating(&self, call: &'static str, requested: usize, body: impl FnOnce() -> u32) -> Result<(), MemError> {
        match self.code(body)? {
            0 => Ok(()),
            OUT_OF_MEMORY => {
                let (free, total) = self.memory()?;
                Err(MemError::OutOfDeviceMemory { requested, free, total })
            }
            code => Err(self.fault(call, code)),
        }
    }

    /// For what cannot fail, or whose failure changes nothing.
    fn quietly(&self, call: &'static str, body: impl FnOnce() -> u32) {
        if let Err(error) = self.call(call, body) {
            log::debug!("{error}");
        }
    }

    fn pool_number(&self, pool: RawPool, which: c_int) -> Result<usize, MemError> {
        let mut value = 0u64;
        // SAFETY: `value` has the 64 bits that these attributes have; the pool is one of this device's.
        self.call("cuMemPoolGetAttribute", || unsafe {
            (self.driver.pool_get)(handle(pool.0), which, ptr::from_mut(&mut value).cast())
        })?;
        Ok(value as usize)
    }
}

fn address(value: u64) -> Result<NonNull<u8>, MemError> {
    NonNull::new(value as usize as *mut u8).ok_or(MemError::ZeroBytes { what: "device memory" })
}

impl Device for Cuda {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn check(&self) -> Result<(), MemError> {
        let child = std::process::id();
        if child != self.pid {
            return Err(MemError::Forked { parent: self.pid, child });
        }
        self.lost.get().map_or(Ok(()), |cause| Err(MemError::DeviceLost { cause: cause.clone() }))
    }

    fn create_stream(&self, priority: Priority) -> Result<RawStream, MemError> {
        let mut stream = ptr::null_mut();
        let level = match priority {
            Priority::High => self.priorities.1,
            Priority::Low => self.priorities.0,
        };
        // SAFETY: `stream` is valid during the call.
        self.call("cuStreamCreateWithPriority", || unsafe {
            (self.driver.stream_create)(&mut stream, STREAM_NON_BLOCKING, level)
        })?;
        Ok(RawStream(raw(stream)))
    }

    fn destroy_stream(&self, stream: RawStream) {
        // SAFETY: made by `create_stream` and given back once.
        self.quietly("cuStreamDestroy", || unsafe { (self.driver.stream_destroy)(handle(stream.0)) });
    }

    fn create_event(&self, timed: bool) -> Result<RawEvent, MemError> {
        let mut event = ptr::null_mut();
        let flags = EVENT_BLOCKING_SYNC | if timed { 0 } else { EVENT_DISABLE_TIMING };
        // SAFETY: `event` is valid during the call.
        self.call("cuEventCreate", || unsafe { (self.driver.event_create)(&mut event, flags) })?;
        Ok(RawEvent(raw(event)))
    }

    fn destroy_event(&self, event: RawEvent) {
        // SAFETY: made by `create_event` and given back once.
        self.quietly("cuEventDestroy", || unsafe { (self.driver.event_destroy)(handle(event.0)) });
    }

    fn record(&self, event: RawEvent, stream: RawStream) -> Result<(), MemError> {
        // SAFETY: an event of this device and a stream of its context.
        self.call("cuEventRecord", || unsafe { (self.driver.event_record)(handle(event.0), handle(stream.0)) })
    }

    fn wait(&self, stream: RawStream, event: RawEvent) -> Result<(), MemError> {
        // SAFETY: as in `record`.
        self.call("cuStreamWaitEvent", || unsafe { (self.driver.stream_wait)(handle(stream.0), handle(event.0), 0) })
    }

    fn is_passed(&self, event: RawEvent) -> Result<bool, MemError> {
        // SAFETY: an event of this device.
        match self.code(|| unsafe { (self.driver.event_query)(handle(event.0)) })? {
            0 => Ok(true),
            NOT_READY => Ok(false),
            code => Err(self.fault("cuEventQuery", code)),
        }
    }

    fn synchronize(&self, event: RawEvent) -> Result<(), MemError> {
        // SAFETY: an event of this device.
        self.call("cuEventSynchronize", || unsafe { (self.driver.event_synchronize)(handle(event.0)) })
    }

    fn elapsed_ms(&self, start: RawEvent, end: RawEvent) -> Result<f64, MemError> {
        let mut ms = 0f32;
        // SAFETY: `ms` is valid during the call; the events are this device's.
        self.call("cuEventElapsedTime", || unsafe {
            (self.driver.event_elapsed)(&mut ms, handle(start.0), handle(end.0))
        })?;
        Ok(f64::from(ms))
    }

    unsafe fn copy(&self, stream: RawStream, to: usize, from: usize, bytes: usize) -> Result<(), MemError> {
        // SAFETY: as the caller promises.
        self.call("cuMemcpyAsync", || unsafe { (self.driver.copy)(to as u64, from as u64, bytes, handle(stream.0)) })
    }

    unsafe fn copy_rows(&self, stream: RawStream, copy: &CopyRows) -> Result<(), MemError> {
        let request = CopyOfRows {
            from: Side::new(copy.from, copy.from_pitch),
            to: Side::new(copy.to, copy.to_pitch),
            bytes: copy.bytes,
            rows: copy.rows,
        };
        // SAFETY: the request lives during the call; the rest is as the caller promises.
        self.call("cuMemcpy2DAsync", || unsafe { (self.driver.copy_rows)(&request, handle(stream.0)) })
    }

    unsafe fn launch(&self, stream: RawStream, launch: &Launch) -> Result<(), MemError> {
        let units = launch.row_count.saturating_mul(launch.item_count);
        if units == 0 {
            return Ok(());
        }
        let blocks = c_uint::try_from(units.div_ceil(WARPS_PER_BLOCK)).unwrap_or(c_uint::MAX).min(launch.blocks.max(1));
        let mut numbers = [launch.rows as u64, launch.row_count as u64, launch.items as u64, launch.item_count as u64];
        let mut to_slots = u32::from(launch.to_slots);
        let [rows, row_count, items, item_count] =
            numbers.each_mut().map(|number| ptr::from_mut(number).cast::<c_void>());
        let mut arguments = [rows, row_count, items, item_count, ptr::from_mut(&mut to_slots).cast()];
        // SAFETY: the arguments have the kernel's types and live during the call; the rest is as the caller promises.
        self.call("cuLaunchKernel", || unsafe {
            let (grid, block) = (blocks, THREADS_PER_BLOCK);
            let (arguments, extra) = (arguments.as_mut_ptr(), ptr::null_mut());
            (self.driver.launch)(self.kernel, grid, 1, 1, block, 1, 1, 0, handle(stream.0), arguments, extra)
        })
    }

    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>, MemError> {
        let mut addr = 0;
        // SAFETY: `addr` is valid during the call.
        self.allocating("cuMemAlloc", bytes, || unsafe { (self.driver.allocate)(&mut addr, bytes) })?;
        address(addr)
    }

    unsafe fn free(&self, addr: NonNull<u8>) {
        // SAFETY: as the caller promises.
        self.quietly("cuMemFree", || unsafe { (self.driver.free)(addr.as_ptr() as u64) });
    }

    unsafe fn register(&self, addr: NonNull<u8>, bytes: usize) -> Result<(), MemError> {
        // SAFETY: as the caller promises.
        self.call("cuMemHostRegister", || unsafe {
            (self.driver.register)(addr.as_ptr().cast(), bytes, REGISTER_PORTABLE_MAPPED)
        })
    }

    unsafe fn unregister(&self, addr: NonNull<u8>) -> Result<(), MemError> {
        // SAFETY: as the caller promises.
        self.call("cuMemHostUnregister", || unsafe { (self.driver.unregister)(addr.as_ptr().cast()) })
    }

    fn create_pool(&self, keep_bytes: usize) -> Result<RawPool, MemError> {
        const PINNED: c_int = 1;
        const ON_DEVICE: c_int = 1;
        let properties = PoolProperties {
            kind: PINNED,
            handle_types: 0,
            location_kind: ON_DEVICE,
            location: self.info.ordinal as c_int,
            security: ptr::null_mut(),
            max_size: 0,
            reserved: [0; 56],
        };
        let mut pool = ptr::null_mut();
        // SAFETY: both are valid during the call.
        self.call("cuMemPoolCreate", || unsafe {
            (self.driver.pool_create)(&mut pool, ptr::from_ref(&properties).cast())
        })?;
        let mut keep = keep_bytes as u64;
        // SAFETY: a pool of this device and a value of the attribute's 64 bits.
        self.call("cuMemPoolSetAttribute", || unsafe {
            (self.driver.pool_set)(pool, pool::RELEASE_THRESHOLD, ptr::from_mut(&mut keep).cast())
        })?;
        Ok(RawPool(raw(pool)))
    }

    fn destroy_pool(&self, pool: RawPool) {
        // SAFETY: made by `create_pool` and given back once.
        self.quietly("cuMemPoolDestroy", || unsafe { (self.driver.pool_destroy)(handle(pool.0)) });
    }

    fn pool_allocate(&self, pool: RawPool, bytes: usize, stream: RawStream) -> Result<NonNull<u8>, MemError> {
        let mut addr = 0;
        // SAFETY: `addr` is valid during the call; pool and stream are this device's.
        self.allocating("cuMemAllocFromPoolAsync", bytes, || unsafe {
            (self.driver.pool_allocate)(&mut addr, bytes, handle(pool.0), handle(stream.0))
        })?;
        address(addr)
    }

    unsafe fn pool_free(&self, addr: NonNull<u8>, stream: RawStream) -> Result<(), MemError> {
        // SAFETY: as the caller promises.
        self.call("cuMemFreeAsync", || unsafe { (self.driver.pool_free)(addr.as_ptr() as u64, handle(stream.0)) })
    }

    fn pool_numbers(&self, pool: RawPool) -> Result<PoolNumbers, MemError> {
        Ok(PoolNumbers {
            reserved_bytes: self.pool_number(pool, pool::RESERVED)?,
            used_bytes: self.pool_number(pool, pool::USED)?,
            peak_used_bytes: self.pool_number(pool, pool::PEAK_USED)?,
        })
    }

    fn pool_trim(&self, pool: RawPool, keep_bytes: usize) -> Result<(), MemError> {
        // SAFETY: a pool of this device.
        self.call("cuMemPoolTrimTo", || unsafe { (self.driver.pool_trim)(handle(pool.0), keep_bytes) })
    }

    fn memory(&self) -> Result<(usize, usize), MemError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are valid during the call.
        self.call("cuMemGetInfo", || unsafe { (self.driver.memory_info)(&mut free, &mut total) })?;
        Ok((free, total))
    }
}
