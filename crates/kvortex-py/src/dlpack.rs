//! Memory across the border: the arrays of others coming in, memory of ours going out, by DLPack or the buffer protocol.
//!
//! In: a capsule is read but not consumed, so it keeps its own destructor, which gives the memory back under the GIL. What
//! comes out is a [`Tensor`] whose [`Region`] holds the capsule (or a memoryview) until the last copy is done; dropped on a
//! thread without the GIL, pyo3 puts that reference aside until the next call from Python.
//!
//! Out: [`Lent`] memory, kept in place by a lease or an allocation. Its views hold the owner by a Rust count only, so a
//! consumer may drop them on any thread, with or without the GIL.
//!
//! All `unsafe` code of this crate is here. DLPack and the buffer protocol are trusted as any C extension is: a producer that
//! lies about its memory breaks the process with or without us. Sizes and strides are checked for arithmetic all the same.

use std::any::Any;
use std::ffi::{CStr, c_int, c_void};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};

use kvortex::LeasedBlocks;
use kvortex_mem::span::{self, Region};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyException, PyTypeError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyCapsule, PyCapsuleMethods, PyDict, PyMemoryView};

use crate::device_pool::DevicePiece;
use crate::errors::{UnsupportedError, entry, invalid};
use crate::keys::kind_of;
use crate::pool::Piece;
use crate::raw::RawTensor;

const CPU: i32 = 1;
const CUDA: i32 = 2;
const CUDA_HOST: i32 = 3;

const LEGACY: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const MAJOR: u32 = 1;
const FLAG_READ_ONLY: u64 = 1;
const FLAG_COPIED: u64 = 2;

const CODE_INT: u8 = 0;
const CODE_UINT: u8 = 1;
const CODE_HANDLE: u8 = 3;

/// More dimensions than any array library makes.
const MAX_DIMS: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct DlDevice {
    kind: i32,
    id: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DlType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    ndim: i32,
    dtype: DlType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// What a `dltensor` capsule points to begins with its tensor; the rest is the producer's.
#[repr(C)]
struct DlLegacy {
    tensor: DlTensor,
}

#[repr(C)]
struct DlVersioned {
    major: u32,
    minor: u32,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DlVersioned)>,
    flags: u64,
    tensor: DlTensor,
}

/// What the items of an array are, as far as anybody here asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Items {
    Signed,
    Unsigned,
    Other,
}

/// An array of somebody else's: items of `itemsize` bytes at `origin + sum(index * strides)` of a region, all in bytes. Every
/// item lies in the region.
pub(crate) struct Tensor {
    pub(crate) region: Region,
    pub(crate) origin: isize,
    pub(crate) itemsize: usize,
    pub(crate) shape: Vec<usize>,
    pub(crate) strides: Vec<isize>,
    pub(crate) kind: Items,
    pub(crate) access: Access,
}

/// What a producer says about writing into its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Writable,
    ReadOnly,
    /// A capsule from before DLPack 1.0 cannot say it. Arrays of JAX come so, and must never change.
    Unsaid,
}

/// What a producer said, before it is believed.
struct Claim {
    data: *mut u8,
    itemsize: usize,
    shape: Vec<usize>,
    strides: Vec<isize>,
    kind: Items,
    access: Access,
    place: span::Place,
}

/// Which argument of a call is meant, for messages.
#[derive(Clone, Copy)]
pub(crate) enum Name<'a> {
    Whole(&'a str),
    Item(&'a str, usize),
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(name) => f.write_str(name),
            Self::Item(name, i) => write!(f, "{name}[{i}]"),
        }
    }
}

/// The bytes that an array's items lie in, relative to its first item.
struct Extent {
    start: isize,
    len: usize,
}

impl Tensor {
    /// Takes an object with `__dlpack__`, else one with the buffer protocol, without copying. `name` says which argument it
    /// is, for messages.
    pub(crate) fn import(object: &Bound<'_, PyAny>, name: Name<'_>) -> PyResult<Self> {
        let py = object.py();
        if let Ok(raw) = object.cast::<RawTensor>() {
            return Self::from_raw(raw, name);
        }
        let mut refusal = None;
        if let Some(export) = object.getattr_opt(intern!(py, "__dlpack__"))? {
            match export_capsule(&export, check_device(object, name)?) {
                Ok(capsule) => return from_capsule(object, &capsule, name),
                Err(error) if error.is_instance_of::<PyException>(py) => refusal = Some(error),
                Err(error) => return Err(error),
            }
        }
        match PyMemoryView::from(object) {
            Ok(view) => from_view(&view, name),
            Err(_) => Err(refused(object, name, refusal)),
        }
    }

