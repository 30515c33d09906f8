//! CUDA, not yet: a place for the driver's calls.

use crate::MemError;
use crate::device::Device;
use crate::sync::Arc;

/// A GPU of this machine.
pub struct Cuda;

impl Cuda {
    /// Opens GPU `ordinal`.
    pub fn open(ordinal: u32) -> Result<Arc<dyn Device>, MemError> {
        Err(MemError::NoDevice { ordinal, reason: "this build has no CUDA".to_owned() })
    }
}
