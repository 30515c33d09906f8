//! Locks that another thread held at the moment of a fork stay locked in the child for ever, so nothing here may be used
//! there: calls are refused, and drops leak.

use crate::error::{Error, Result};

/// The process that something belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner(u32);

impl Owner {
    pub(crate) fn this_process() -> Self {
        Self(std::process::id())
    }

    /// Whether this process is another one: a forked child.
    pub(crate) fn is_elsewhere(self) -> bool {
        std::process::id() != self.0
    }

    pub(crate) fn check(self) -> Result<()> {
        match std::process::id() {
            child if child != self.0 => Err(Error::Forked { owner: self.0, child }),
            _ => Ok(()),
        }
    }
}