    fn from_raw(raw: &Bound<'_, RawTensor>, name: Name<'_>) -> PyResult<Self> {
        let this = raw.get();
        let strides = match &this.strides {
            Some(strides) => strides.iter().map(|stride| stride.checked_mul(this.itemsize as isize)).collect(),
            None => compact_strides(this.itemsize, &this.shape),
        };
        let strides = strides.ok_or_else(|| invalid(format!("{name} has strides beyond any address")))?;
        let access = if this.writable { Access::Writable } else { Access::ReadOnly };
        let (data, itemsize, shape, place) = (this.ptr as *mut u8, this.itemsize, this.shape.clone(), this.place);
        let claim = Claim { data, itemsize, shape, strides, kind: Items::Other, access, place };
        // SAFETY: who makes a `RawTensor` vouches for its memory while its owner lives, as who makes a capsule does; the object
        // holds the owner.
        unsafe { Self::believe(claim, raw.clone().into_any().unbind(), name) }
    }

    /// The items of an array of one dimension, in order; none unless they have `N` bytes and the CPU can read them.
    pub(crate) fn items<const N: usize>(&self) -> impl ExactSizeIterator<Item = [u8; N]> + '_ {
        let (count, stride) = match (self.shape.as_slice(), self.strides.as_slice()) {
            (&[count], &[stride]) if self.itemsize == N && self.region.place() == span::Place::Host => (count, stride),
            _ => (0, 0),
        };
        let first = (self.region.addr() as *const [u8; N]).wrapping_byte_offset(self.origin);
        (0..count).map(move |i| {
            // SAFETY: every item lies in the region, which is alive; bytes need no alignment.
            unsafe { ptr::read(first.wrapping_byte_offset(i as isize * stride)) }
        })
    }

    /// Believes `claim`: `keeper` keeps its memory in place.
    ///
    /// # Safety
    /// The items that the claim describes must be valid for reads, and for writes if it says so, while `keeper` lives.
    unsafe fn believe(claim: Claim, keeper: Py<PyAny>, name: Name<'_>) -> PyResult<Self> {
        let extent = extent(&claim).ok_or_else(|| {
            invalid(format!("{name} has shape {:?}, more bytes than an address can hold", claim.shape))
        })?;
        let base = match NonNull::new(claim.data.wrapping_offset(extent.start)) {
            _ if extent.len == 0 => NonNull::dangling(),
            Some(base) if !claim.data.is_null() => base,
            _ => return Err(invalid(format!("{name} has no memory (a null pointer): is it a meta tensor?"))),
        };
        // SAFETY: the extent covers exactly the items of the claim, which the caller vouches for; a `Py` may be dropped on any
        // thread.
        let region = unsafe { Region::from_raw(base, extent.len, claim.access == Access::Writable, Box::new(keeper)) };
        let region = region.at(claim.place);
        let Claim { itemsize, shape, strides, kind, access, .. } = claim;
        Ok(Self { region, origin: -extent.start, itemsize, shape, strides, kind, access })
    }
}

fn extent(claim: &Claim) -> Option<Extent> {
    if claim.itemsize == 0 || claim.shape.contains(&0) {
        return Some(Extent { start: 0, len: 0 });
    }
    let (mut start, mut end) = (0_isize, isize::try_from(claim.itemsize).ok()?);
    for (&count, &stride) in claim.shape.iter().zip(&claim.strides) {
        let reach = isize::try_from(count - 1).ok()?.checked_mul(stride)?;
        start = start.checked_add(reach.min(0))?;
        end = end.checked_add(reach.max(0))?;
    }
    Some(Extent { start, len: usize::try_from(end.checked_sub(start)?).ok()? })
}

/// Strides in bytes of an array whose last index varies fastest, without gaps.
fn compact_strides(itemsize: usize, shape: &[usize]) -> Option<Vec<isize>> {
    let mut next = isize::try_from(itemsize).ok()?;
    let mut strides = vec![0; shape.len()];
    for (stride, &count) in strides.iter_mut().zip(shape).rev() {
        *stride = next;
        next = next.checked_mul(isize::try_from(count.max(1)).ok()?)?;
    }
    Some(strides)
}

