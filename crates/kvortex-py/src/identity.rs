//! Namespaces and key chains.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvortex::{Error, KeyChain, MAX_TOKENS, Namespace, Value};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};

use crate::errors::{detached, entry, invalid, raise};
use crate::keys::kind_of;
use crate::number::whole;
use crate::numbers::Numbers;

const TOKENS: &Numbers = &Numbers { name: "tokens", one: "a token id", whole: "prompt", most: MAX_TOKENS };

/// Lists within lists of a namespace's values; also what stops a list that contains itself.
const MAX_DEPTH: usize = 32;

/// The digest of everything that makes KV bytes incompatible: `Namespace(model="...", dtype="bf16", layers=32)`.
///
/// Values are None, bool, int of 64 bits, float, str, bytes, or lists and tuples of those. The order of the fields does not
/// matter; values of different types differ.
#[pyclass(name = "Namespace", frozen, eq, hash, module = "kvortex")]
#[derive(PartialEq, Hash)]
pub(crate) struct PyNamespace(Namespace);

#[pymethods]
impl PyNamespace {
    #[new]
    #[pyo3(signature = (**fields))]
    fn new(py: Python<'_>, fields: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        entry(py, || {
            let mut builder = Namespace::builder();
            for (name, field) in fields.into_iter().flatten() {
                let name: String = name.extract()?;
                let field = value(&field, &name, 0)?;
                builder = builder.field(&name, field);
            }
            Ok(Self(builder.finish()))
        })
    }

    /// The 32 bytes.
    #[getter]
    fn digest<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.digest())
    }

    /// The digest as 64 hexadecimal digits.
    fn hex(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        format!("<kvortex.Namespace {}>", self.0)
    }
}

fn value(object: &Bound<'_, PyAny>, name: &str, depth: usize) -> PyResult<Value> {
    if object.is_none() {
        return Ok(Value::None);
    }
    // A bool is an int to Python, so it is asked first.
    if object.is_instance_of::<PyBool>() {
        return Ok(Value::Bool(object.is_truthy()?));
    }
    if object.is_instance_of::<PyInt>() {
        let int = object.extract().map_err(|_| invalid(format!("{name} does not fit 64 bits: pass it as text")))?;
        return Ok(Value::Int(int));
    }
    if let Ok(float) = object.cast::<PyFloat>() {
        return Ok(Value::Float(float.extract()?));
    }
    if let Ok(text) = object.cast::<PyString>() {
        return text
            .to_str()
            .map(|text| Value::Text(text.to_owned()))
            .map_err(|_| invalid(format!("{name} is no Unicode")));
    }
    if let Ok(bytes) = object.cast::<PyBytes>() {
        return Ok(Value::Bytes(bytes.as_bytes().to_vec()));
    }
    items(object, name, depth)
}

fn items(object: &Bound<'_, PyAny>, name: &str, depth: usize) -> PyResult<Value> {
    if depth == MAX_DEPTH {
        return Err(invalid(format!("{name} has lists more than {MAX_DEPTH} deep: flatten it")));
    }
    let next = |item: Bound<'_, PyAny>| value(&item, name, depth + 1);
    if let Ok(list) = object.cast::<PyList>() {
        return list.iter().map(next).collect::<PyResult<_>>().map(Value::List);
    }
    if let Ok(tuple) = object.cast::<PyTuple>() {
        return tuple.iter().map(next).collect::<PyResult<_>>().map(Value::List);
    }
    Err(invalid(format!(
        "{name} is {}: a namespace takes None, bool, int, float, str, bytes and lists of those, so that its digest is certain",
        kind_of(object)
    )))
}

/// A `Namespace`, its 32-byte digest, or `b""` for the empty one.
pub(crate) fn namespace(object: &Bound<'_, PyAny>) -> PyResult<Namespace> {
    if let Ok(namespace) = object.cast::<PyNamespace>() {
        return Ok(namespace.get().0);
    }
    let bytes = object.cast::<PyBytes>().map_err(|_| {
        invalid(format!("namespace is {}: pass a kvortex.Namespace or its 32-byte digest", kind_of(object)))
    })?;
    match bytes.as_bytes() {
        [] => Ok(Namespace::default()),
        bytes => bytes.try_into().map(Namespace::from_digest).map_err(|_| {
            invalid(format!("namespace has {} bytes: pass a kvortex.Namespace or its 32-byte digest", bytes.len()))
        }),
    }
}

