//! Groups of layers with blocks of their own.

use kvortex::ranks::{Group, Groups};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::{entry, invalid, raise};
use crate::keys::PackedKeys;
use crate::number::whole;

/// Groups of layers that an engine gives blocks of `block_tokens` tokens of their own. Of each group `windows` has how many
/// tokens a token sees, itself among them, or 0 for all. Groups in `look_ahead` keep something of the next token too.
#[pyclass(name = "BlockGroups", frozen, module = "kvortex")]
pub(crate) struct PyGroups(Groups);

#[pymethods]
impl PyGroups {
    #[new]
    #[pyo3(signature = (block_tokens, windows, look_ahead=Vec::new()), text_signature = "(block_tokens, windows, look_ahead=())")]
    fn new(block_tokens: &Bound<'_, PyAny>, windows: Vec<usize>, look_ahead: Vec<usize>) -> PyResult<Self> {
        if let Some(group) = look_ahead.iter().find(|&&group| group >= windows.len()) {
            return Err(invalid(format!("look_ahead names group {group} of {}: count from 0", windows.len())));
        }
        let groups = windows.iter().enumerate();
        let groups =
            groups.map(|(group, &window)| Group { window, looks_ahead: look_ahead.contains(&group) }).collect();
        Groups::new(whole("block_tokens", block_tokens)?, groups).map(Self).map_err(raise)
    }

    /// The keys of a group's blocks, packed, which the engine names `hashes`.
    fn keys<'py>(
        &self,
        py: Python<'py>,
        group: &Bound<'py, PyAny>,
        hashes: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        entry(py, || {
            let (group, hashes) = (self.group(group)?, PackedKeys::from_python(hashes)?);
            Ok(PyBytes::new(py, self.0.keys(group, hashes.keys()).as_flattened()))
        })
    }

    /// The first block of a group that the tokens behind `blocks` blocks still read.
    fn first_read(&self, group: &Bound<'_, PyAny>, blocks: &Bound<'_, PyAny>) -> PyResult<usize> {
        Ok(self.0.first_read(self.group(group)?, whole("blocks", blocks)?))
    }

    fn __len__(&self) -> usize {
        self.0.all().len()
    }
}

impl PyGroups {
    pub(crate) const fn groups(&self) -> &Groups {
        &self.0
    }

    fn group(&self, number: &Bound<'_, PyAny>) -> PyResult<usize> {
        let (group, count) = (whole("group", number)?, self.0.all().len());
        if group < count { Ok(group) } else { Err(invalid(format!("group is {group} of {count}: count from 0"))) }
    }
}
