//! Bytes for KVortex: the slot arena, the host pool and the copies between engine pages and slots.
//!
//! This crate knows addresses and lengths, never blocks or keys. All `unsafe` code of the core lives here, so that the
//! crates above it can forbid it.
//!
//! * [`map::HostMemory`] is one touched, huge-page-advised mapping.
//! * [`arena::Arena`] cuts it into equal slots; [`slots::SlotClaim`] is the exclusive right to one of them.
//! * [`pool::PinnedHostPool`] cuts it into pieces of any size instead.
//! * [`span::Pages`] describes the scattered memory of an engine without listing its fragments.
//! * [`copy::CopyEngine`] moves bytes between the two.

pub mod arena;
pub mod copy;
pub mod error;
pub mod map;
pub mod numa;
pub mod pool;
pub mod slots;
pub mod span;
pub mod sync;

pub use error::MemError;
