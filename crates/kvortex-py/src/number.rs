//! Numbers from Python, refused by name.

use pyo3::prelude::*;

use crate::errors::invalid;
use crate::keys::kind_of;

/// A whole number that is not negative.
pub(crate) fn whole(name: &str, number: &Bound<'_, PyAny>) -> PyResult<usize> {
    number.extract().map_err(|_| {
        let shown = number.repr().map_or_else(|_| kind_of(number), |text| text.to_string());
        invalid(format!("{name} is {shown}: give a whole number that is not negative"))
    })
}
