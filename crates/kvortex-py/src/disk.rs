//! A look into the folders of disk tiers, for the command line.

use std::path::PathBuf;

use kvortex::{Identity, Kept};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors::{detached, entry};

/// What a folder keeps that no engine uses.
///
/// With `blocks` every block is read and compared with its digest; with `wipe` what is not sound is forgotten.
#[pyfunction]
#[pyo3(signature = (folder, blocks=false, wipe=false))]
pub(crate) fn inspect_disk(py: Python<'_>, folder: PathBuf, blocks: bool, wipe: bool) -> PyResult<Bound<'_, PyDict>> {
    entry(py, || {
        let seen = detached(py, || kvortex::inspect_disk(&folder, blocks, wipe))?;
        let dict = PyDict::new(py);
        dict.set_item("block_bytes", seen.block_bytes)?;
        dict.set_item("file_bytes", seen.file_bytes)?;
        dict.set_item("taken_bytes", seen.taken_bytes)?;
        dict.set_item("openings", seen.openings)?;
        dict.set_item("places", seen.places)?;
        dict.set_item("empty", seen.empty)?;
        dict.set_item("stale", seen.stale)?;
        dict.set_item("bad_headers", seen.bad_headers)?;
        dict.set_item("bad_blocks", seen.bad_blocks)?;
        let owner = |identity: &Identity, kept: &Kept| {
            let dict = PyDict::new(py);
            dict.set_item("namespace", identity.namespace.to_string())?;
            dict.set_item("row", identity.row)?;
            dict.set_item("world", identity.world)?;
            dict.set_item("blocks", kept.blocks)?;
            dict.set_item("oldest", kept.oldest)?;
            dict.set_item("newest", kept.newest)?;
            Ok(dict)
        };
        dict.set_item(
            "owners",
            seen.owners.iter().map(|(identity, kept)| owner(identity, kept)).collect::<PyResult<Vec<_>>>()?,
        )?;
        Ok(dict)
    })
}

/// Cuts a folder's file to a size, or to its last block. Its length before and after.
#[pyfunction]
#[pyo3(signature = (folder, size_bytes=None))]
pub(crate) fn trim_disk(py: Python<'_>, folder: PathBuf, size_bytes: Option<u64>) -> PyResult<(u64, u64)> {
    entry(py, || detached(py, || kvortex::trim_disk(&folder, size_bytes)))
}
