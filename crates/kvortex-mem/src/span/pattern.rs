//! The fragments of one piece of a page.

use std::borrow::Cow;
use std::ops::Range;

use crate::error::MemError;

/// One contiguous fragment, relative to its piece's base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// Bytes from the base to the first byte; negative where a stride is.
    pub offset: isize,
    /// Length in bytes, never 0.
    pub len: usize,
}

impl Run {
    /// One past the last byte, relative to the base.
    pub fn end(&self) -> isize {
        self.offset + self.len as isize
    }
}

/// The fragments of one piece of a page in the order of its bytes, neighbours joined.
///
/// Pieces of the same form share one pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    runs: Box<[Run]>,
    starts: Starts,
    bytes: usize,
    bounds: Range<isize>,
    /// Each run starts at or after the end of the one before.
    ascending: bool,
}

/// Where each run starts in the sequence of the piece's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Starts {
    /// All runs have this length.
    Uniform(usize),
    /// The start of run i.
    Listed(Box<[usize]>),
}

impl Pattern {
    /// The largest number of fragments of one pattern.
    pub const MAX_RUNS: usize = 1 << 24;

    /// One fragment of `len` bytes at the base.
    pub fn contiguous(len: usize) -> Pattern {
        let runs = if len == 0 { Vec::new() } else { vec![Run { offset: 0, len }] };
        Pattern::of(runs)
    }

    /// The elements of a strided array in C order: `itemsize` bytes each, `strides` in bytes, either sign.
    ///
    /// An array without elements, or with items of 0 bytes, has no fragments.
    pub fn strided(itemsize: usize, shape: &[usize], strides: &[isize]) -> Result<Pattern, MemError> {
        if shape.len() != strides.len() {
            let what = "number of strides";
            return Err(MemError::PagesMismatch { what, expected: shape.len(), actual: strides.len() });
        }
        if itemsize == 0 || shape.contains(&0) {
            return Ok(Pattern::contiguous(0));
        }
        let mut dims: Vec<(usize, isize)> =
            shape.iter().copied().zip(strides.iter().copied()).filter(|&(count, _)| count > 1).collect();
        check_extent(itemsize, &dims)?;
        let len = take_contiguous(itemsize, &mut dims);
        let count = dims.iter().fold(1usize, |product, &(count, _)| product.saturating_mul(count));
        if count > Pattern::MAX_RUNS {
            return Err(MemError::TooComplex { what: "number of fragments", value: count, max: Pattern::MAX_RUNS });
        }
        Ok(Pattern::of(enumerate(len, &dims, count)))
    }

    /// Bytes of all runs together.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The runs in the order of the piece's bytes.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The smallest range, relative to the base, that holds all runs; empty at 0 if there are none.
    pub fn bounds(&self) -> Range<isize> {
        self.bounds.clone()
    }

    /// True if two runs share a byte (a stride of 0, for instance).
    pub fn overlaps_itself(&self) -> bool {
        if self.ascending {
            return false;
        }
        self.sorted_runs().windows(2).any(|pair| pair[1].offset < pair[0].end())
    }

    /// The runs by ascending offset.
    pub(super) fn sorted_runs(&self) -> Cow<'_, [Run]> {
        if self.ascending {
            return Cow::Borrowed(&self.runs);
        }
        let mut runs = self.runs.to_vec();
        runs.sort_unstable();
        Cow::Owned(runs)
    }

    /// Calls `f` with the offset from the base and the length of each fragment of the piece's bytes `range`.
    pub(crate) fn for_each_in(&self, range: Range<usize>, mut f: impl FnMut(isize, usize)) {
        let (mut index, mut skip) = self.locate(range.start);
        let mut left = range.len();
        while left > 0 {
            let run = self.runs[index];
            let len = (run.len - skip).min(left);
            f(run.offset + skip as isize, len);
            left -= len;
            skip = 0;
            index += 1;
        }
    }

    /// The run that holds byte `at` of the piece, and how far into the run.
    fn locate(&self, at: usize) -> (usize, usize) {
        match &self.starts {
            Starts::Uniform(len) => (at / len, at % len),
            Starts::Listed(starts) => {
                let index = starts.partition_point(|&start| start <= at) - 1;
                (index, at - starts[index])
            }
        }
    }

    fn of(runs: Vec<Run>) -> Pattern {
        let bytes = runs.iter().map(|run| run.len).sum();
        let start = runs.iter().map(|run| run.offset).min().unwrap_or(0);
        let end = runs.iter().map(Run::end).max().unwrap_or(0);
        let ascending = runs.windows(2).all(|pair| pair[0].end() <= pair[1].offset);
        Pattern { starts: Starts::of(&runs), runs: runs.into(), bytes, bounds: start..end, ascending }
    }
}

impl Starts {
    fn of(runs: &[Run]) -> Starts {
        let first = runs.first().map_or(1, |run| run.len);
        if runs.iter().all(|run| run.len == first) {
            return Starts::Uniform(first);
        }
        let mut next = 0;
        let starts = runs.iter().map(|run| {
            let start = next;
            next += run.len;
            start
        });
        Starts::Listed(starts.collect())
    }
}

/// Refuses arrays whose bytes, or whose offsets, cannot be counted in an `isize`.
fn check_extent(itemsize: usize, dims: &[(usize, isize)]) -> Result<(), MemError> {
    let max = isize::MAX as usize;
    let bytes = dims.iter().fold(itemsize as u128, |product, &(count, _)| product.saturating_mul(count as u128));
    let reach = dims.iter().fold(itemsize as u128, |sum, &(count, stride)| {
        sum.saturating_add((count as u128 - 1).saturating_mul(stride.unsigned_abs() as u128))
    });
    let worst = bytes.max(reach);
    if worst > max as u128 {
        let value = usize::try_from(worst).unwrap_or(usize::MAX);
        return Err(MemError::TooComplex { what: "extent of a strided array in bytes", value, max });
    }
    Ok(())
}

/// Removes the inner dimensions that continue each other without a gap; returns the bytes of one such stretch.
fn take_contiguous(itemsize: usize, dims: &mut Vec<(usize, isize)>) -> usize {
    let mut len = itemsize;
    while let Some(&(count, stride)) = dims.last() {
        if stride != len as isize {
            break;
        }
        len *= count;
        dims.pop();
    }
    len
}

/// All `count` stretches of `len` bytes in C order, joined where one ends at the start of the next.
fn enumerate(len: usize, dims: &[(usize, isize)], count: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(count);
    let mut index = vec![0; dims.len()];
    let mut offset = 0isize;
    for _ in 0..count {
        match runs.last_mut() {
            Some(last) if last.end() == offset => last.len += len,
            _ => runs.push(Run { offset, len }),
        }
        offset += advance(dims, &mut index);
    }
    runs
}

/// Moves `index` to the next element in C order; returns the change of the offset.
fn advance(dims: &[(usize, isize)], index: &mut [usize]) -> isize {
    let mut change = 0;
    for (position, &(count, stride)) in index.iter_mut().zip(dims).rev() {
        *position += 1;
        change += stride;
        if *position < count {
            break;
        }
        *position = 0;
        change -= stride * count as isize;
    }
    change
}
