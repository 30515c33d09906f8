//! Blocks of a prefix that are on the disk only.

use kvortex::Promotion;
use pyo3::prelude::*;

use crate::errors::entry;
use crate::number::whole;

/// Blocks of a prefix that are not in memory, found in the tier below by `RankPlanner.find_below`. Once they were asked for by
/// `RankPlanner.promote`, those that have come, and those that were in memory before, stay there until `release`.
#[pyclass(name = "Promotion", frozen, module = "kvortex")]
pub(crate) struct PyPromotion(pub(crate) Promotion);

#[pymethods]
impl PyPromotion {
    /// Blocks that are wanted from below.
    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// How many of the first `count` blocks that were asked about are wanted from below.
    fn among(&self, py: Python<'_>, count: &Bound<'_, PyAny>) -> PyResult<usize> {
        entry(py, || Ok(self.0.among(whole("count", count)?)))
    }

    /// Whether blocks may still come in time.
    #[getter]
    fn pending(&self) -> bool {
        self.0.is_pending()
    }

    /// Whether its time was over before all had come.
    #[getter]
    fn late(&self) -> bool {
        self.0.is_late()
    }

    /// Seconds that it should take, by how fast blocks came up lately; None if that is not known.
    #[getter]
    fn seconds(&self) -> Option<f64> {
        self.0.seconds()
    }

    /// Lets the blocks be evicted. Doing it again changes nothing.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        entry(py, || {
            py.detach(|| self.0.release());
            Ok(())
        })
    }

    fn __repr__(&self) -> String {
        let pending = if self.0.is_pending() { ", pending" } else { "" };
        format!("<kvortex.Promotion of {} blocks{pending}>", self.0.len())
    }
}
