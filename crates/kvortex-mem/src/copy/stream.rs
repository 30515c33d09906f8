//! Copies that do not bring the target into the cache.
//!
//! An ordinary store first reads the line it is going to overwrite, and pushes another line out of the cache. For more bytes
//! than a cache holds that is a third of the memory's bandwidth, and nobody finds the bytes in the cache later.

/// Transfers of at least this many bytes bypass the cache. Smaller ones may well be used again before they leave it.
const STREAM_BYTES: usize = 8 << 20;

/// Shorter fragments have too few whole lines to stream.
#[cfg(target_arch = "x86_64")]
const SHORT: usize = 256;

/// True if a transfer of `bytes` bytes in fragments of `mean_run` bytes should use [`copy`], which this processor must be
/// able to execute.
#[cfg(target_arch = "x86_64")]
pub(super) fn pays(bytes: usize, mean_run: usize) -> bool {
    bytes >= STREAM_BYTES && mean_run >= SHORT && std::arch::is_x86_feature_detected!("avx2")
}

/// Copies `len` bytes. The ranges may overlap if the caller can do with undefined bytes in the target.
///
/// # Safety
///
/// 1. [`pays`] has answered true.
/// 2. `from` is valid for reads and `to` for writes of `len` bytes.
/// 3. Before another thread is told of the bytes, this thread calls [`fence`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    const UNIT: usize = 128;

    // SAFETY: as the caller promises; `head`, the units and the tail add up to `len`.
    unsafe {
        if len < SHORT {
            return std::ptr::copy(from, to, len);
        }
        let head = to.align_offset(64);
        let units = (len - head) / UNIT;
        let tail = head + units * UNIT;
        std::ptr::copy(from, to, head);
        (0..units).for_each(|unit| copy_unit(from.add(head + unit * UNIT), to.add(head + unit * UNIT)));
        std::ptr::copy(from.add(tail), to.add(tail), len - tail);
    }
}

/// Copies two lines of 64 bytes to a target that starts with one.
///
/// Halves of a line, not quarters: the processor's queue of stores then reaches further ahead of the loads.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn copy_unit(from: *const u8, to: *mut u8) {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_stream_si256};

    let (from, to) = (from.cast::<__m256i>(), to.cast::<__m256i>());
    // SAFETY: the caller has checked the length and aligned the target.
    unsafe {
        let halves = [0, 1, 2, 3].map(|index| _mm256_loadu_si256(from.add(index)));
        halves.into_iter().enumerate().for_each(|(index, half)| _mm256_stream_si256(to.add(index), half));
    }
}

/// Asks for the start of a fragment that will be copied next: the processor guesses addresses within a fragment, but not
/// from one to the next.
#[cfg(target_arch = "x86_64")]
pub(super) fn expect(from: *const u8, len: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

    const AHEAD: usize = 512;
    for offset in (0..len.min(AHEAD)).step_by(64) {
        // SAFETY: every x86-64 has this instruction; it reads nothing, at any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(offset).cast()) };
    }
}

/// Makes streamed bytes visible before anything that this thread publishes afterwards: unlike ordinary stores they are
/// ordered by nothing else.
#[cfg(target_arch = "x86_64")]
pub(super) fn fence() {
    // SAFETY: every x86-64 has this instruction.
    unsafe { std::arch::x86_64::_mm_sfence() };
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) use elsewhere::{copy, expect, fence, pays};

#[cfg(not(target_arch = "x86_64"))]
mod elsewhere {
    //! Other processors recognise long copies themselves.

    /// Never.
    pub(in crate::copy) fn pays(_bytes: usize, _mean_run: usize) -> bool {
        false
    }

    /// Copies `len` bytes.
    ///
    /// # Safety
    ///
    /// `from` is valid for reads and `to` for writes of `len` bytes.
    pub(in crate::copy) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: as the caller promises.
        unsafe { std::ptr::copy(from, to, len) };
    }

    /// Does nothing.
    pub(in crate::copy) fn expect(_from: *const u8, _len: usize) {}

    /// Ordinary stores need nothing.
    pub(in crate::copy) fn fence() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streamed_bytes_are_exact_at_every_length_and_alignment() {
        if !pays(STREAM_BYTES, SHORT) {
            return;
        }
        let source: Vec<u8> = (0..2048u32).map(|at| (at * 193 + at / 7) as u8).collect();
        for len in (0..600).chain([1023, 1024, 1025]) {
            for (from, to) in [(0, 0), (1, 0), (0, 1), (63, 65), (7, 127), (64, 32)] {
                let mut target = vec![0xA5; 2048];
                // SAFETY: `pays`; both ranges are in bounds.
                unsafe { copy(source[from..].as_ptr(), target[to..].as_mut_ptr(), len) };
                fence();
                let mut expected = vec![0xA5; 2048];
                expected[to..to + len].copy_from_slice(&source[from..from + len]);
                assert!(target == expected, "{len} bytes from {from} to {to}");
            }
        }
    }
}
