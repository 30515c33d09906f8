//! Levels that keep blocks.

pub mod host;
