//! One range of somebody's memory.

use std::any::Any;
use std::fmt;
use std::ptr::{self, NonNull};

use crate::error::MemError;
use crate::sync::Arc;

/// Where memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// Memory that the CPU reads and writes.
    Host,
    /// Memory of the device with this number.
    Device(u32),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Host => write!(f, "host memory"),
            Place::Device(ordinal) => write!(f, "memory of device {ordinal}"),
        }
    }
}

/// A range of memory and the object that keeps it alive; clones share it.
///
/// Its bytes are only ever reached through raw pointers. Who may read or write them, and when, is a rule between the owner
/// and the user of a transfer, not a matter of types: while a transfer writes the region nobody else may touch those bytes,
/// and while a transfer reads it nobody may write them. Breaking the rule yields wrong bytes.
#[derive(Clone)]
pub struct Region {
    inner: Arc<Inner>,
}

struct Inner {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    place: Place,
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: `base` is an address that any thread may use as long as the owner lives (`Region::from_raw` demands it); the owner
// itself is Send and Sync.
unsafe impl Send for Inner {}
// SAFETY: as above; `Inner` has no interior mutability of its own.
unsafe impl Sync for Inner {}

impl Region {
    /// A region of `len` bytes from `base`.
    ///
    /// # Safety
    ///
    /// 1. The bytes `base .. base + len` are valid for reads, and for writes if `writable`, from any thread, until `owner` is
    ///    dropped; if the region is then placed on a device ([`Region::at`]), valid for that device instead.
    /// 2. No Rust reference to these bytes is used while a transfer touches them.
    /// 3. `owner` may be dropped on any thread.
    pub unsafe fn from_raw(base: NonNull<u8>, len: usize, writable: bool, owner: Box<dyn Any + Send + Sync>) -> Region {
        Region { inner: Arc::new(Inner { base, len, writable, place: Place::Host, _owner: owner }) }
    }

    /// The same memory said to be at `place`.
    ///
    /// # Panics
    ///
    /// If the region has clones.
    #[must_use]
    pub fn at(self, place: Place) -> Region {
        let mut inner = Arc::into_inner(self.inner).expect("a region is placed before it is shared");
        inner.place = place;
        Region { inner: Arc::new(inner) }
    }

    /// Where the memory is.
    pub fn place(&self) -> Place {
        self.inner.place
    }

    /// A writable region that owns the bytes of `bytes`.
    pub fn from_vec(bytes: Vec<u8>) -> Region {
        let owned = OwnedBytes::new(bytes);
        let (base, len) = (owned.base(), owned.len());
        // SAFETY: the allocation lives, at this address, until `owned` is dropped, and only raw pointers to it exist.
        unsafe { Region::from_raw(base, len, true, Box::new(owned)) }
    }

    /// A read-only region that owns the bytes of `bytes`.
    pub fn from_vec_read_only(bytes: Vec<u8>) -> Region {
        let owned = OwnedBytes::new(bytes);
        let (base, len) = (owned.base(), owned.len());
        // SAFETY: as in `from_vec`.
        unsafe { Region::from_raw(base, len, false, Box::new(owned)) }
    }

    /// Address of the first byte.
    pub fn addr(&self) -> usize {
        self.inner.base.as_ptr() as usize
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.inner.len
    }

    /// True if the region has no bytes.
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// True if a transfer may write the region.
    pub fn is_writable(&self) -> bool {
        self.inner.writable
    }

    /// A copy of all its bytes. No transfer may be writing them.
    ///
    /// # Panics
    ///
    /// If it is not host memory.
    pub fn to_vec(&self) -> Vec<u8> {
        assert_eq!(self.place(), Place::Host, "the CPU cannot read it");
        let mut out = vec![0; self.inner.len];
        // SAFETY: both ranges have `len` bytes; `out` is new, so they do not overlap; the owner is alive.
        unsafe { ptr::copy_nonoverlapping(self.base(), out.as_mut_ptr(), out.len()) };
        out
    }

    /// Writes `bytes` at `offset`. No transfer may be using the region.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), MemError> {
        if !self.inner.writable {
            return Err(MemError::ReadOnly);
        }
        reached_by_cpu(self.place())?;
        let (start, len) = (offset as i128, self.inner.len);
        let end = start + bytes.len() as i128;
        if end > len as i128 {
            return Err(MemError::Bounds { start, end, len });
        }
        // SAFETY: in bounds as checked, writable, and the owner is alive; `copy` allows `bytes` to lie in the region.
        unsafe { ptr::copy(bytes.as_ptr(), self.base().add(offset), bytes.len()) };
        Ok(())
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.inner.base.as_ptr()
    }
}

/// Fails for memory that the CPU cannot reach.
pub(crate) fn reached_by_cpu(place: Place) -> Result<(), MemError> {
    if place == Place::Host {
        return Ok(());
    }
    let remedy = "make the engine with device=\"cuda\", or pass memory of the CPU";
    Err(MemError::WrongPlace { found: place.to_string(), expected: Place::Host.to_string(), remedy })
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = if self.inner.writable { "rw" } else { "ro" };
        write!(f, "Region({:#x} + {} {access}, {})", self.addr(), self.inner.len, self.inner.place)
    }
}

/// A boxed slice held by its raw pointer, so that moving the owner never asserts unique access to the bytes.
struct OwnedBytes(*mut [u8]);

// SAFETY: the box is owned; `u8` is Send and Sync.
unsafe impl Send for OwnedBytes {}
// SAFETY: as above.
unsafe impl Sync for OwnedBytes {}

impl OwnedBytes {
    fn new(bytes: Vec<u8>) -> OwnedBytes {
        OwnedBytes(Box::into_raw(bytes.into_boxed_slice()))
    }

    fn base(&self) -> NonNull<u8> {
        // SAFETY: a box is never null.
        unsafe { NonNull::new_unchecked(self.0.cast()) }
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

impl Drop for OwnedBytes {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `Box::into_raw` and is freed once.
        drop(unsafe { Box::from_raw(self.0) });
    }
}
