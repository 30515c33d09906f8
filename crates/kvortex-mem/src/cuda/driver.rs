//! The entry points of libcuda that are used, looked up once. A driver that lacks one is an error value, not a panic.
//!
//! Results are plain numbers here: a driver newer than the bindings may return codes that their enumeration does not have.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::panic::catch_unwind;
use std::sync::OnceLock;

use cudarc::driver::sys;

/// A `CUcontext`, `CUstream`, `CUevent`, `CUmodule`, `CUfunction` or `CUmemoryPool`.
pub(super) type Handle = *mut c_void;
pub(super) type Address = u64;

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub(super) struct CopyOfRows {
    pub(super) from: Side,
    pub(super) to: Side,
    pub(super) bytes: usize,
    pub(super) rows: usize,
}

/// One side of it: all addresses are in the space that host and devices share.
#[repr(C)]
pub(super) struct Side {
    x_bytes: usize,
    y: usize,
    kind: c_uint,
    host: *const c_void,
    device: Address,
    array: Handle,
    pitch: usize,
}

impl Side {
    pub(super) const fn new(addr: usize, pitch: usize) -> Side {
        const UNIFIED: c_uint = 4;
        let none = std::ptr::null_mut();
        Side { x_bytes: 0, y: 0, kind: UNIFIED, host: none, device: addr as Address, array: none, pitch }
    }
}

macro_rules! driver {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*);)*) => {
        /// Functions of the driver. All of them may be called from any thread.
        pub(super) struct Driver {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> u32,)*
        }

        impl Driver {
            fn load() -> Result<Driver, String> {
                // SAFETY: loading a library runs its initialisers; libcuda's do not touch this process's state.
                if !unsafe { sys::is_culib_present() } {
                    return Err("libcuda is not on this machine; install the NVIDIA driver".to_owned());
                }
                // SAFETY: as above; it was just seen to be there.
                let library = catch_unwind(|| unsafe { sys::culib() }).map_err(|_| "libcuda cannot be loaded")?;
                Ok(Driver {
                    $($field: {
                        // SAFETY: the symbol's type is that of the driver's header, its result taken as a number.
                        let found = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> u32>($symbol.as_bytes()) };
                        *found.map_err(|_| format!("the driver has no {}; install CUDA 12.0's or a newer one", $symbol))?
                    },)*
                })
            }
        }
    };
}

driver! {
    init = "cuInit": fn(c_uint);
    driver_version = "cuDriverGetVersion": fn(*mut c_int);
    error_name = "cuGetErrorName": fn(u32, *mut *const c_char);
    device_count = "cuDeviceGetCount": fn(*mut c_int);
    device_get = "cuDeviceGet": fn(*mut c_int, c_int);
    device_name = "cuDeviceGetName": fn(*mut c_char, c_int, c_int);
    device_bus_id = "cuDeviceGetPCIBusId": fn(*mut c_char, c_int, c_int);
    device_memory = "cuDeviceTotalMem_v2": fn(*mut usize, c_int);
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, c_int);
    context_retain = "cuDevicePrimaryCtxRetain": fn(*mut Handle, c_int);
    context_get = "cuCtxGetCurrent": fn(*mut Handle);
    context_push = "cuCtxPushCurrent_v2": fn(Handle);
    context_pop = "cuCtxPopCurrent_v2": fn(*mut Handle);
    context_priorities = "cuCtxGetStreamPriorityRange": fn(*mut c_int, *mut c_int);
    module_load = "cuModuleLoadData": fn(*mut Handle, *const c_void);
    module_function = "cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char);
    launch = "cuLaunchKernel": fn(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
    );
    stream_create = "cuStreamCreateWithPriority": fn(*mut Handle, c_uint, c_int);
    stream_destroy = "cuStreamDestroy_v2": fn(Handle);
    stream_wait = "cuStreamWaitEvent": fn(Handle, Handle, c_uint);
    event_create = "cuEventCreate": fn(*mut Handle, c_uint);
    event_destroy = "cuEventDestroy_v2": fn(Handle);
    event_record = "cuEventRecord": fn(Handle, Handle);
    event_query = "cuEventQuery": fn(Handle);
    event_synchronize = "cuEventSynchronize": fn(Handle);
    event_elapsed = "cuEventElapsedTime": fn(*mut f32, Handle, Handle);
    copy = "cuMemcpyAsync": fn(Address, Address, usize, Handle);
    copy_rows = "cuMemcpy2DAsync_v2": fn(*const CopyOfRows, Handle);
    allocate = "cuMemAlloc_v2": fn(*mut Address, usize);
    free = "cuMemFree_v2": fn(Address);
    memory_info = "cuMemGetInfo_v2": fn(*mut usize, *mut usize);
    register = "cuMemHostRegister_v2": fn(*mut c_void, usize, c_uint);
    unregister = "cuMemHostUnregister": fn(*mut c_void);
    pool_create = "cuMemPoolCreate": fn(*mut Handle, *const c_void);
    pool_destroy = "cuMemPoolDestroy": fn(Handle);
    pool_set = "cuMemPoolSetAttribute": fn(Handle, c_int, *mut c_void);
    pool_get = "cuMemPoolGetAttribute": fn(Handle, c_int, *mut c_void);
    pool_trim = "cuMemPoolTrimTo": fn(Handle, usize);
    pool_allocate = "cuMemAllocFromPoolAsync": fn(*mut Address, usize, Handle, Handle);
    pool_free = "cuMemFreeAsync": fn(Address, Handle);
}

/// The driver, looked for once in a process.
pub(super) fn driver() -> Result<&'static Driver, String> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    DRIVER.get_or_init(Driver::load).as_ref().map_err(Clone::clone)
}
