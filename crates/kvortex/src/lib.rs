//! KVortex keeps the KV cache of prompts that a model has seen, and gives it back instead of having it computed again.
//!
//! This crate knows blocks, not Python and not CUDA; bytes are moved by `kvortex-mem`. Start at [`Engine`].
//!
//! ```
//! use kvortex::{Engine, EngineConfig, Keys, Namespace, KeyChain};
//! use kvortex_mem::span::{Pages, Region};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//!
//! let engine = Engine::create(EngineConfig::new(1 << 20))?;
//! let mut chain = KeyChain::new(&Namespace::default(), 16, b"")?;
//! let keys = chain.extend(&[7; 32], b"")?;
//!
//! let kv = Region::from_vec((0..8192).map(|i| i as u8).collect());
//! engine.save(Keys::packed(keys)?, Pages::contiguous(kv.clone(), 2)?)?;
//!
//! let back = Region::from_vec(vec![0; 8192]);
//! let report = engine.load(Keys::packed(keys)?, Pages::contiguous(back.clone(), 2)?)?;
//! assert_eq!(report.blocks, 2);
//! assert_eq!(back.to_vec(), kv.to_vec());
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

mod config;
mod copies;
mod engine;
mod error;
pub mod eviction;
mod flight;
mod fork;
pub mod index;
mod key;
pub mod layout;
mod lease;
mod lower;
mod mask;
mod metrics;
pub mod mover;
mod namespace;
pub mod plan;
pub mod planner;
#[cfg(not(shuttle))]
mod profile;
#[cfg(not(shuttle))]
pub mod ranks;
mod stats;
mod sync;
mod ticket;
pub mod tier;

pub use config::{DeviceChoice, EngineConfig, GpuConfig, MAX_THREADS, Method};
pub use copies::open as open_device;
pub use engine::{Engine, LeasedBlocks};
pub use error::{Error, ErrorKind, Result};
pub use key::{BlockKey, KEY_BYTES, KeyChain, Keys, MAX_BLOCK_TOKENS, MAX_TOKENS};
pub use lease::Lease;
pub use lower::{LowerStats, Promotion};
pub use mask::BlockMask;
pub use metrics::{LaneStats, Quantiles};
pub use namespace::{Namespace, NamespaceBuilder, Value};
pub use plan::{Kind, Report};
#[cfg(not(shuttle))]
pub use profile::link_profile;
pub use stats::Stats;
pub use ticket::Ticket;
#[cfg(not(shuttle))]
pub use tier::disk::{Admission, DiskConfig, Kept, inspect as inspect_disk, trim as trim_disk};
pub use tier::host::SlotId;
pub use tier::{Identity, TierStats};
