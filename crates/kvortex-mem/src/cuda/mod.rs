//! NVIDIA GPUs, through a driver that is looked for at run time. Nothing of CUDA is needed to build, and a machine without it
//! gets an error value.

mod device;
mod driver;

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int};
use std::ptr;
use std::sync::OnceLock;

use self::driver::{Driver, Handle, driver};
use crate::device::{Device, DeviceInfo};
use crate::error::MemError;
use crate::sync::{Arc, Mutex};

/// One GPU, with the context that other users of CUDA in this process have, torch among them. It is never given back: others
/// may still be using it when this is dropped.
pub struct Cuda {
    driver: &'static Driver,
    context: Handle,
    kernel: Handle,
    /// Stream priorities, the least urgent first.
    priorities: (c_int, c_int),
    info: DeviceInfo,
    pid: u32,
    /// What ended the context.
    lost: OnceLock<String>,
}

// SAFETY: the handles are the driver's, which may be used from any thread.
unsafe impl Send for Cuda {}
// SAFETY: as above; `lost` is set once.
unsafe impl Sync for Cuda {}

/// Compiled by the driver for the GPU at hand.
const PTX: &CStr = match CStr::from_bytes_with_nul(concat!(include_str!("kernel.ptx"), "\0").as_bytes()) {
    Ok(text) => text,
    Err(_) => panic!("the kernel's text has a zero byte"),
};

const KERNEL: &CStr = c"kvortex_copy";

const OLDEST_DRIVER: (u32, u32) = (12, 0);
const OLDEST_CAPABILITY: (u32, u32) = (8, 0);

/// Numbers of `CUdevice_attribute`.
mod attribute {
    use std::ffi::c_int;

    pub(super) const MULTIPROCESSORS: c_int = 16;
    pub(super) const MAPS_HOST: c_int = 19;
    pub(super) const CAPABILITY_MAJOR: c_int = 75;
    pub(super) const CAPABILITY_MINOR: c_int = 76;
    pub(super) const SAME_HOST_ADDRESS: c_int = 91;
}

impl Cuda {
    /// How many GPUs this process sees.
    pub fn count() -> Result<u32, MemError> {
        let no_device = |reason| MemError::NoDevice { ordinal: 0, reason };
        let driver = started().map_err(no_device)?;
        let mut count = 0;
        // SAFETY: `count` is valid during the call.
        named(driver, "cuDeviceGetCount", unsafe { (driver.device_count)(&mut count) }).map_err(no_device)?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    /// GPU `ordinal` of those that this process sees. The first call takes a context on it, with some hundred MB of its
    /// memory; later ones return the same device.
    pub fn open(ordinal: u32) -> Result<Arc<dyn Device>, MemError> {
        static OPENED: Mutex<BTreeMap<u32, Arc<dyn Device>>> = Mutex::new(BTreeMap::new());
        if let Some(device) = OPENED.lock().get(&ordinal) {
            return device.check().map(|()| Arc::clone(device));
        }
        let device = Cuda::start_numbered(ordinal)?;
        Ok(Arc::clone(OPENED.lock().entry(ordinal).or_insert(device)))
    }

    fn start_numbered(ordinal: u32) -> Result<Arc<dyn Device>, MemError> {
        let count = Cuda::count().map_err(|error| match error {
            MemError::NoDevice { reason, .. } => MemError::NoDevice { ordinal, reason },
            other => other,
        })?;
        if ordinal >= count {
            let reason = format!("this process sees {count}; look at CUDA_VISIBLE_DEVICES");
            return Err(MemError::NoDevice { ordinal, reason });
        }
        let cuda = started().and_then(|driver| Cuda::start(driver, ordinal));
        cuda.map(|cuda| Arc::new(cuda) as Arc<dyn Device>).map_err(|reason| MemError::NoDevice { ordinal, reason })
    }

    fn start(driver: &'static Driver, ordinal: u32) -> Result<Cuda, String> {
        let mut device = 0;
        // SAFETY: `device` is valid during the call.
        named(driver, "cuDeviceGet", unsafe { (driver.device_get)(&mut device, ordinal as c_int) })?;
        let info = describe(driver, ordinal, device)?;
        if info.driver < OLDEST_DRIVER || info.capability < OLDEST_CAPABILITY {
            return Err(format!(
                "{} (compute capability {:?}) with a driver of CUDA {:?} is too old; {OLDEST_CAPABILITY:?} and {OLDEST_DRIVER:?} are needed",
                info.name, info.capability, info.driver
            ));
        }
        let mut context = ptr::null_mut();
        // SAFETY: `context` is valid during the call.
        named(driver, "cuDevicePrimaryCtxRetain", unsafe { (driver.context_retain)(&mut context, device) })?;
        let _current = Current::enter(driver, context).map_err(|code| error_name(driver, code))?;
        let kernel = load_kernel(driver)?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: both are valid during the call.
        named(driver, "cuCtxGetStreamPriorityRange", unsafe {
            (driver.context_priorities)(&mut least, &mut greatest)
        })?;
        let (priorities, pid, lost) = ((least, greatest), std::process::id(), OnceLock::new());
        Ok(Cuda { driver, context, kernel, priorities, info, pid, lost })
    }
}

/// The driver, initialised.
fn started() -> Result<&'static Driver, String> {
    let driver = driver()?;
    // SAFETY: takes no memory; calling it again changes nothing.
    named(driver, "cuInit", unsafe { (driver.init)(0) })?;
    Ok(driver)
}