/// Names the blocks of one prompt as its tokens arrive: `KeyChain(namespace, block_tokens=16, extra=b"")`.
///
/// Each key is a SHA-256 over the key before it and the block's tokens, so equal blocks at different places differ. `extra` is
/// what the whole request adds to its identity: the digest of a LoRA, a tenant's salt.
#[pyclass(name = "KeyChain", frozen, module = "kvortex")]
pub(crate) struct PyKeyChain(Mutex<KeyChain>);

#[pymethods]
impl PyKeyChain {
    #[new]
    #[pyo3(signature = (namespace, block_tokens=None, extra=None), text_signature = "(namespace, block_tokens=16, extra=b'')")]
    fn new(
        namespace: &Bound<'_, PyAny>,
        block_tokens: Option<&Bound<'_, PyAny>>,
        extra: Option<&[u8]>,
    ) -> PyResult<Self> {
        entry(namespace.py(), || Ok(Self(Mutex::new(chain(namespace, block_tokens, extra)?))))
    }

    /// Adds token ids: a list, or an array of one dimension and any integer type. Returns the packed keys of the blocks that
    /// became full; `extra`, such as the digest of an image, is mixed into exactly those.
    ///
    /// InvalidArgumentError for an id out of range or more than 2**24 tokens; the chain is then unchanged.
    #[pyo3(signature = (tokens, extra=None), text_signature = "($self, tokens, extra=b'')")]
    fn extend<'py>(
        &self,
        py: Python<'py>,
        tokens: &Bound<'_, PyAny>,
        extra: Option<&[u8]>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        entry(py, || {
            let tokens = TOKENS.take(tokens)?;
            let keys = detached(py, || {
                let ids = tokens.read().map_err(Error::InvalidArgument)?;
                self.lock().extend(&ids, extra.unwrap_or_default()).map(<[u8]>::to_vec)
            })?;
            Ok(PyBytes::new(py, &keys))
        })
    }

    /// The packed keys of all full blocks.
    #[getter]
    fn keys<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.lock().keys())
    }

    /// Number of tokens added so far.
    #[getter]
    fn num_tokens(&self) -> usize {
        self.lock().num_tokens()
    }

    /// Tokens of one block.
    #[getter]
    fn block_tokens(&self) -> usize {
        self.lock().block_tokens()
    }

    /// Number of full blocks.
    fn __len__(&self) -> usize {
        self.lock().blocks()
    }

    /// A chain that goes on from here by itself.
    fn copy(&self) -> Self {
        Self(Mutex::new(self.lock().clone()))
    }

    fn __repr__(&self) -> String {
        let chain = self.lock();
        format!("<kvortex.KeyChain of {} blocks, {} tokens>", chain.blocks(), chain.num_tokens())
    }
}

impl PyKeyChain {
    /// Never held while waiting for the GIL.
    fn lock(&self) -> MutexGuard<'_, KeyChain> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn chain(
    namespace: &Bound<'_, PyAny>,
    block_tokens: Option<&Bound<'_, PyAny>>,
    extra: Option<&[u8]>,
) -> PyResult<KeyChain> {
    let block_tokens = block_tokens.map_or(Ok(16), |tokens| whole("block_tokens", tokens))?;
    KeyChain::new(&self::namespace(namespace)?, block_tokens, extra.unwrap_or_default()).map_err(raise)
}

/// The packed keys of all full blocks of a prompt; what `KeyChain(namespace, block_tokens, extra).extend(tokens)` returns.
#[pyfunction]
#[pyo3(
    signature = (namespace, tokens, block_tokens=None, extra=None),
    text_signature = "(namespace, tokens, block_tokens=16, extra=b'')"
)]
pub(crate) fn hash_tokens<'py>(
    py: Python<'py>,
    namespace: &Bound<'py, PyAny>,
    tokens: &Bound<'py, PyAny>,
    block_tokens: Option<&Bound<'py, PyAny>>,
    extra: Option<&[u8]>,
) -> PyResult<Bound<'py, PyBytes>> {
    entry(py, || {
        let mut chain = chain(namespace, block_tokens, extra)?;
        let tokens = TOKENS.take(tokens)?;
        let keys = detached(py, || {
            let ids = tokens.read().map_err(Error::InvalidArgument)?;
            chain.extend(&ids, b"").map(<[u8]>::to_vec)
        })?;
        Ok(PyBytes::new(py, &keys))
    })
}
