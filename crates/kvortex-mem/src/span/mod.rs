//! The scattered side of a transfer: memory that somebody else owns, described without listing its fragments.
//!
//! A [`Region`] is one range of addresses and what keeps it alive. A [`Pattern`] is the fragments of one piece of a page,
//! relative to the piece's base. [`Pages`] puts them together: many pages of equal size, each made of one piece per segment.

mod ids;
mod overlap;
mod pages;
mod parts;
mod pattern;
mod region;
#[cfg(test)]
mod tests;

pub use ids::Ids;
pub use pages::{Pages, Piece, Segment};
pub use parts::Parts;
pub use pattern::{Pattern, Run};
pub(crate) use region::reached_by_cpu;
pub use region::{Place, Region};