/// Where an object says that it is. Refuses devices that we do not know before anything is asked of them.
fn check_device(object: &Bound<'_, PyAny>, name: Name<'_>) -> PyResult<span::Place> {
    let py = object.py();
    // Tensors of torch say this a hundred times faster. The capsule has the last word anyway.
    if object.getattr_opt(intern!(py, "is_cpu"))?.is_some_and(|is_cpu| is_cpu.is(PyBool::new(py, true))) {
        return Ok(span::Place::Host);
    }
    let Some(device) = object.getattr_opt(intern!(py, "__dlpack_device__"))? else { return Ok(span::Place::Host) };
    let (kind, id): (i32, i32) = match device.call0().and_then(|device| device.extract()) {
        Ok(device) => device,
        Err(error) => return Err(refused(object, name, Some(error))),
    };
    place_of(DlDevice { kind, id }, name)
}

fn place_of(device: DlDevice, name: Name<'_>) -> PyResult<span::Place> {
    let kind = match device.kind {
        CPU | CUDA_HOST => return Ok(span::Place::Host),
        CUDA if device.id >= 0 => return Ok(span::Place::Device(device.id.unsigned_abs())),
        CUDA => "cuda",
        4 => "opencl",
        7 => "vulkan",
        8 => "metal",
        10 | 11 => "rocm",
        13 => "cuda managed",
        14 => "oneapi",
        _ => "DLPack type",
    };
    let number = if kind == "DLPack type" { device.kind } else { device.id };
    Err(UnsupportedError::new_err(format!(
        "{name} is on device {kind}:{number}, and KVortex copies host and CUDA memory only: pass it with .cpu()"
    )))
}

/// Calls `__dlpack__`, telling new producers that we read the versioned form. A device's producer is told to wait for nothing:
/// copies are put in order by the stream that goes with the call.
fn export_capsule<'py>(export: &Bound<'py, PyAny>, place: span::Place) -> PyResult<Bound<'py, PyCapsule>> {
    let py = export.py();
    let wishes = PyDict::new(py);
    if place != span::Place::Host {
        wishes.set_item(intern!(py, "stream"), -1)?;
    }
    let versioned = wishes.copy()?;
    versioned.set_item(intern!(py, "max_version"), (MAJOR, 0))?;
    let capsule = match export.call((), Some(&versioned)) {
        Err(error) if error.is_instance_of::<PyTypeError>(py) => export.call((), Some(&wishes))?,
        other => other?,
    };
    Ok(capsule.cast_into::<PyCapsule>()?)
}

fn refused(object: &Bound<'_, PyAny>, name: Name<'_>, refusal: Option<PyErr>) -> PyErr {
    let py = object.py();
    let Some(refusal) = refusal else {
        return invalid(format!(
            "{name} is {}, which has neither __dlpack__ nor the buffer protocol: pass a tensor, an array or bytes",
            kind_of(object)
        ));
    };
    let needs_grad = object.getattr("requires_grad").and_then(|flag| flag.is_truthy()).unwrap_or(false);
    let remedy = if needs_grad { "pass it with .detach()" } else { "view it as bytes first, as in .view(torch.uint8)" };
    let error = invalid(format!("{name} cannot be shared: {}; {remedy}", refusal.value(py)));
    error.set_cause(py, Some(refusal));
    error
}

