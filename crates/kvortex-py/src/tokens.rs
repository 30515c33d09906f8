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
        if array.kind == Items::Other || ![1, 2, 4, 8].contains(&array.itemsize) {
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
    let signed = array.kind == Items::Signed;
    match (array.itemsize, signed) {
        (1, true) => convert(array, |item| i8::from_ne_bytes(item).into()),
        (1, false) => convert(array, |item| u8::from_ne_bytes(item).into()),
        (2, true) => convert(array, |item| i16::from_ne_bytes(item).into()),
        (2, false) => convert(array, |item| u16::from_ne_bytes(item).into()),
        (4, true) => convert(array, |item| i32::from_ne_bytes(item).into()),
        (4, false) => convert(array, |item| u32::from_ne_bytes(item).into()),
        // Of 64 bits, signed or not, the upper 32 must be 0.
        _ => convert(array, i64::from_ne_bytes),
    }
}

/// Reads first and looks for ids out of range afterwards: they show in the upper 32 bits.
fn convert<const N: usize>(array: &Tensor, read: impl Fn([u8; N]) -> i64 + Copy) -> Result<Vec<u32>, String> {
    let mut seen = 0;
    let ids = array.items().map(read).inspect(|&id| seen |= id).map(|id| id as u32).collect();
    if seen >> u32::BITS == 0 {
        return Ok(ids);
    }
    let first = array.items().map(read).enumerate().find(|&(_, id)| id >> u32::BITS != 0);
    // An array that changes meanwhile may look right the second time.
    let (i, id) = first.unwrap_or_default();
    let shown = if array.kind == Items::Signed { id.to_string() } else { (id as u64).to_string() };
    Err(out_of_range(i, &shown))
}
