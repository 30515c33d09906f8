//! An engine's paged memory, described once, and blocks of it named by number.

use std::sync::Arc;

use kvortex::{Error, MAX_TOKENS};
use kvortex_mem::MemError;
use kvortex_mem::span::{Ids, Pages, Pattern, Region, Segment};
use pyo3::prelude::*;

use crate::dlpack::{Access, Name, Tensor};
use crate::errors::{detached, entry, invalid, raise_mem};
use crate::keys::kind_of;
use crate::number::whole;
use crate::numbers::Numbers;
use crate::parts::PyParts;
use crate::tensors::{sequence, writable};

const BLOCK_IDS: &Numbers = &Numbers { name: "block_ids", one: "a block id", whole: "call", most: MAX_TOKENS };
const SLOTS: &Numbers = &Numbers { name: "slot_mapping", one: "a slot", whole: "call", most: MAX_TOKENS };

/// Tokens of a block if nobody says otherwise.
const BLOCK_TOKENS: usize = 16;

/// An engine's paged KV memory: tensors with a block dimension. Block `i` is the bytes of block `i` of each tensor, one tensor
/// after the other, each in C order of its other dimensions.
#[pyclass(frozen, module = "kvortex")]
pub(crate) struct PagedCache(Arc<Tables>);

/// Blocks of a `PagedCache`, to be passed as data or as targets.
#[pyclass(frozen, module = "kvortex")]
pub(crate) struct PagedBlocks {
    tables: Arc<Tables>,
    ids: Arc<Ids>,
}

struct Tables {
    tables: Vec<Table>,
    block_count: usize,
    block_bytes: usize,
}

/// One tensor of the cache.
struct Table {
    region: Region,
    pattern: Arc<Pattern>,
    first: isize,
    stride: isize,
    access: Access,
    kind: String,
}

#[pymethods]
impl PagedCache {
    /// Takes the tensors as they are, and keeps them alive. `block_dim` is their block dimension, from the end if negative.
    #[new]
    #[pyo3(signature = (tensors, block_dim=None), text_signature = "(tensors, block_dim=0)")]
    fn new(py: Python<'_>, tensors: &Bound<'_, PyAny>, block_dim: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        entry(py, || {
            let block_dim = block_dim.map_or(Ok(0), dimension)?;
            let tensors = sequence(tensors).unwrap_or_else(|| vec![tensors.clone()]);
            if tensors.is_empty() {
                return Err(invalid("PagedCache([]) has no bytes: pass at least one tensor"));
            }
            Tables::import(&tensors, block_dim).map(|tables| Self(Arc::new(tables)))
        })
    }

    /// Blocks by their numbers, any number of them: a list, or an array of any integer type.
    fn blocks(&self, py: Python<'_>, block_ids: &Bound<'_, PyAny>) -> PyResult<PagedBlocks> {
        entry(py, || {
            let ids = BLOCK_IDS.take(block_ids)?;
            self.pick(py, || ids.read())
        })
    }

    /// The blocks of a slot mapping: block * block_tokens + offset for each token of whole blocks, in order.
    #[pyo3(signature = (slot_mapping, block_tokens=None), text_signature = "($self, slot_mapping, block_tokens=16)")]
    fn slots(
        &self,
        py: Python<'_>,
        slot_mapping: &Bound<'_, PyAny>,
        block_tokens: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PagedBlocks> {
        entry(py, || {
            let block_tokens = block_tokens.map_or(Ok(BLOCK_TOKENS), |tokens| whole("block_tokens", tokens))?;
            if block_tokens == 0 {
                return Err(invalid("block_tokens is 0: give the tokens of a block, 16 for most engines"));
            }
            let slots = SLOTS.take(slot_mapping)?;
            self.pick(py, || blocks_of(&slots.read()?, block_tokens))
        })
    }

    /// New parts for one load of blocks: one for each tensor of the cache, in order.
    fn parts(&self) -> PyResult<PyParts> {
        let mut end = 0;
        let ends = self.0.tables.iter().map(|table| {
            end += table.pattern.bytes();
            end
        });
        PyParts::ending_at(ends.collect())
    }

    /// Number of blocks.
    #[getter]
    fn num_blocks(&self) -> usize {
        self.0.block_count
    }

    /// Bytes of one block, all tensors together.
    #[getter]
    fn block_size_bytes(&self) -> usize {
        self.0.block_bytes
    }

    fn __repr__(&self) -> String {
        let Tables { tables, block_count, block_bytes } = &*self.0;
        format!("<kvortex.PagedCache of {block_count} blocks of {block_bytes} bytes in {} tensors>", tables.len())
    }
}

impl PagedCache {
    fn pick(&self, py: Python<'_>, read: impl FnOnce() -> Result<Vec<u32>, String> + Send) -> PyResult<PagedBlocks> {
        let count = self.0.block_count;
        let ids = detached(py, || {
            let ids = read().map_err(Error::InvalidArgument)?;
            let beyond = ids.iter().position(|&id| id as usize >= count);
            beyond.map_or(Ok(()), |i| Err(Error::InvalidArgument(unknown(i, ids[i], count))))?;
            Ok(Ids::from(ids))
        })?;
        Ok(PagedBlocks { tables: self.0.clone(), ids: Arc::new(ids) })
    }
}

fn unknown(i: usize, id: u32, count: usize) -> String {
    format!("block {id}, number {i} of the call, does not exist: the cache has {count} blocks, numbered from 0")
}

fn dimension(block_dim: &Bound<'_, PyAny>) -> PyResult<isize> {
    let shown = || block_dim.repr().map_or_else(|_| kind_of(block_dim), |text| text.to_string());
    block_dim.extract().map_err(|_| invalid(format!("block_dim is {}: give the number of a dimension", shown())))
}

/// The blocks of slots that fill them in order.
fn blocks_of(slots: &[u32], block_tokens: usize) -> Result<Vec<u32>, String> {
    let whole = "pass the slots of whole blocks in order";
    if !slots.len().is_multiple_of(block_tokens) {
        let count = slots.len();
        return Err(format!("slot_mapping has {count} slots, no multiple of block_tokens ({block_tokens}): {whole}"));
    }
    let block = |(index, slots): (usize, &[u32])| {
        let (first, at) = (slots[0] as usize, index * block_tokens);
        if !first.is_multiple_of(block_tokens) {
            return Err(format!(
                "slot_mapping[{at}] is {first}, no multiple of block_tokens ({block_tokens}): {whole}"
            ));
        }
        match slots.iter().enumerate().find(|&(offset, &slot)| slot as usize != first + offset) {
            Some((offset, slot)) => {
                Err(format!("slot_mapping[{}] is {slot}, not {}: {whole}", at + offset, first + offset))
            }
            None => Ok((first / block_tokens) as u32),
        }
    };
    slots.chunks_exact(block_tokens).enumerate().map(block).collect()
}

#[pymethods]
impl PagedBlocks {
    fn __len__(&self) -> usize {
        self.count()
    }

