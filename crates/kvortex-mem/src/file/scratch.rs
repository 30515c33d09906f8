//! Memory for what is no block: headers on their way to and from a file.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use super::ALIGNMENT;

/// Zeroed bytes that direct I/O can use: their address and length are multiples of [`ALIGNMENT`].
#[derive(Debug)]
pub struct Scratch {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that this object owns.
unsafe impl Send for Scratch {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Scratch {}

impl Scratch {
    /// At least `len` bytes, rounded up to a multiple of [`ALIGNMENT`] and never none.
    #[must_use]
    pub fn new(len: usize) -> Scratch {
        let len = len.max(1).next_multiple_of(ALIGNMENT);
        // SAFETY: the layout is not empty.
        let addr = unsafe { alloc_zeroed(Self::layout(len)) };
        let addr = NonNull::new(addr).unwrap_or_else(|| handle_alloc_error(Self::layout(len)));
        Scratch { addr, len }
    }

    pub(super) fn addr(&self) -> *mut u8 {
        self.addr.as_ptr()
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, ALIGNMENT).expect("a length that was allocated or is about to be")
    }
}

impl Deref for Scratch {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes, owned by this object; who writes them has it mutably or has taken it.
        unsafe { std::slice::from_raw_parts(self.addr(), self.len) }
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.addr(), self.len) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and freed once.
        unsafe { dealloc(self.addr(), Self::layout(self.len)) };
    }
}
