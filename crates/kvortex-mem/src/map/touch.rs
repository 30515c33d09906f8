//! Filling a mapping with pages before its first use, by several threads.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Threads take pieces of this size: small enough to share the work evenly, large enough that a system call per piece does
/// not show.
const PIECE: usize = 64 << 20;

/// Fills `len` bytes from `addr`, which are mapped, with pages; changes no byte, and ends nothing if memory is short.
///
/// Fails with [`io::ErrorKind::Unsupported`] before Linux 5.14, and in sandboxes that answer unknown calls in their own way.
pub(super) fn fill(addr: NonNull<u8>, len: usize, threads: usize) -> io::Result<()> {
    in_pieces(addr, len, threads, populate)
}

/// As [`fill`] on every system, where nobody else has the memory and its bytes are 0.
pub(super) fn fill_new(addr: NonNull<u8>, len: usize, threads: usize) -> io::Result<()> {
    in_pieces(addr, len, threads, |piece, len| {
        populate(piece, len).or_else(|error| match error.kind() {
            io::ErrorKind::Unsupported => {
                write_each_page(piece, len);
                Ok(())
            }
            _ => Err(error),
        })
    })
}

/// Reads every page, so that it is mapped here. Whoever calls this knows that there is memory behind all of it.
pub(super) fn read_each_page(addr: NonNull<u8>, len: usize) {
    for offset in (0..len).step_by(4096) {
        // SAFETY: in bounds of the mapping; what others write there meanwhile does not matter.
        unsafe { addr.as_ptr().add(offset).read_volatile() };
    }
}

fn in_pieces<F>(addr: NonNull<u8>, len: usize, threads: usize, fill: F) -> io::Result<()>
where
    F: Fn(*mut u8, usize) -> io::Result<()> + Sync,
{
    if threads == 0 {
        return Ok(());
    }
    let (next, base) = (AtomicUsize::new(0), addr.as_ptr().expose_provenance());
    let work = || loop {
        let start = next.fetch_add(1, Ordering::Relaxed).saturating_mul(PIECE);
        if start >= len {
            return Ok(());
        }
        fill(std::ptr::with_exposed_provenance_mut(base + start), PIECE.min(len - start))?;
    };
    thread::scope(|scope| {
        let start = |index| thread::Builder::new().name(format!("kvortex-touch-{index}")).spawn_scoped(scope, work);
        // A thread that cannot be started leaves its share to the others and to this one.
        let others: Vec<_> = (1..threads.min(len.div_ceil(PIECE))).map_while(|index| start(index).ok()).collect();
        let own = work();
        others.into_iter().fold(own, |result, other| {
            result.and(other.join().unwrap_or_else(|_| Err(io::Error::other("a touching thread panicked"))))
        })
    })
}

fn populate(addr: *mut u8, len: usize) -> io::Result<()> {
    loop {
        // SAFETY: the range is a piece of a mapping; filling it changes no bytes.
        if unsafe { libc::madvise(addr.cast(), len, libc::MADV_POPULATE_WRITE) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => continue,
            Some(libc::EINVAL | libc::ENOSYS | libc::EPERM) => return Err(io::ErrorKind::Unsupported.into()),
            _ => return Err(error),
        }
    }
}

fn write_each_page(addr: *mut u8, len: usize) {
    for offset in (0..len).step_by(4096) {
        // SAFETY: in bounds of the piece; nobody else uses the new mapping, whose bytes are 0 already.
        unsafe { addr.add(offset).write_volatile(0) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::area;
    use super::*;

    #[test]
    fn pages_are_touched_one_by_one_where_the_system_cannot_fill_them() {
        let len = 1 << 20;
        let addr = area::private(len).unwrap();
        write_each_page(addr.as_ptr(), len);
        let mut pages = vec![0u8; len / 4096];
        // SAFETY: one byte per page of the mapping.
        assert_eq!(unsafe { libc::mincore(addr.as_ptr().cast(), len, pages.as_mut_ptr()) }, 0);
        assert!(pages.iter().all(|page| page & 1 == 1));
        // SAFETY: this test's own mapping.
        unsafe { libc::munmap(addr.as_ptr().cast(), len) };
    }
}
