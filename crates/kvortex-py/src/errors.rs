//! The exception tree, and the one place where a fault of the core becomes an exception.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use kvortex::Error;
use kvortex_mem::MemError;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

use crate::logs;

macro_rules! exceptions {
    ($($name:ident < $base:ty: $doc:literal;)*) => {
        $(pyo3::create_exception!(kvortex, $name, $base, $doc);)*
    };
}

exceptions! {
    KVortexError < PyException: "Base of every error of KVortex. A miss is not an error: it is an answer.";
    ConfigError < KVortexError: "A setting is unknown or has a value that cannot work.";
    LayoutError < KVortexError: "Blocks of another size or namespace than the engine holds.";
    InvalidArgumentError < KVortexError: "An argument cannot work; nothing was changed.";
    CapacityError < KVortexError: "Memory is too small, or cannot be had.";
    ClosedError < KVortexError: "The engine or pool was shut down.";
    ForkedProcessError < KVortexError: "The engine belongs to the parent of this process; create one after the fork.";
    KVortexTimeoutError < KVortexError: "A ticket was not done in time; it stays valid and the copy goes on.";
    UnsupportedError < KVortexError: "Something that KVortex does not do, such as memory where it does not reach.";
    CudaError < KVortexError: "A call of the GPU's driver failed, or the GPU is lost to this process.";
    CudaUnavailableError < KVortexError: "There is no GPU or driver that can be used.";
    TransferError < KVortexError: "A copy failed; nothing of it is visible.";
    PoolError < KVortexError: "Base of the errors of PinnedHostPool and GpuAsyncPool.";
    PoolExhaustedError < PoolError: "The pool, or the GPU it takes from, has not that much free memory in one piece.";
    ForeignPointerError < PoolError: "An address that the pool did not give out.";
    DoubleFreeError < PoolError: "An address that was given back already.";
}

/// An `InvalidArgumentError` with this message.
pub(crate) fn invalid(message: impl Into<String>) -> PyErr {
    InvalidArgumentError::new_err(message.into())
}

/// The exception of a fault of the core.
pub(crate) fn raise(error: Error) -> PyErr {
    let message = error.to_string();
    match &error {
        Error::Config { .. } => ConfigError::new_err(message),
        Error::Layout { .. } | Error::Namespace { .. } => LayoutError::new_err(message),
        Error::InvalidArgument(_) => InvalidArgumentError::new_err(message),
        Error::Closed => ClosedError::new_err(message),
        Error::Forked { .. } => ForkedProcessError::new_err(message),
        Error::Timeout { .. } => KVortexTimeoutError::new_err(message),
        Error::Transfer { cause, .. } if matches!(**cause, MemError::DeviceLost { .. }) => CudaError::new_err(message),
        Error::Transfer { .. } => TransferError::new_err(message),
        Error::Mem(cause) => raise_mem(cause),
        _ => KVortexError::new_err(message),
    }
}

/// The exception of a fault of memory.
pub(crate) fn raise_mem(error: &MemError) -> PyErr {
    let message = error.to_string();
    match error {
        MemError::Map { .. } | MemError::TooLarge { .. } | MemError::TooSmall { .. } => CapacityError::new_err(message),
        MemError::OutOfDeviceMemory { .. } | MemError::CannotShare { .. } => CapacityError::new_err(message),
        MemError::NoDevice { .. } => CudaUnavailableError::new_err(message),
        MemError::Device { .. } | MemError::DeviceLost { .. } => CudaError::new_err(message),
        MemError::WrongPlace { .. } => UnsupportedError::new_err(message),
        MemError::NoSuchNode { .. } | MemError::TooManySlots { .. } | MemError::OtherLength { .. } => {
            ConfigError::new_err(message)
        }
        MemError::OutOfMemory { .. } => PoolExhaustedError::new_err(message),
        MemError::ForeignPointer { .. } => ForeignPointerError::new_err(message),
        MemError::DoubleFree { .. } => DoubleFreeError::new_err(message),
        MemError::CopyFailed(_) => TransferError::new_err(message),
        MemError::Stopped => ClosedError::new_err(message),
        MemError::Forked { .. } => ForkedProcessError::new_err(message),
        MemError::ZeroBytes { .. }
        | MemError::BadAlignment { .. }
        | MemError::Bounds { .. }
        | MemError::TooComplex { .. }
        | MemError::PagesMismatch { .. }
        | MemError::OutOfRange { .. }
        | MemError::WrittenTwice { .. }
        | MemError::ReadOnly
        | MemError::Overlap { .. }
        | MemError::TargetInArena => InvalidArgumentError::new_err(message),
        _ => KVortexError::new_err(message),
    }
}

/// Runs the body of an entry point. A panic becomes a `KVortexError`: pyo3's own exception for it is no `Exception`, so it
/// would escape every `except Exception` of a serving engine. Log records that the call left behind are handed over.
pub(crate) fn entry<T>(py: Python<'_>, body: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(panicked(&*panic)));
    logs::drain(py);
    outcome
}

/// Runs `work` without the GIL.
pub(crate) fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T, Error> + Send) -> PyResult<T> {
    py.detach(work).map_err(raise)
}

fn panicked(panic: &(dyn Any + Send)) -> PyErr {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    KVortexError::new_err(format!("internal error: {text}; please report it with kvortex.build_info()"))
}
