//! Address space: at multiples of the huge page size where that pays.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use super::HUGE_PAGE;

const ACCESS: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Maps `len` bytes of this process, at a multiple of the huge page size if they fill one.
pub(super) fn private(len: usize) -> io::Result<NonNull<u8>> {
    if len < HUGE_PAGE {
        return anonymous(len);
    }
    let padded = len.checked_add(HUGE_PAGE).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    let start = anonymous(padded)?;
    let skip = start.align_offset(HUGE_PAGE);
    unmap(start, 0..skip);
    unmap(start, skip + len..padded);
    // SAFETY: `skip` is less than the padding.
    Ok(unsafe { start.add(skip) })
}

/// Maps the first `len` bytes of `file`, aligned as [`private`], for all who map it.
pub(super) fn shared(file: &File, len: usize) -> io::Result<NonNull<u8>> {
    let place = private(len)?;
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    // SAFETY: replaces a mapping of this length that was just made and that nobody else knows.
    let addr = unsafe { libc::mmap(place.as_ptr().cast(), len, ACCESS, flags, file.as_raw_fd(), 0) };
    if addr == libc::MAP_FAILED {
        let error = io::Error::last_os_error();
        unmap(place, 0..len);
        return Err(error);
    }
    Ok(place)
}

fn anonymous(len: usize) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping at an address of the system's choice touches nothing that exists.
    let addr = unsafe { libc::mmap(std::ptr::null_mut(), len, ACCESS, flags, -1, 0) };
    if addr == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(addr.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))
}

fn unmap(start: NonNull<u8>, range: std::ops::Range<usize>) {
    if !range.is_empty() {
        // SAFETY: called with parts of a mapping that was just made and that nobody else knows.
        unsafe { libc::munmap(start.as_ptr().add(range.start).cast(), range.len()) };
    }
}
