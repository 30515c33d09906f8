//! Many whole numbers from Python: token ids, block ids, slots.

use std::fmt;

use kvortex_mem::span::Place;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::dlpack::{Items, Name, Tensor};
use crate::errors::{UnsupportedError, invalid};
use crate::keys::kind_of;

/// What the numbers of an argument are, for messages.
pub(crate) struct Numbers {
    /// The argument.
    pub(crate) name: &'static str,
    /// One of them, "a token id".
    pub(crate) one: &'static str,
    /// All of them, "prompt".
    pub(crate) whole: &'static str,
    /// How many there may be.
    pub(crate) most: usize,
}

/// Numbers, or an array that is still to be read.
pub(crate) enum Given {
    Ready(Vec<u32>),
    Array(&'static Numbers, Tensor),
}

impl Numbers {
    /// Takes a list or tuple of ints, or an array of one dimension and any integer type in host memory.
    pub(crate) fn take(&'static self, numbers: &Bound<'_, PyAny>) -> PyResult<Given> {
        if let Ok(list) = numbers.cast::<PyList>() {
            return self.all(list.len(), list.iter());
        }
        if let Ok(tuple) = numbers.cast::<PyTuple>() {
            return self.all(tuple.len(), tuple.iter());
        }
        self.array(Tensor::import(numbers, Name::Whole(self.name))?, &kind_of(numbers))
    }

    fn all<'py>(&self, count: usize, numbers: impl Iterator<Item = Bound<'py, PyAny>>) -> PyResult<Given> {
        self.check_count(count)?;
        numbers.enumerate().map(|number| self.number(number)).collect::<PyResult<_>>().map(Given::Ready)
    }

    fn array(&'static self, array: Tensor, kind: &str) -> PyResult<Given> {
        let (name, shape) = (self.name, &array.shape);
        let &[count] = shape.as_slice() else {
            return Err(invalid(format!(
                "{name} has shape {shape:?}: pass the ids of one {}, one dimension",
                self.whole
            )));
        };
        self.check_count(count)?;
        if array.kind == Items::Other || ![1, 2, 4, 8].contains(&array.itemsize) {
            return Err(invalid(format!("{name} is {kind} of no integer type: pass ids as integers")));
        }
        if array.region.place() != Place::Host {
            let place = array.region.place();
            return Err(UnsupportedError::new_err(format!(
                "{name} is in {place}, where the CPU cannot read it: pass it with .cpu()"
            )));
        }
        Ok(Given::Array(self, array))
    }

    fn check_count(&self, count: usize) -> PyResult<()> {
        let Self { name, whole, most, .. } = self;
        if count > *most {
            return Err(invalid(format!("a {whole} may have at most {most} {name}, but this one has {count}: cut it")));
        }
        Ok(())
    }

    fn number(&self, (i, number): (usize, Bound<'_, PyAny>)) -> PyResult<u32> {
        number.extract().map_err(|_| {
            let shown = number.repr().map_or_else(|_| kind_of(&number), |text| text.to_string());
            invalid(self.out_of_range(i, shown))
        })
    }

    fn out_of_range(&self, i: usize, number: impl fmt::Display) -> String {
        format!("{}[{i}] is {number}: {} is a whole number from 0 to {}", self.name, self.one, u32::MAX)
    }
}

impl Given {
    /// The numbers; needs no GIL.
    ///
    /// # Errors
    /// The message for the first one out of range.
    pub(crate) fn read(self) -> Result<Vec<u32>, String> {
        match self {
            Self::Ready(numbers) => Ok(numbers),
            Self::Array(numbers, array) => read(&array).map_err(|(i, shown)| numbers.out_of_range(i, shown)),
        }
    }
}

/// The numbers of an array, or the first that is out of range and where it is.
fn read(array: &Tensor) -> Result<Vec<u32>, (usize, String)> {
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

/// Reads first and looks for numbers out of range afterwards: they show in the upper 32 bits.
fn convert<const N: usize>(array: &Tensor, read: impl Fn([u8; N]) -> i64 + Copy) -> Result<Vec<u32>, (usize, String)> {
    let mut seen = 0;
    let numbers = array.items().map(read).inspect(|&number| seen |= number).map(|number| number as u32).collect();
    if seen >> u32::BITS == 0 {
        return Ok(numbers);
    }
    let first = array.items().map(read).enumerate().find(|&(_, number)| number >> u32::BITS != 0);
    // An array that changes meanwhile may look right the second time.
    let (i, number) = first.unwrap_or_default();
    Err((i, if array.kind == Items::Signed { number.to_string() } else { (number as u64).to_string() }))
}
