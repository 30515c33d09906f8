//! Numbers about an engine at one moment.

use crate::config::EngineConfig;
use crate::engine::Bound;
use crate::lower::{Lower, LowerStats};
use crate::metrics::{LaneStats, Metrics};
use crate::sync::Ordering;

/// Counters since the engine was created, and sizes now. Sizes are 0 while the engine is not bound, and after its end.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Blocks that a lookup finds.
    pub blocks: usize,
    /// Blocks that fit.
    pub capacity_blocks: usize,
    /// Bytes of one block.
    pub block_bytes: usize,
    /// Bytes of the blocks that have a slot, those being written or forgotten but leased included.
    pub bytes_used: usize,
    /// Bytes of the arena.
    pub pool_bytes: usize,
    /// Blocks found by loads.
    pub hits: u64,
    /// Blocks not found by loads and leases of prefixes.
    pub misses: u64,
    /// Blocks that a save found there already, or being written.
    pub duplicate_blocks: u64,
    /// Blocks evicted.
    pub evictions: u64,
    /// Blocks for which a save found no room.
    pub refused: u64,
    /// Saves and loads that failed.
    pub failed: u64,
    /// Saves and loads that are not over.
    pub in_flight: usize,
    /// Blocks that somebody holds a lease on.
    pub leased_blocks: usize,
    /// Of saves.
    pub save: LaneStats,
    /// Of loads.
    pub load: LaneStats,
    /// 1 - (largest run of free slots / free slots).
    pub pool_fragmentation: f64,
    /// Bytes of memory that the index holds.
    pub index_bytes: usize,
    /// Bytes of the arena in huge pages.
    pub huge_page_bytes: usize,
    /// Whether the arena is page-locked.
    pub pinned: bool,
    /// Copy threads.
    pub threads: usize,
    /// Share of slots in use above which allocations sweep.
    pub watermark: f64,
    /// Share of the watermark that a sweep gives back.
    pub ratio: f64,
    /// Of the tier below, if there is one.
    pub disk: Option<LowerStats>,
}

impl Stats {
    /// Hits by all blocks asked for; 0 when none was.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        let asked = self.hits + self.misses;
        if asked == 0 { 0.0 } else { self.hits as f64 / asked as f64 }
    }

    pub(crate) fn collect(config: &EngineConfig, metrics: &Metrics, bound: Option<&Bound>) -> Self {
        let count = |counter: &crate::sync::AtomicU64| counter.load(Ordering::Relaxed);
        let mut stats = Self {
            pool_bytes: config.pool_bytes,
            hits: count(&metrics.hits),
            misses: count(&metrics.misses),
            duplicate_blocks: count(&metrics.duplicates),
            evictions: count(&metrics.evictions),
            refused: count(&metrics.refused),
            failed: count(&metrics.failed),
            save: metrics.save(),
            load: metrics.load(),
            threads: config.threads,
            watermark: config.watermark,
            ratio: config.ratio,
            ..Self::default()
        };
        if let Some(bound) = bound {
            stats.fill(bound);
        }
        stats
    }

    fn fill(&mut self, bound: &Bound) {
        let (index, host) = (bound.planner.index_stats(), bound.mover.host().stats());
        self.blocks = index.ready;
        self.leased_blocks = index.leased;
        self.index_bytes = index.bytes;
        self.capacity_blocks = host.capacity;
        self.block_bytes = bound.layout.block_bytes();
        self.bytes_used = host.used * self.block_bytes;
        self.pool_fragmentation = host.fragmentation;
        self.huge_page_bytes = host.huge_page_bytes;
        self.pinned = host.pinned;
        self.in_flight = bound.planner.in_flight();
        self.disk = bound.lower.as_ref().map(Lower::stats);
    }
}
