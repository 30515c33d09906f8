//! Block keys from Python: packed bytes as they are, or a list of 32-byte bytes that is packed first.

use kvortex::{KEY_BYTES, Keys};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyByteArray, PyBytes, PyList, PyMemoryView, PyTuple};

use crate::errors::{invalid, raise};

/// Packed keys that outlive the GIL: shared with an immutable `bytes`, or a copy of something that may change.
pub(crate) enum PackedKeys {
    Shared(PyBackedBytes),
    Copied(Vec<u8>),
}

impl PackedKeys {
    /// Takes `bytes` without a copy; copies a bytearray, a byte buffer, or a list or tuple of 32-byte `bytes`.
    pub(crate) fn from_python(keys: &Bound<'_, PyAny>) -> PyResult<Self> {
        let packed = if let Ok(bytes) = keys.cast::<PyBytes>() {
            Self::Shared(bytes.clone().into())
        } else if let Ok(list) = keys.cast::<PyList>() {
            Self::Copied(join(list.len(), list.iter())?)
        } else if let Ok(tuple) = keys.cast::<PyTuple>() {
            Self::Copied(join(tuple.len(), tuple.iter())?)
        } else {
            Self::Copied(buffer_bytes(keys)?)
        };
        Keys::packed(packed.bytes()).map_err(raise)?;
        Ok(packed)
    }

    /// The keys; whole ones, as was checked when they were taken.
    pub(crate) fn keys(&self) -> Keys<'_> {
        Keys::from_slices(self.bytes().as_chunks::<KEY_BYTES>().0)
    }

    /// Number of keys.
    pub(crate) fn len(&self) -> usize {
        self.bytes().len() / KEY_BYTES
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Shared(bytes) => bytes,
            Self::Copied(bytes) => bytes,
        }
    }
}

fn join<'py>(count: usize, keys: impl Iterator<Item = Bound<'py, PyAny>>) -> PyResult<Vec<u8>> {
    let mut packed = Vec::with_capacity(count * KEY_BYTES);
    for (i, key) in keys.enumerate() {
        match key.cast::<PyBytes>().map(|key| key.as_bytes()) {
            Ok(bytes) if bytes.len() == KEY_BYTES => packed.extend_from_slice(bytes),
            Ok(bytes) => return Err(invalid(format!("keys[{i}] has {} bytes: a key has {KEY_BYTES}", bytes.len()))),
            Err(_) => return Err(invalid(format!("keys[{i}] is {}: a key is {KEY_BYTES} bytes", kind_of(&key)))),
        }
    }
    Ok(packed)
}

fn buffer_bytes(keys: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    let unfit = || {
        invalid(format!(
            "keys is {}: pass packed bytes of n * {KEY_BYTES}, or a list of {KEY_BYTES}-byte bytes",
            kind_of(keys)
        ))
    };
    if let Ok(array) = keys.cast::<PyByteArray>() {
        return Ok(array.to_vec());
    }
    let view = PyMemoryView::from(keys).map_err(|_| unfit())?;
    if view.getattr("itemsize")?.extract::<usize>()? != 1 {
        return Err(unfit());
    }
    Ok(view.call_method0("tobytes")?.cast_into::<PyBytes>()?.as_bytes().to_vec())
}

/// The name of an object's type, for messages.
pub(crate) fn kind_of(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "an unknown type".to_owned(), |name| name.to_string())
}
