//! One planner and the movers of several ranks, in one process or in several.
//!
//! The planner decides for all ranks; block `i` of the cache is slot `i` of every rank's row, or of the one row of all where
//! their bytes are the same ([`Rows`]). Its plans reach the movers
//! by whatever the caller has. What came of them comes back through a [`RankBoard`]: for each rank and lane a watermark in the
//! order of tickets and the tickets that failed. A plan that a rank never saw has failed there. A block is visible only once
//! every rank that stores has it. A tier below keeps the rows of all ranks: the planner's process reads and writes them there.

mod below;
mod board;
mod mover;
mod planner;
mod rows;
mod ticket;

pub use board::{RankBoard, Seat};
pub use kvortex_mem::copy::gpu::Lane;
pub use mover::RankMover;
pub use planner::{RankPlanner, Stored};
pub use rows::Rows;
pub use ticket::{Ended, RankTicket};
