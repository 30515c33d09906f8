//! Loads that are completed part by part, so that the first layer can be used while the last one is still on its way.

use std::ops::Range;

use crate::device::RawStream;
use crate::error::MemError;
use crate::marks::Mark;
use crate::sync::{Arc, Mutex};

/// The parts of one load: consecutive ranges of its pages' bytes, one for each layer, say. For one load only.
#[derive(Debug)]
pub struct Parts {
    ends: Box<[usize]>,
    passed: Mutex<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    /// One for each part that the device was given.
    marks: Vec<Arc<Mark>>,
    /// What kept the rest from being given to the device.
    failure: Option<String>,
}

impl Parts {
    /// Parts that end at these bytes of a page, ascending; the last one must be the page's length.
    pub fn new(ends: Vec<usize>) -> Result<Parts, MemError> {
        let mut before = 0;
        for &end in &ends {
            if end <= before {
                return Err(MemError::PagesMismatch {
                    what: "end of a part (ascending)",
                    expected: before + 1,
                    actual: end,
                });
            }
            before = end;
        }
        Ok(Parts { ends: ends.into(), passed: Mutex::default() })
    }

    /// Number of parts.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Makes what `stream` is given from now on wait for part `index` of the load, which must have been submitted. The host
    /// does not wait.
    pub fn hold(&self, index: usize, stream: RawStream) -> Result<(), MemError> {
        let passed = self.passed.lock();
        match (passed.marks.get(index), &passed.failure) {
            (Some(mark), _) => mark.hold(stream),
            (None, Some(why)) => Err(MemError::CopyFailed(why.clone())),
            (None, None) => Err(MemError::OutOfRange { what: "part", index, count: passed.marks.len() }),
        }
    }

    /// Fails unless the parts make up pages of `page_bytes` bytes.
    pub fn check(&self, page_bytes: usize) -> Result<(), MemError> {
        self.ranges(page_bytes).map(drop)
    }

    /// The bytes of each part, after checking that they make up pages of `page_bytes`.
    pub(crate) fn ranges(&self, page_bytes: usize) -> Result<Vec<Range<usize>>, MemError> {
        let actual = self.ends.last().copied().unwrap_or(0);
        if actual != page_bytes {
            return Err(MemError::PagesMismatch { what: "end of the last part", expected: page_bytes, actual });
        }
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        Ok(starts.zip(self.ends.iter().copied()).map(|(start, end)| start..end).collect())
    }

    pub(crate) fn push(&self, mark: Arc<Mark>) {
        self.passed.lock().marks.push(mark);
    }

    pub(crate) fn fail(&self, why: &MemError) {
        self.passed.lock().failure.get_or_insert_with(|| why.to_string());
    }
}
