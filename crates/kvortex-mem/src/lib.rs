//! Bytes for KVortex: the slot arena, the host pool and the copies between engine pages and slots.
//!
//! This crate knows addresses and lengths, never blocks or keys. All `unsafe` code of the core lives here, so that the
//! crates above it can forbid it.
//!
//! * [`map::HostMemory`] is one touched, huge-page-advised mapping, of this process or of several.
//! * [`arena::Arena`] cuts it into equal slots; [`slots::SlotClaim`] is the exclusive right to one of them.
//! * [`pool::PinnedHostPool`] cuts it into pieces of any size instead.
//! * [`device_pool::GpuAsyncPool`] gives out memory of a GPU in the order of its streams.
//! * [`span::Pages`] describes the scattered memory of an engine without listing its fragments.
//! * [`copy::CopyEngine`] moves bytes between the two.
//! * `file` moves them between slots and a file.
//! * [`board::LaneBoard`] tells which copies have ended, also to other processes ([`shared::SharedWords`]).
//!
//! ```
//! use std::sync::Arc;
//!
//! use kvortex_mem::arena::Arena;
//! use kvortex_mem::copy::{CopyEngine, Direction, HostCopy, Step, Transfer};
//! use kvortex_mem::map::{HostMemory, MapOptions};
//! use kvortex_mem::span::{Pages, Pattern, Region, Segment};
//!
//! # fn main() -> Result<(), kvortex_mem::MemError> {
//! // 1. Memory, cut into slots of 4 KiB.
//! let options = MapOptions { bytes: 1 << 20, huge_pages: true, numa_node: None, touch_threads: 2 };
//! let arena = Arc::new(Arena::cut(HostMemory::map(&options)?, 4096)?);
//!
//! // 2. An array of 16 pages: each has 2 rows of 2 KiB, which lie 32 KiB apart.
//! let region = Region::from_vec((0..16 * 4096).map(|at| (at / 2048) as u8).collect());
//! let pattern = Arc::new(Pattern::strided(2048, &[2], &[16 * 2048])?);
//! let pages = || {
//!     let (region, pattern) = (region.clone(), Arc::clone(&pattern));
//!     Pages::new(vec![Segment::Table { region, pattern, first: 0, stride: 2048, count: 16 }])
//! };
//!
//! // 3. Store page 3, overwrite the array, load the page again.
//! let engine = HostCopy::new(2);
//! let claim = arena.slots().claim().expect("a new arena has free slots");
//! let step = Step { slot: claim.id(), page: 3 };
//! engine.run(Transfer::new(Direction::Store, Arc::clone(&arena), vec![step], pages()?)?)?;
//! region.write(0, &[0xFF; 16 * 4096])?;
//! engine.run(Transfer::new(Direction::Load, Arc::clone(&arena), vec![step], pages()?)?)?;
//!
//! let bytes = region.to_vec();
//! assert_eq!((bytes[3 * 2048], bytes[(16 + 3) * 2048]), (3, 19));
//! assert_eq!(bytes[4 * 2048], 0xFF);
//! # Ok(())
//! # }
//! ```

pub mod arena;
pub mod board;
pub mod copy;
#[cfg(not(shuttle))]
pub mod cuda;
pub mod device;
pub mod device_pool;
#[cfg(all(any(test, feature = "suite"), not(shuttle)))]
pub mod device_suite;
pub mod error;
#[cfg(not(shuttle))]
pub mod file;
pub mod map;
pub mod marks;
pub mod numa;
pub mod pin;
pub mod pool;
pub mod shared;
#[cfg(all(any(test, feature = "suite"), not(shuttle)))]
pub mod sim;
pub mod slots;
pub mod span;
pub mod sync;

pub use error::MemError;