fn from_capsule(object: &Bound<'_, PyAny>, capsule: &Bound<'_, PyCapsule>, name: Name<'_>) -> PyResult<Tensor> {
    let (tensor, access) = if let Ok(versioned) = capsule.pointer_checked(Some(VERSIONED)) {
        // SAFETY: the name says what the capsule holds; the version, which is read first, is there in every version.
        let major = unsafe { ptr::read(versioned.as_ptr().cast::<u32>()) };
        if major != MAJOR {
            return Err(UnsupportedError::new_err(format!(
                "{name} comes as DLPack {major}, and KVortex reads DLPack 1"
            )));
        }
        // SAFETY: DLPack 1 fixes the layout; the capsule is held by the caller, so its contents are there.
        let versioned = unsafe { versioned.cast::<DlVersioned>().as_ref() };
        let read_only = versioned.flags & FLAG_READ_ONLY != 0;
        (&versioned.tensor, if read_only { Access::ReadOnly } else { Access::Writable })
    } else {
        let legacy = capsule.pointer_checked(Some(LEGACY)).map_err(|_| {
            invalid(format!("{name} gave a capsule that is no fresh DLPack tensor: it was used before"))
        })?;
        // SAFETY: the name says what the capsule holds.
        (unsafe { &legacy.cast::<DlLegacy>().as_ref().tensor }, access_by_buffer(object))
    };
    let place = place_of(tensor.device, name)?;
    // SAFETY: as above: what DLPack says of shape and strides holds for this tensor.
    let claim = Claim { place, ..unsafe { read_claim(tensor, access, name) }? };
    // SAFETY: DLPack promises these items, writable unless flagged, until the deleter runs, which the capsule does at its end.
    unsafe { Tensor::believe(claim, capsule.clone().into_any().unbind(), name) }
}

/// What the buffer protocol says of an object whose capsule cannot.
fn access_by_buffer(object: &Bound<'_, PyAny>) -> Access {
    let Ok(view) = PyMemoryView::from(object) else { return Access::Unsaid };
    let readonly = view.getattr(intern!(object.py(), "readonly")).and_then(|readonly| readonly.is_truthy());
    if readonly.unwrap_or(true) { Access::ReadOnly } else { Access::Writable }
}

/// # Safety
/// `shape` and `strides` must be null or have `ndim` values.
unsafe fn read_claim(tensor: &DlTensor, access: Access, name: Name<'_>) -> PyResult<Claim> {
    let DlType { code, bits, lanes } = tensor.dtype;
    let bits = usize::from(bits) * usize::from(lanes);
    if code == CODE_HANDLE || bits == 0 || bits % 8 != 0 {
        return Err(UnsupportedError::new_err(format!(
            "{name} has items of {bits} bits (DLPack type {code}), and KVortex keeps whole bytes: view it as bytes first"
        )));
    }
    let bad = || invalid(format!("{name} has {} dimensions or a negative one: not an array", tensor.ndim));
    let ndim = usize::try_from(tensor.ndim).ok().filter(|&ndim| ndim <= MAX_DIMS).ok_or_else(bad)?;
    let itemsize = bits / 8;
    // SAFETY: the caller vouches for both.
    let (shape, strides) = unsafe { (read_i64s(tensor.shape, ndim), read_i64s(tensor.strides, ndim)) };
    let shape =
        shape.map_or(Some(Vec::new()), |shape| shape.iter().map(|&count| usize::try_from(count).ok()).collect());
    let shape: Vec<usize> = shape.filter(|shape: &Vec<usize>| shape.len() == ndim).ok_or_else(bad)?;
    let strides = match strides {
        Some(strides) => strides.iter().map(|&stride| scale(stride, itemsize)).collect(),
        None => compact_strides(itemsize, &shape),
    };
    let strides = strides.ok_or_else(|| invalid(format!("{name} has strides beyond any address")))?;
    let kind = match code {
        CODE_INT if lanes == 1 => Items::Signed,
        CODE_UINT if lanes == 1 => Items::Unsigned,
        _ => Items::Other,
    };
    let data = tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize);
    let data = if tensor.data.is_null() { ptr::null_mut() } else { data };
    Ok(Claim { data, itemsize, shape, strides, kind, access, place: span::Place::Host })
}

fn scale(stride: i64, itemsize: usize) -> Option<isize> {
    isize::try_from(stride).ok()?.checked_mul(isize::try_from(itemsize).ok()?)
}

/// # Safety
/// `values` must be null or have `count` values for as long as the result is used.
unsafe fn read_i64s<'a>(values: *const i64, count: usize) -> Option<&'a [i64]> {
    // SAFETY: the caller vouches for it.
    (!values.is_null()).then(|| unsafe { std::slice::from_raw_parts(values, count) })
}

