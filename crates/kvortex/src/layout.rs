//! How many bytes a block has.

use crate::error::{Error, Result};

/// The shape of one block as this crate needs to know it: a number of bytes. All blocks of an engine have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    block_bytes: usize,
}

impl Layout {
    /// Blocks of `block_bytes` bytes, all layers together.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when that is 0.
    pub fn new(block_bytes: usize) -> Result<Self> {
        if block_bytes == 0 {
            return Err(Error::invalid("a block must have at least 1 byte, not 0: give blocks that are not empty"));
        }
        Ok(Self { block_bytes })
    }

    /// Bytes of one block.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Refuses blocks of another size.
    pub(crate) fn check(&self, found: usize) -> Result<()> {
        if found == self.block_bytes { Ok(()) } else { Err(Error::Layout { expected: self.block_bytes, found }) }
    }
}
