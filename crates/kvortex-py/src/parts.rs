//! Loads that are awaited part by part.

use std::sync::{Arc, OnceLock};

use kvortex_mem::span::{Pages, Parts, Place};
use pyo3::prelude::*;

use crate::errors::{entry, invalid, raise_mem};
use crate::number::whole;
use crate::stream::stream_on;

/// The parts of one load from a GPU engine: consecutive ranges of a block's bytes, one for each layer, say, that end at
/// `ends_bytes`, ascending, the last at the end of the block. A stream can wait for each alone. For one load only.
#[pyclass(name = "Parts", frozen, module = "kvortex")]
pub(crate) struct PyParts {
    parts: Arc<Parts>,
    /// Of the load that they were passed to.
    ordinal: OnceLock<u32>,
}

#[pymethods]
impl PyParts {
    #[new]
    fn new(ends_bytes: &Bound<'_, PyAny>) -> PyResult<Self> {
        let ends: Vec<usize> = ends_bytes.extract().map_err(|_| {
            invalid("ends_bytes is no list of whole numbers: give the byte of a block at which each part ends")
        })?;
        Self::ending_at(ends)
    }

    /// Makes what `stream`, torch's current one by default, is given from now on wait for part `index`, counted from 0. The
    /// host does not wait. TransferError if the part's copies could not be started, InvalidArgumentError before the load.
    #[pyo3(signature = (index, *, stream=None))]
    fn hold(&self, py: Python<'_>, index: &Bound<'_, PyAny>, stream: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        entry(py, || {
            let index = whole("index", index)?;
            let ordinal = self.ordinal.get();
            let ordinal =
                ordinal.ok_or_else(|| invalid("the parts belong to no load yet: pass them to load_blocks_async"))?;
            let stream = stream_on(*ordinal, stream, py)?;
            py.detach(|| self.parts.hold(index, stream)).map_err(|error| raise_mem(&error))
        })
    }

    fn __len__(&self) -> usize {
        self.parts.len()
    }

    fn __repr__(&self) -> String {
        format!("<kvortex.Parts of {}>", self.parts.len())
    }
}

impl PyParts {
    pub(crate) fn ending_at(ends: Vec<usize>) -> PyResult<Self> {
        if ends.is_empty() {
            return Err(invalid("ends_bytes is empty: give the byte of a block at which each part ends"));
        }
        let parts = Parts::new(ends).map_err(|error| raise_mem(&error))?;
        Ok(Self { parts: Arc::new(parts), ordinal: OnceLock::new() })
    }

    /// `pages`, loaded in these parts.
    pub(crate) fn of(&self, pages: Pages) -> PyResult<Pages> {
        let Place::Device(ordinal) = pages.place() else {
            return Err(invalid("parts are given, but the blocks are in host memory: pass parts=None"));
        };
        self.parts.check(pages.page_bytes()).map_err(|error| raise_mem(&error))?;
        if self.ordinal.set(ordinal).is_err() {
            return Err(invalid("these parts were used by an earlier load: make new ones for each"));
        }
        Ok(pages.in_parts(Arc::clone(&self.parts)))
    }
}
