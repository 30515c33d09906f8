//! What a caller passes as blocks, as the pages of a transfer: one tensor with a leading block dimension, a list with one
//! tensor per block, or several of either put together.

use std::sync::Arc;

use kvortex_mem::span::{Pages, Pattern, Piece, Segment};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::dlpack::{Access, Name, Tensor};
use crate::errors::invalid;
use crate::keys::kind_of;
use crate::paged::PagedBlocks;
use crate::stream::in_stream;

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

/// Reads `data` as `count` pages that are only read, after what `stream` was given.
pub(crate) fn sources(data: &Bound<'_, PyAny>, count: usize, stream: Option<&Bound<'_, PyAny>>) -> PyResult<Pages> {
    in_stream(Wanted { count, written: false }.pages(data, "data")?, stream, data.py())
}

/// Reads `out` as `count` pages that are written, after what `stream` was given and before what it will be given.
pub(crate) fn targets(out: &Bound<'_, PyAny>, count: usize, stream: Option<&Bound<'_, PyAny>>) -> PyResult<Pages> {
    in_stream(Wanted { count, written: true }.pages(out, "out")?, stream, out.py())
}

/// Reads `blocks`, however many there are.
pub(crate) fn all_of(blocks: &Bound<'_, PyAny>) -> PyResult<Pages> {
    let count = match (blocks.cast::<PagedBlocks>(), blocks.cast::<Segments>()) {
        (Ok(blocks), _) => blocks.get().count(),
        (_, Ok(parts)) => leading(&parts.get().tensors.bind(blocks.py()).get_item(0)?, "blocks.tensors[0]")?,
        _ => leading(blocks, "blocks")?,
    };
    Wanted { count, written: false }.pages(blocks, "blocks")
}

/// How many blocks a tensor or a list of tensors has.
fn leading(part: &Bound<'_, PyAny>, name: &str) -> PyResult<usize> {
    match sequence(part) {
        Some(items) => Ok(items.len()),
        None => Ok(Tensor::import(part, Name::Whole(name))?.shape.first().copied().unwrap_or(0)),
    }
}

/// What an argument must be. The name that goes with it is for messages.
#[derive(Clone, Copy)]
struct Wanted {
    count: usize,
    written: bool,
}

impl Wanted {
    fn pages(self, blocks: &Bound<'_, PyAny>, name: &str) -> PyResult<Pages> {
        if let Ok(blocks) = blocks.cast::<PagedBlocks>() {
            return self.paged(blocks.get(), name);
        }
        let segments = match blocks.cast::<Segments>() {
            Ok(parts) => {
                let parts = parts.get().tensors.bind(blocks.py()).iter().enumerate();
                parts.map(|(i, part)| self.segment(&part, &format!("{name}.tensors[{i}]"))).collect::<PyResult<_>>()?
            }
            Err(_) => vec![self.segment(blocks, name)?],
        };
        Pages::new(segments).map_err(|error| invalid(format!("{name}: {error}")))
    }

    fn paged(self, blocks: &PagedBlocks, name: &str) -> PyResult<Pages> {
        let (found, count) = (blocks.count(), self.count);
        if found != count {
            return Err(invalid(format!("{name} has {found} blocks for {count} keys: give one block id for each key")));
        }
        blocks.pages(self.written, name)
    }

    fn segment(self, part: &Bound<'_, PyAny>, name: &str) -> PyResult<Segment> {
        let count = self.count;
        match sequence(part) {
            Some(items) if items.len() == count => self.list(&items, name),
            Some(items) => Err(invalid(format!(
                "{name} has {} tensors for {count} keys: pass one for each key, or one tensor with a leading block dimension",
                items.len()
            ))),
            None => self.table(part, Name::Whole(name)),
        }
    }

    fn table(self, part: &Bound<'_, PyAny>, name: Name<'_>) -> PyResult<Segment> {
        let (tensor, count) = (self.tensor(part, name)?, self.count);
        if tensor.shape.first() != Some(&count) {
            return Err(invalid(format!(
                "{name} has shape {:?} for {count} keys: the leading dimension must be {count}, one block for each key",
                tensor.shape
            )));
        }
        let pattern = pattern(&tensor, 1, name)?;
        Ok(Segment::Table { pattern, first: tensor.origin, stride: tensor.strides[0], count, region: tensor.region })
    }

    /// One tensor per block. Blocks of one form, which is the rule, share one pattern.
    fn list(self, items: &[Bound<'_, PyAny>], name: &str) -> PyResult<Segment> {
        let mut pieces: Vec<Piece> = Vec::with_capacity(items.len());
        let mut last: Option<(Form, Arc<Pattern>)> = None;
        for (i, item) in items.iter().enumerate() {
            let name = Name::Item(name, i);
            let tensor = self.tensor(item, name)?;
            let pattern = match &last {
                Some((form, pattern)) if form.fits(&tensor) => pattern.clone(),
                _ => last.insert((Form::of(&tensor), pattern(&tensor, 0, name)?)).1.clone(),
            };
            pieces.push(Piece { region: tensor.region, offset: tensor.origin, pattern });
        }
        Ok(Segment::List(pieces))
    }

    fn tensor(self, object: &Bound<'_, PyAny>, name: Name<'_>) -> PyResult<Tensor> {
        let tensor = Tensor::import(object, name)?;
        if self.written {
            writable(tensor.access, name, || kind_of(object))?;
        }
        Ok(tensor)
    }
}

/// Refuses memory that must not be written.
pub(crate) fn writable(access: Access, name: Name<'_>, kind: impl FnOnce() -> String) -> PyResult<()> {
    match access {
        Access::Writable => Ok(()),
        Access::ReadOnly => Err(invalid(format!("{name} is read-only: pass memory that can be written"))),
        Access::Unsaid => Err(invalid(format!(
            "{name} is {} whose DLPack, older than 1.0, cannot say whether it may be written: pass a numpy or torch array",
            kind()
        ))),
    }
}

/// The items of a list or tuple; None for anything else, which is then a tensor or nothing we know.
pub(crate) fn sequence<'py>(object: &Bound<'py, PyAny>) -> Option<Vec<Bound<'py, PyAny>>> {
    match object.cast::<PyList>() {
        Ok(list) => Some(list.iter().collect()),
        Err(_) => object.cast::<PyTuple>().ok().map(|tuple| tuple.iter().collect()),
    }
}

/// Item size, shape and strides: what a pattern follows from.
struct Form(usize, Vec<usize>, Vec<isize>);

impl Form {
    fn of(tensor: &Tensor) -> Self {
        Self(tensor.itemsize, tensor.shape.clone(), tensor.strides.clone())
    }

    fn fits(&self, tensor: &Tensor) -> bool {
        self.0 == tensor.itemsize && self.1 == tensor.shape && self.2 == tensor.strides
    }
}

/// The fragments of one block: dimensions from `outer` on.
fn pattern(tensor: &Tensor, outer: usize, name: Name<'_>) -> PyResult<Arc<Pattern>> {
    Pattern::strided(tensor.itemsize, &tensor.shape[outer..], &tensor.strides[outer..])
        .map(Arc::new)
        .map_err(|error| invalid(format!("{name}: {error}")))
}