fn load_kernel(driver: &Driver) -> Result<Handle, String> {
    let (mut module, mut kernel) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: the text ends with a zero byte; both handles are valid during the calls.
    named(driver, "cuModuleLoadData", unsafe { (driver.module_load)(&mut module, PTX.as_ptr().cast()) })?;
    // SAFETY: as above.
    named(driver, "cuModuleGetFunction", unsafe { (driver.module_function)(&mut kernel, module, KERNEL.as_ptr()) })?;
    Ok(kernel)
}

fn describe(driver: &Driver, ordinal: u32, device: c_int) -> Result<DeviceInfo, String> {
    let number = |which| -> Result<u32, String> {
        let mut value = 0;
        // SAFETY: `value` is valid during the call.
        named(driver, "cuDeviceGetAttribute", unsafe { (driver.device_attribute)(&mut value, which, device) })?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let (mut version, mut memory_bytes) = (0, 0);
    // SAFETY: the values are valid during the calls.
    named(driver, "cuDriverGetVersion", unsafe { (driver.driver_version)(&mut version) })?;
    // SAFETY: as above.
    named(driver, "cuDeviceTotalMem", unsafe { (driver.device_memory)(&mut memory_bytes, device) })?;
    let version = u32::try_from(version).unwrap_or(0);
    // SAFETY: `text` gives a buffer of the length it names.
    let bus_id = text(|text, len| unsafe { (driver.device_bus_id)(text, len, device) });
    Ok(DeviceInfo {
        ordinal,
        // SAFETY: as above.
        name: text(|text, len| unsafe { (driver.device_name)(text, len, device) }),
        numa_node: numa_node(&bus_id),
        bus_id,
        driver: (version / 1000, version % 1000 / 10),
        capability: (number(attribute::CAPABILITY_MAJOR)?, number(attribute::CAPABILITY_MINOR)?),
        memory_bytes,
        multiprocessors: number(attribute::MULTIPROCESSORS)?,
        maps_host: number(attribute::MAPS_HOST)? == 1 && number(attribute::SAME_HOST_ADDRESS)? == 1,
    })
}

/// What a call writes as text; empty if it fails.
fn text(call: impl FnOnce(*mut c_char, c_int) -> u32) -> String {
    let mut buffer = [0 as c_char; 128];
    if call(buffer.as_mut_ptr(), buffer.len() as c_int - 1) != 0 {
        return String::new();
    }
    // SAFETY: the call was told of one byte less than there are, so the last one is zero.
    unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().into_owned()
}

fn numa_node(bus_id: &str) -> Option<u32> {
    let path = format!("/sys/bus/pci/devices/{}/numa_node", bus_id.to_lowercase());
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Fails with the name of the call and of its error.
fn named(driver: &Driver, call: &str, code: u32) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{call} failed with {}", error_name(driver, code))) }
}

fn error_name(driver: &Driver, code: u32) -> String {
    let mut name = ptr::null();
    // SAFETY: `name` is valid during the call.
    if unsafe { (driver.error_name)(code, &mut name) } != 0 || name.is_null() {
        return format!("error {code}");
    }
    // SAFETY: the driver's texts end with a zero byte and live as long as the process.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// Makes a context current on this thread, and what was current before when dropped.
struct Current {
    driver: &'static Driver,
    pushed: bool,
}

impl Current {
    fn enter(driver: &'static Driver, context: Handle) -> Result<Current, u32> {
        let mut current = ptr::null_mut();
        // SAFETY: `current` is valid during the call.
        let pushed = match unsafe { (driver.context_get)(&mut current) } {
            0 => current != context,
            code => return Err(code),
        };
        if pushed {
            // SAFETY: a context that is never given back.
            match unsafe { (driver.context_push)(context) } {
                0 => {}
                code => return Err(code),
            }
        }
        Ok(Current { driver, pushed })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            let mut context = ptr::null_mut();
            // SAFETY: takes off what `enter` put on; `context` is valid during the call.
            unsafe { (self.driver.context_pop)(&mut context) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_suits_the_oldest_driver_and_gpu() {
        let text = PTX.to_str().unwrap();
        assert!(text.contains("\n.version 8.0\n") && text.contains("\n.target sm_80\n"));
        assert!(text.contains(".visible .entry kvortex_copy("));
    }

    #[test]
    fn a_machine_without_a_gpu_is_told_so() {
        if let Err(error) = Cuda::open(0) {
            assert!(matches!(error, MemError::NoDevice { ordinal: 0, .. }), "{error}");
            assert!(error.to_string().starts_with("no CUDA device 0: "), "{error}");
        }
        assert!(matches!(Cuda::open(4096), Err(MemError::NoDevice { ordinal: 4096, .. })));
    }
}