fn from_view(view: &Bound<'_, PyMemoryView>, name: Name<'_>) -> PyResult<Tensor> {
    let py = view.py();
    let format: String = view.getattr(intern!(py, "format"))?.extract()?;
    if holds_pointers(format.as_bytes()) {
        return Err(UnsupportedError::new_err(format!(
            "{name} holds Python objects or pointers (format {format:?}): only plain data can be kept"
        )));
    }
    let scalar = view.getattr(intern!(py, "ndim"))?.extract::<usize>()? == 0;
    // A buffer without dimensions has no shape to read, so it is read as its bytes.
    let bytes = scalar.then(|| view.call_method1(intern!(py, "cast"), ("B",))).transpose();
    let bytes =
        bytes.map_err(|_| invalid(format!("{name} is a single item of format {format:?}: give it a dimension")))?;
    let buffer = PyUntypedBuffer::get(bytes.as_ref().unwrap_or(view))?;
    if buffer.suboffsets().is_some() {
        return Err(UnsupportedError::new_err(format!(
            "{name} is an array of pointers to rows: copy it to one array first"
        )));
    }
    let claim = Claim {
        data: buffer.buf_ptr().cast(),
        itemsize: if scalar { buffer.len_bytes() } else { buffer.item_size() },
        shape: if scalar { Vec::new() } else { buffer.shape().to_vec() },
        strides: if scalar { Vec::new() } else { buffer.strides().to_vec() },
        kind: items_of(format.as_bytes()),
        access: if buffer.readonly() { Access::ReadOnly } else { Access::Writable },
        place: span::Place::Host,
    };
    // SAFETY: the buffer protocol promises these items, writable unless it said read-only, while the export lasts; the
    // memoryview holds the export and nobody else can release it.
    unsafe { Tensor::believe(claim, view.clone().into_any().unbind(), name) }
}

/// Whether items of a `struct` format are pointers, in which bytes from elsewhere would be called or followed.
fn holds_pointers(format: &[u8]) -> bool {
    let mut in_name = false;
    let mut codes = format.iter().filter(|&&byte| {
        in_name ^= byte == b':';
        !in_name && byte != b':'
    });
    codes.any(|code| b"OP&Xz".contains(code))
}

fn items_of(format: &[u8]) -> Items {
    let code = match format {
        [code] => code,
        [b'@' | b'=' | b'<', code] if cfg!(target_endian = "little") => code,
        _ => return Items::Other,
    };
    match code {
        b'b' | b'h' | b'i' | b'l' | b'q' | b'n' => Items::Signed,
        b'B' | b'H' | b'I' | b'L' | b'Q' | b'N' => Items::Unsigned,
        _ => Items::Other,
    }
}

/// Memory of ours that others may look at while `owner` keeps it in place.
pub(crate) struct Lent {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    device: DlDevice,
    _owner: Box<dyn Any + Send + Sync>,
}

const HOST: DlDevice = DlDevice { kind: CPU, id: 0 };

// SAFETY: the owner is Send and Sync and keeps the bytes valid for every thread. `Lent` reads them only to copy them, which
// races with nobody while read-only, and with the user's own writes to a pinned buffer otherwise.
unsafe impl Send for Lent {}
// SAFETY: as above.
unsafe impl Sync for Lent {}

