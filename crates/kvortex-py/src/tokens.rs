//! Token ids from Python.

use kvortex::MAX_TOKENS;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::dlpack::{Items, Name, Tensor};
use crate::errors::invalid;
use crate::keys::kind_of;

/// Token ids, or an array that is still to be read.
pub(crate) enum Tokens {
    Ready(Vec<u32>),
    Array(Tensor),
}

impl Tokens {
    /// Takes a list or tuple of ints, or an array of one dimension and any integer type.
    pub(crate) fn from_python(tokens: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(list) = tokens.cast::<PyList>() {
            check_count(list.len())?;
            return list.iter().enumerate().map(token).collect::<PyResult<_>>().map(Self::Ready);
        }
        if let Ok(tuple) = tokens.cast::<PyTuple>() {
            check_count(tuple.len())?;
            return tuple.iter().enumerate().map(token).collect::<PyResult<_>>().map(Self::Ready);
        }
        let array = Tensor::import(tokens, Name::Whole("tokens"))?;
        let &[count] = array.shape.as_slice() else {
            return Err(invalid(format!(
                "tokens has shape {:?}: pass the ids of one prompt, one dimension",
                array.shape
            )));
        };
        check_count(count)?;
        if array.items == Items::Other || ![1, 2, 4, 8].contains(&array.itemsize) {
            return Err(invalid(format!("tokens is {} of no integer type: pass ids as integers", kind_of(tokens))));
        }
        Ok(Self::Array(array))
    }

    /// The ids; needs no GIL.
    ///
    /// # Errors
    /// The message for the first id out of range.
    pub(crate) fn ids(self) -> Result<Vec<u32>, String> {
        match self {
            Self::Ready(ids) => Ok(ids),
            Self::Array(array) => read(&array),
        }
    }
}

fn check_count(count: usize) -> PyResult<()> {
    if count > MAX_TOKENS {
        return Err(invalid(format!(
            "a prompt may have at most {MAX_TOKENS} tokens, but this one has {count}: cut it"
        )));
    }
    Ok(())
}

fn token((i, id): (usize, Bound<'_, PyAny>)) -> PyResult<u32> {
    id.extract().map_err(|_| {
        let shown = id.repr().map_or_else(|_| kind_of(&id), |text| text.to_string());
        invalid(out_of_range(i, &shown))
    })
}

fn out_of_range(i: usize, id: &str) -> String {
    format!("tokens[{i}] is {id}: a token id is a whole number from 0 to {}", u32::MAX)
}

fn read(array: &Tensor) -> Result<Vec<u32>, String> {
    let bytes = array.items_in_order();
    let signed = array.items == Items::Signed;
    match (array.itemsize, signed) {
        (1, true) => convert(&bytes, i8::from_ne_bytes),
        (1, false) => convert(&bytes, u8::from_ne_bytes),
        (2, true) => convert(&bytes, i16::from_ne_bytes),
        (2, false) => convert(&bytes, u16::from_ne_bytes),
        (4, true) => convert(&bytes, i32::from_ne_bytes),
        (4, false) => convert(&bytes, u32::from_ne_bytes),
        (_, true) => convert(&bytes, i64::from_ne_bytes),
        (_, false) => convert(&bytes, u64::from_ne_bytes),
    }
}

fn convert<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Result<Vec<u32>, String>
where
    T: TryInto<u32> + Copy + std::fmt::Display,
{
    let ids = bytes.as_chunks::<N>().0.iter().map(|&item| read(item)).enumerate();
    ids.map(|(i, id)| id.try_into().map_err(|_| out_of_range(i, &id.to_string()))).collect()
}