    /// The numbers of the blocks.
    #[getter]
    fn block_ids(&self) -> Vec<u32> {
        self.ids.list().to_vec()
    }
}

impl PagedBlocks {
    pub(crate) fn count(&self) -> usize {
        self.ids.list().len()
    }

    /// The blocks as pages; `name` is the argument that they are.
    pub(crate) fn pages(&self, written: bool, name: &str) -> PyResult<Pages> {
        if written {
            let name = format!("{name}: tensors");
            for (i, table) in self.tables.tables.iter().enumerate() {
                writable(table.access, Name::Item(&name, i), || table.kind.clone())?;
            }
        }
        self.tables.pages(&self.ids).map_err(|error| invalid(format!("{name}: {error}")))
    }
}

impl Tables {
    fn import(tensors: &[Bound<'_, PyAny>], block_dim: isize) -> PyResult<Self> {
        let mut tables = Vec::with_capacity(tensors.len());
        let mut block_count = None;
        for (i, object) in tensors.iter().enumerate() {
            let name = Name::Item("tensors", i);
            let (table, count) = Table::of(Tensor::import(object, name)?, kind_of(object), block_dim, name)?;
            let expected = *block_count.get_or_insert(count);
            if count != expected {
                return Err(invalid(format!(
                    "{name} has {count} blocks where tensors[0] has {expected}: make one PagedCache for each number of blocks"
                )));
            }
            tables.push(table);
        }
        let block_bytes = tables.iter().map(|table| table.pattern.bytes()).fold(0, usize::saturating_add);
        let tables = Self { tables, block_count: block_count.unwrap_or(0), block_bytes };
        // Without blocks, this fails for tensors in different places.
        tables.pages(&Arc::new(Ids::from(Vec::new()))).map_err(|error| raise_mem(&error))?;
        Ok(tables)
    }

    fn pages(&self, ids: &Arc<Ids>) -> Result<Pages, MemError> {
        let segment = |table: &Table| Segment::Picked {
            region: table.region.clone(),
            pattern: Arc::clone(&table.pattern),
            first: table.first,
            stride: table.stride,
            ids: Arc::clone(ids),
            table_count: self.block_count,
        };
        Pages::new(self.tables.iter().map(segment).collect())
    }
}

impl Table {
    /// A tensor as a table of its blocks, and how many there are.
    fn of(tensor: Tensor, kind: String, block_dim: isize, name: Name<'_>) -> PyResult<(Self, usize)> {
        let Tensor { region, origin, itemsize, mut shape, mut strides, access, .. } = tensor;
        let dims = shape.len() as isize;
        if !(-dims..dims).contains(&block_dim) {
            return Err(invalid(format!(
                "block_dim is {block_dim}, and {name} has shape {shape:?}: give one of its dimensions"
            )));
        }
        let dim = block_dim.rem_euclid(dims) as usize;
        let (count, stride) = (shape.remove(dim), strides.remove(dim));
        let pattern =
            Pattern::strided(itemsize, &shape, &strides).map_err(|error| invalid(format!("{name}: {error}")))?;
        if pattern.bytes() == 0 {
            return Err(invalid(format!("{name} has no bytes in a block: its other dimensions are {shape:?}")));
        }
        Ok((Self { region, pattern: Arc::new(pattern), first: origin, stride, access, kind }, count))
    }
}