#[repr(align(64))]
#[derive(Clone)]
struct Line(#[expect(dead_code, reason = "only its place in memory is used")] [u8; 64]);

impl Lent {
    /// Block `i` of a lease, read-only: nobody writes a slot while a lease holds it. None if there is no such block.
    pub(crate) fn block(lease: &Arc<LeasedBlocks>, i: usize) -> Option<Self> {
        let base = lease.addr(i)?;
        Some(Self { base, len: lease.block_bytes(), writable: false, device: HOST, _owner: Box::new(lease.clone()) })
    }

    /// A piece of the pinned pool, writable: the pool gives its bytes to nobody else while the piece lives.
    pub(crate) fn piece(piece: Piece) -> Self {
        let base = NonNull::new(piece.addr() as *mut u8).expect("no mapping begins at address 0");
        Self { base, len: piece.bytes(), writable: true, device: HOST, _owner: Box::new(piece) }
    }

    /// A piece of a device pool, which only the device can follow: the pool gives it to nobody else while the piece lives.
    pub(crate) fn device(piece: Arc<DevicePiece>) -> Self {
        let base = NonNull::new(piece.addr() as *mut u8).expect("no device memory begins at address 0");
        let device = DlDevice { kind: CUDA, id: piece.ordinal() as i32 };
        Self { base, len: piece.bytes(), writable: true, device, _owner: Box::new(piece) }
    }

    /// Where the bytes begin.
    pub(crate) fn addr(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// Number of bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The same bytes in memory of their own, writable.
    fn copy(&self) -> Self {
        let mut lines = vec![Line([0; 64]); self.len.div_ceil(64)];
        // SAFETY: `lines` is new and has at least `len` bytes; the owner keeps the source valid.
        unsafe { ptr::copy_nonoverlapping(self.base.as_ptr(), lines.as_mut_ptr().cast(), self.len) };
        let base = NonNull::from(&mut lines[..]).cast();
        Self { base, len: self.len, writable: true, device: HOST, _owner: Box::new(lines) }
    }
}

/// Where lent memory is as long as it was not given back. Views hold a clone of it.
pub(crate) struct Place(Mutex<Option<Arc<Lent>>>);

impl Place {
    pub(crate) fn new(lent: Lent) -> Self {
        Self(Mutex::new(Some(Arc::new(lent))))
    }

    fn lent(&self) -> PyResult<Arc<Lent>> {
        let lent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lent.clone().ok_or_else(|| PyBufferError::new_err("the buffer was given back: allocate another one"))
    }

    /// Gives the memory back. Says whether it was still there.
    ///
    /// # Errors
    /// `InvalidArgumentError` while views of it exist, which would then show somebody else's bytes.
    pub(crate) fn give_back(&self) -> PyResult<bool> {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lent) = place.take() else { return Ok(false) };
        match Arc::try_unwrap(lent) {
            Ok(_) => Ok(true),
            Err(lent) => {
                let (addr, views) = (lent.addr(), Arc::strong_count(&lent) - 1);
                *place = Some(lent);
                Err(invalid(format!(
                    "the buffer at {addr:#x} still has {views} views (arrays, tensors or copies under way): drop them first"
                )))
            }
        }
    }
}

/// Memory of ours on the Python side: one dimension of unsigned bytes.
#[pyclass(frozen, subclass, module = "kvortex")]
pub(crate) struct HostView {
    place: Arc<Place>,
    /// Address of the first byte.
    #[pyo3(get)]
    address: usize,
    /// Number of bytes.
    #[pyo3(get)]
    nbytes: usize,
}

impl HostView {
    pub(crate) fn of(place: Arc<Place>) -> PyResult<Self> {
        let (address, nbytes) = place.lent().map(|lent| (lent.addr(), lent.len()))?;
        Ok(Self { place, address, nbytes })
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    pub(crate) const fn address(&self) -> usize {
        self.address
    }
}

#[pymethods]
impl HostView {
    /// A capsule of this memory, without a copy unless asked for one. Blocks are read-only and say so in the capsule, which
    /// needs a consumer of DLPack 1.0 or later.
    #[expect(clippy::too_many_arguments, reason = "the signature is DLPack's")]
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        entry(py, || {
            if stream.is_some() {
                return Err(PyBufferError::new_err("host memory has no stream: pass stream=None"));
            }
            if dl_device.is_some_and(|device| device != (CPU, 0)) {
                return Err(PyBufferError::new_err("this memory is on the host: pass dl_device=None or (1, 0)"));
            }
            if max_version.is_none_or(|(major, _)| major < MAJOR) {
                return Err(PyBufferError::new_err(
                    "only a capsule of DLPack 1 can say that memory is read-only: pass max_version=(1, 0), or use numpy.from_dlpack",
                ));
            }
            let lent = self.place.lent()?;
            match copy {
                Some(true) => capsule(py, Arc::new(py.detach(|| lent.copy())), FLAG_COPIED),
                _ => capsule(py, lent, 0),
            }
        })
    }

    /// Host memory: (1, 0).
    fn __dlpack_device__(&self) -> (i32, i32) {
        (CPU, 0)
    }

    fn __len__(&self) -> usize {
        self.nbytes
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let this = slf.get();
        Ok(format!("<kvortex.{} of {} bytes at {:#x}>", slf.get_type().name()?, this.nbytes, this.address))
    }

    /// # Safety
    /// Called by the interpreter with a view to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let lent = slf.get().place.lent()?;
        let len = isize::try_from(lent.len).unwrap_or(isize::MAX);
        // SAFETY: `view` is the interpreter's, and the bytes stay valid until `internal` is taken out again below. The call
        // takes a reference on `slf` and refuses to give out read-only memory as writable.
        let filled = unsafe {
            let base = lent.base.as_ptr().cast();
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), base, len, c_int::from(!lent.writable), flags)
        };
        if filled != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        // SAFETY: as above.
        unsafe { (*view).internal = Arc::into_raw(lent).cast_mut().cast() };
        Ok(())
    }

    /// # Safety
    /// Called by the interpreter once for each view that was filled.
    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: `internal` was set by `__getbuffer__` from an `Arc` of this type, and is taken back once.
        drop(unsafe { Arc::from_raw((*view).internal.cast_const().cast::<Lent>()) });
    }
}

