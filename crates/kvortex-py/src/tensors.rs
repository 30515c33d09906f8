//! What a caller passes as blocks, as the pages of a transfer: one tensor with a leading block dimension, a list with one
//! tensor per block, or several of either put together.

use std::sync::Arc;

use kvortex_mem::span::{Pages, Pattern, Piece, Segment};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::dlpack::{Name, Tensor};
use crate::errors::invalid;
use crate::keys::kind_of;

/// Blocks whose bytes lie in several tensors: block `i` is `t0[i]`, `t1[i]`, ... one after the other, each in C order.
///
/// Each part is a tensor with a leading block dimension, or a list with one tensor per block.
#[pyclass(frozen, module = "kvortex")]
pub(crate) struct Segments {
    tensors: Py<PyTuple>,
}

#[pymethods]
impl Segments {
    #[new]
    fn new(tensors: &Bound<'_, PyAny>) -> PyResult<Self> {
        let tensors = match sequence(tensors) {
            Some(tensors) if !tensors.is_empty() => PyTuple::new(tensors[0].py(), &tensors)?,
            Some(_) => return Err(invalid("Segments([]) has no bytes: pass at least one tensor")),
            None => return Err(invalid(format!("Segments takes a list of tensors, not {}", kind_of(tensors)))),
        };
        Ok(Self { tensors: tensors.unbind() })
    }

    /// The parts, in the order of a block's bytes.
    #[getter]
    fn tensors<'py>(&self, py: Python<'py>) -> Bound<'py, PyTuple> {
        self.tensors.bind(py).clone()
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        self.tensors.bind(py).len()
    }
}

/// Reads `blocks` as `count` pages. `name` is the argument's name, for messages.
pub(crate) fn pages(blocks: &Bound<'_, PyAny>, count: usize, name: &str) -> PyResult<Pages> {
    let segments = match blocks.cast::<Segments>() {
        Ok(parts) => {
            let parts = parts.get().tensors.bind(blocks.py());
            let named = parts.iter().enumerate();
            named
                .map(|(i, part)| segment(&part, count, &format!("{name}.tensors[{i}]")))
                .collect::<PyResult<Vec<_>>>()?
        }
        Err(_) => vec![segment(blocks, count, name)?],
    };
    Pages::new(segments).map_err(|error| invalid(format!("{name}: {error}")))
}

fn segment(part: &Bound<'_, PyAny>, count: usize, name: &str) -> PyResult<Segment> {
    match sequence(part) {
        Some(items) if items.len() == count => list(&items, name),
        Some(items) => Err(invalid(format!(
            "{name} has {} tensors for {count} keys: pass one for each key, or one tensor with a leading block dimension",
            items.len()
        ))),
        None => table(Tensor::import(part, Name::Whole(name))?, count, name),
    }
}

/// The items of a list or tuple; None for anything else, which is then a tensor or nothing we know.
fn sequence<'py>(object: &Bound<'py, PyAny>) -> Option<Vec<Bound<'py, PyAny>>> {
    match object.cast::<PyList>() {
        Ok(list) => Some(list.iter().collect()),
        Err(_) => object.cast::<PyTuple>().ok().map(|tuple| tuple.iter().collect()),
    }
}

fn table(tensor: Tensor, count: usize, name: &str) -> PyResult<Segment> {
    if tensor.shape.first() != Some(&count) {
        return Err(invalid(format!(
            "{name} has shape {:?} for {count} keys: the leading dimension must be {count}, one block for each key",
            tensor.shape
        )));
    }
    let pattern = pattern(&tensor, 1, Name::Whole(name))?;
    Ok(Segment::Table { pattern, first: tensor.origin, stride: tensor.strides[0], count, region: tensor.region })
}

/// One tensor per block. Blocks of one form, which is the rule, share one pattern.
fn list(items: &[Bound<'_, PyAny>], name: &str) -> PyResult<Segment> {
    let mut pieces: Vec<Piece> = Vec::with_capacity(items.len());
    let mut last: Option<(Form, Arc<Pattern>)> = None;
    for (i, item) in items.iter().enumerate() {
        let name = Name::Item(name, i);
        let tensor = Tensor::import(item, name)?;
        let form = (tensor.itemsize, tensor.shape.clone(), tensor.strides.clone());
        let shared = last.take().filter(|(known, _)| *known == form);
        let shared = match shared {
            Some((_, pattern)) => pattern,
            None => pattern(&tensor, 0, name)?,
        };
        pieces.push(Piece { region: tensor.region, offset: tensor.origin, pattern: shared.clone() });
        last = Some((form, shared));
    }
    Ok(Segment::List(pieces))
}

/// Item size, shape and strides.
type Form = (usize, Vec<usize>, Vec<isize>);

/// The fragments of one block: dimensions from `outer` on.
fn pattern(tensor: &Tensor, outer: usize, name: Name<'_>) -> PyResult<Arc<Pattern>> {
    Pattern::strided(tensor.itemsize, &tensor.shape[outer..], &tensor.strides[outer..])
        .map(Arc::new)
        .map_err(|error| invalid(format!("{name}: {error}")))
}
