//! The stream that a caller's memory is in use by.

use kvortex_mem::device::RawStream;
use kvortex_mem::span::{Pages, Place};
use pyo3::intern;
use pyo3::prelude::*;

use crate::errors::invalid;
use crate::keys::kind_of;

/// `pages` in the order of `stream`: a handle, an object with `cuda_stream`, or None for torch's current one where there is one,
/// else the default stream. Host memory has no stream.
pub(crate) fn in_stream(pages: Pages, stream: Option<&Bound<'_, PyAny>>, py: Python<'_>) -> PyResult<Pages> {
    match (pages.place(), stream) {
        (Place::Host, stream) => no_stream(stream).map(|()| pages),
        (Place::Device(ordinal), stream) => stream_on(ordinal, stream, py).map(|stream| pages.in_stream(stream)),
    }
}

/// The stream that is meant for memory of `place`; host memory has none, and any will do.
pub(crate) fn stream_of(place: Place, stream: Option<&Bound<'_, PyAny>>, py: Python<'_>) -> PyResult<RawStream> {
    match place {
        Place::Host => no_stream(stream).map(|()| RawStream(0)),
        Place::Device(ordinal) => stream_on(ordinal, stream, py),
    }
}

/// The stream of GPU `ordinal` that is meant: `stream`, or torch's current one where there is one, else the default stream.
pub(crate) fn stream_on(ordinal: u32, stream: Option<&Bound<'_, PyAny>>, py: Python<'_>) -> PyResult<RawStream> {
    stream.map_or_else(|| current(py, ordinal), handle)
}

/// Refuses a stream for host memory, which would not be waited for.
pub(crate) fn no_stream(stream: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
    stream.map_or(Ok(()), |stream| {
        let shown = shown(stream);
        Err(invalid(format!("stream is {shown}, but the blocks are in host memory: pass stream=None")))
    })
}

fn handle(stream: &Bound<'_, PyAny>) -> PyResult<RawStream> {
    let attribute = stream.getattr_opt(intern!(stream.py(), "cuda_stream"))?;
    let number = attribute.as_ref().unwrap_or(stream).extract();
    number.map(RawStream).map_err(|_| {
        invalid(format!("stream is {}: pass the handle of a CUDA stream, or an object with cuda_stream", shown(stream)))
    })
}

fn shown(stream: &Bound<'_, PyAny>) -> String {
    stream.repr().map_or_else(|_| kind_of(stream), |text| text.to_string())
}

/// Torch's current stream, if torch is there and uses CUDA; importing it is not our business.
fn current(py: Python<'_>, ordinal: u32) -> PyResult<RawStream> {
    let modules = py.import("sys")?.getattr(intern!(py, "modules"))?;
    let torch = modules.call_method1(intern!(py, "get"), ("torch.cuda",))?;
    if torch.is_none() || !torch.call_method0(intern!(py, "is_initialized"))?.is_truthy()? {
        return Ok(RawStream(0));
    }
    handle(&torch.call_method1(intern!(py, "current_stream"), (ordinal,))?)
}
