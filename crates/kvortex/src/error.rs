//! What can go wrong, each with the value and the remedy. A miss is not here: it is an answer.

use kvortex_mem::error::MemError;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A fault, as a full sentence.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A knob has a value that cannot work.
    #[error("{knob} cannot be {value}: {remedy}")]
    Config {
        /// The knob's name.
        knob: &'static str,
        /// Its value.
        value: String,
        /// What to set instead.
        remedy: String,
    },
    /// Blocks of another size than the engine's.
    #[error("the engine's blocks have {expected} bytes, not {found}: use one engine per layout")]
    Layout {
        /// Bytes of one block of this engine.
        expected: usize,
        /// Bytes that the caller has.
        found: usize,
    },
    /// Blocks of another namespace than the engine's.
    #[error("the engine holds blocks of namespace {expected}, not {found}: use one engine per model and layout")]
    Namespace {
        /// Namespace of this engine.
        expected: String,
        /// Namespace that the caller has.
        found: String,
    },
    /// An argument that cannot work; nothing was changed.
    #[error("{0}")]
    InvalidArgument(String),
    /// The engine was shut down.
    #[error("the engine is shut down: create a new one")]
    Closed,
    /// The engine belongs to the parent of this process.
    #[error(
        "the engine was created by process {owner} and cannot be used in its child {child}: create one after the fork"
    )]
    Forked {
        /// The process that created the engine.
        owner: u32,
        /// This process.
        child: u32,
    },
    /// A ticket was not done in time; it stays valid.
    #[error("ticket {ticket} is not done after {waited_ms} ms: wait again, it goes on")]
    Timeout {
        /// The ticket.
        ticket: u64,
        /// How long the caller waited, in milliseconds.
        waited_ms: u128,
    },
    /// A copy failed: nothing of it is visible.
    #[error("a {kind} of {blocks} blocks failed and nothing of it is visible: {cause}")]
    Transfer {
        /// `save` or `load`.
        kind: &'static str,
        /// Blocks of the plan.
        blocks: usize,
        /// What the copy engine said.
        cause: std::sync::Arc<MemError>,
    },
    /// Memory: mapping, pools, pages.
    #[error(transparent)]
    Mem(std::sync::Arc<MemError>),
}

/// The kinds of [`Error`], for callers that map them to something of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Configuration.
    Config,
    /// Size or namespace of blocks.
    Layout,
    /// An argument.
    InvalidArgument,
    /// Shut down.
    Closed,
    /// Used in a forked child.
    Forked,
    /// Not done in time.
    Timeout,
    /// A failed copy.
    Transfer,
    /// Memory.
    Mem,
}

impl Error {
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::InvalidArgument(message.into())
    }

    /// Which kind of fault this is.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Config { .. } => ErrorKind::Config,
            Self::Layout { .. } | Self::Namespace { .. } => ErrorKind::Layout,
            Self::InvalidArgument(_) => ErrorKind::InvalidArgument,
            Self::Closed => ErrorKind::Closed,
            Self::Forked { .. } => ErrorKind::Forked,
            Self::Timeout { .. } => ErrorKind::Timeout,
            Self::Transfer { .. } => ErrorKind::Transfer,
            Self::Mem(_) => ErrorKind::Mem,
        }
    }
}

impl From<MemError> for Error {
    fn from(error: MemError) -> Self {
        Self::Mem(std::sync::Arc::new(error))
    }
}