/// A capsule's contents, with what it points to.
struct Exported {
    managed: DlVersioned,
    shape: i64,
    stride: i64,
    _lent: Arc<Lent>,
}

fn capsule(py: Python<'_>, lent: Arc<Lent>, flags: u64) -> PyResult<Bound<'_, PyCapsule>> {
    let exported = Box::into_raw(Box::new(exported(lent, flags)));
    // SAFETY: the box was just leaked, so the pointers into it stay valid until `delete` takes it back.
    let pointer = unsafe {
        (*exported).managed.tensor.shape = &raw const (*exported).shape;
        (*exported).managed.tensor.strides = &raw const (*exported).stride;
        (*exported).managed.manager = exported.cast();
        NonNull::new_unchecked(&raw mut (*exported).managed).cast::<c_void>()
    };
    // SAFETY: the pointer is valid until the deleter runs, and `delete_unused` may run on any thread.
    let capsule = unsafe { PyCapsule::new_with_pointer_and_destructor(py, pointer, VERSIONED, Some(delete_unused)) };
    if capsule.is_err() {
        // SAFETY: no capsule was made, so this is the only owner.
        unsafe { delete(pointer.cast().as_ptr()) };
    }
    capsule
}

/// What a consumer asks of a capsule.
pub(crate) struct Wishes {
    pub(crate) max_version: Option<(u32, u32)>,
    pub(crate) dl_device: Option<(i32, i32)>,
    pub(crate) copy: Option<bool>,
}

/// A capsule of device memory, if the consumer wishes nothing else.
pub(crate) fn device_capsule<'py>(py: Python<'py>, place: &Place, wishes: &Wishes) -> PyResult<Bound<'py, PyCapsule>> {
    let lent = place.lent()?;
    let own = (lent.device.kind, lent.device.id);
    if wishes.dl_device.is_some_and(|device| device != own) {
        return Err(PyBufferError::new_err(format!("this memory is on a GPU: pass dl_device=None or {own:?}")));
    }
    if wishes.copy == Some(true) {
        return Err(PyBufferError::new_err("GPU memory is not copied here: pass copy=None and clone the tensor"));
    }
    if wishes.max_version.is_none_or(|(major, _)| major < MAJOR) {
        return Err(PyBufferError::new_err("this is DLPack 1: pass max_version=(1, 0), or use torch.from_dlpack"));
    }
    capsule(py, lent, 0)
}

fn exported(lent: Arc<Lent>, flags: u64) -> Exported {
    let tensor = DlTensor {
        data: lent.base.as_ptr().cast(),
        device: lent.device,
        ndim: 1,
        dtype: DlType { code: CODE_UINT, bits: 8, lanes: 1 },
        shape: ptr::null(),
        strides: ptr::null(),
        byte_offset: 0,
    };
    let flags = if lent.writable { flags } else { flags | FLAG_READ_ONLY };
    let managed =
        DlVersioned { major: MAJOR, minor: 0, manager: ptr::null_mut(), deleter: Some(delete), flags, tensor };
    Exported { managed, shape: i64::try_from(lent.len).unwrap_or(i64::MAX), stride: 1, _lent: lent }
}

/// The deleter that consumers call, from any thread, with or without the GIL: it touches Rust only.
unsafe extern "C" fn delete(managed: *mut DlVersioned) {
    // SAFETY: consumers pass what `capsule` made, once; `manager` is the box it came from.
    let exported = unsafe { Box::from_raw((*managed).manager.cast::<Exported>()) };
    // A panic must not unwind into a consumer written in C.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(exported)));
}

/// The capsule's destructor: a consumer renames a capsule that it takes over, and then it is the consumer who deletes.
unsafe extern "C" fn delete_unused(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter calls this with the capsule that ends; both calls only look at it.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) != 0 {
            delete(ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()).cast());
        }
    }
}
