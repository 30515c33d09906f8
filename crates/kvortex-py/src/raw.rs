//! Tensors given by their address.

use kvortex_mem::span::Place;
use pyo3::prelude::*;

use crate::errors::invalid;
use crate::number::whole;

/// Memory at an address: items of `itemsize` bytes, `strides` in items. It is passed where a tensor is; nobody checks that the
/// memory is there, and `owner` is what keeps it there.
#[pyclass(frozen, module = "kvortex")]
pub(crate) struct RawTensor {
    /// Address of item 0.
    #[pyo3(get)]
    pub(crate) ptr: usize,
    pub(crate) shape: Vec<usize>,
    /// In items; None for C order without gaps.
    pub(crate) strides: Option<Vec<isize>>,
    /// Bytes of one item.
    #[pyo3(get)]
    pub(crate) itemsize: usize,
    pub(crate) place: Place,
    pub(crate) writable: bool,
    _owner: Option<Py<PyAny>>,
}

#[pymethods]
impl RawTensor {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "each says one thing of the memory, by name")]
    #[pyo3(signature = (ptr, shape, strides=None, itemsize=None, *, device=None, owner=None, writable=true),
           text_signature = "(ptr, shape, strides=None, itemsize=1, *, device='cpu', owner=None, writable=True)")]
    fn new(
        ptr: &Bound<'_, PyAny>,
        shape: &Bound<'_, PyAny>,
        strides: Option<&Bound<'_, PyAny>>,
        itemsize: Option<&Bound<'_, PyAny>>,
        device: Option<&Bound<'_, PyAny>>,
        owner: Option<Py<PyAny>>,
        writable: bool,
    ) -> PyResult<Self> {
        let shape: Vec<usize> = extents("shape", shape)?;
        let strides: Option<Vec<isize>> = strides.map(|strides| extents("strides", strides)).transpose()?;
        if strides.as_ref().is_some_and(|strides| strides.len() != shape.len()) {
            let strides = strides.unwrap_or_default();
            return Err(invalid(format!("strides {strides:?} do not go with shape {shape:?}: one for each dimension")));
        }
        let (ptr, itemsize) = (whole("ptr", ptr)?, itemsize.map_or(Ok(1), |bytes| whole("itemsize", bytes))?);
        if !(1..=MAX_ITEM).contains(&itemsize) {
            return Err(invalid(format!("itemsize is {itemsize}: give the bytes of one item, 1 to {MAX_ITEM}")));
        }
        let place = device.map_or(Ok(Place::Host), place)?;
        Ok(Self { ptr, shape, strides, itemsize, place, writable, _owner: owner })
    }
}

/// Items are numbers; anything larger is a mistake.
const MAX_ITEM: usize = 1 << 16;

fn extents<'py, T: FromPyObjectOwned<'py>>(name: &str, values: &Bound<'py, PyAny>) -> PyResult<Vec<T>> {
    values.extract().map_err(|_| {
        let shown = values.repr().map_or_else(|_| String::from("no sequence"), |text| text.to_string());
        invalid(format!("{name} is {shown}: give a list with one whole number for each dimension"))
    })
}

/// "cpu", "cuda" or "cuda:1", or an object that says so as text.
fn place(device: &Bound<'_, PyAny>) -> PyResult<Place> {
    let text = device.str()?.to_string();
    let ordinal = match text.as_str() {
        "cpu" => return Ok(Place::Host),
        "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()),
    };
    let ordinal = ordinal.ok_or_else(|| invalid(format!("device is {text:?}: give \"cpu\" or \"cuda:0\"")))?;
    Ok(Place::Device(ordinal))
}
