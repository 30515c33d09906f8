//! One tier out of one for each row: a block is there only where every row has it, and lands only when all of its parts have.

use std::time::{Duration, Instant};

use super::host::SlotId;
use super::{Landing, Offer, Put, Tier, TierStats, Want};
use crate::key::Keys;
use crate::mask::BlockMask;
use crate::sync::{Arc, AtomicU64, AtomicUsize, Mutex, Ordering};

/// The tiers of all rows. A slot is the same number in each of their arenas.
pub struct AllRows {
    rows: Vec<Box<dyn Tier>>,
    counts: Arc<Counts>,
}

/// Of whole blocks.
#[derive(Default)]
struct Counts {
    hits: AtomicU64,
    misses: AtomicU64,
}

/// A block whose parts are on their way. Landed or given up when the last part has ended.
struct Block {
    landing: Mutex<Option<Box<dyn Landing>>>,
    /// Parts that have not landed.
    missing: AtomicUsize,
    counts: Arc<Counts>,
}

/// One row's part of a block.
struct Part {
    slot: SlotId,
    block: Arc<Block>,
}

impl Landing for Part {
    fn slot(&self) -> SlotId {
        self.slot
    }

    fn land(self: Box<Self>) {
        self.block.missing.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let Some(landing) = self.landing.get_mut().take() else { return };
        let whole = *self.missing.get_mut() == 0;
        let count = if whole { &self.counts.hits } else { &self.counts.misses };
        count.fetch_add(1, Ordering::Relaxed);
        if whole {
            landing.land();
        }
    }
}

impl AllRows {
    /// The tiers in the order of rows.
    #[must_use]
    pub fn new(rows: Vec<Box<dyn Tier>>) -> Self {
        Self { rows, counts: Arc::default() }
    }

    /// As many parts of each block as there are rows.
    fn parts(&self, wants: Vec<Want>) -> Vec<Vec<Want>> {
        let mut rows: Vec<Vec<Want>> = self.rows.iter().map(|_| Vec::with_capacity(wants.len())).collect();
        for Want { key, landing } in wants {
            let slot = landing.slot();
            let (missing, counts) = (AtomicUsize::new(self.rows.len()), Arc::clone(&self.counts));
            let block = Arc::new(Block { landing: Mutex::new(Some(landing)), missing, counts });
            for row in &mut rows {
                row.push(Want { key, landing: Box::new(Part { slot, block: Arc::clone(&block) }) });
            }
        }
        rows
    }
}

/// Time that is left of a patience, for one row after the other.
fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now())
}

/// What became of a block of which one row says `one` and another `other`: the worse of the two.
fn worse(one: Put, other: Put) -> Put {
    [Put::Dropped, Put::Refused, Put::Queued].into_iter().find(|&put| one == put || other == put).unwrap_or(one)
}

impl Tier for AllRows {
    fn name(&self) -> &'static str {
        self.rows.first().map_or("none", |row| row.name())
    }

    fn contains(&self, keys: Keys<'_>, deadline: Instant) -> BlockMask {
        let masks: Vec<BlockMask> = self.rows.iter().map(|row| row.contains(keys, deadline)).collect();
        let mut all = BlockMask::new(keys.len());
        (0..keys.len()).filter(|&i| masks.iter().all(|mask| mask.get(i))).for_each(|i| all.set(i));
        all
    }

    fn put(&self, offers: Vec<Offer>) -> Vec<Put> {
        let of_row = |row: &dyn Tier| {
            let copy = |offer: &Offer| Offer { key: offer.key, slot: offer.slot, keep: Arc::clone(&offer.keep) };
            row.put(offers.iter().map(copy).collect())
        };
        let puts = self.rows.iter().map(|row| of_row(&**row));
        puts.reduce(|all, row| all.into_iter().zip(row).map(|(one, other)| worse(one, other)).collect())
            .unwrap_or_default()
    }

    fn get(&self, wants: Vec<Want>, deadline: Instant) {
        let parts = self.parts(wants);
        self.rows.iter().zip(parts).for_each(|(row, wants)| row.get(wants, deadline));
    }

    fn remove(&self, keys: Keys<'_>, deadline: Instant) -> usize {
        self.rows.iter().map(|row| row.remove(keys, deadline)).max().unwrap_or(0)
    }

    fn clear(&self) -> bool {
        self.rows.iter().filter(|row| !row.clear()).count() == 0
    }

    fn flush(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        self.rows.iter().filter(|row| !row.flush(left(end))).count() == 0
    }

    fn stop(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        self.rows.iter().filter(|row| !row.stop(left(end))).count() == 0
    }

    /// Bytes and faults of all rows together; of blocks, what the row that has the fewest has.
    fn stats(&self) -> TierStats {
        let rows: Vec<TierStats> = self.rows.iter().map(|row| row.stats()).collect();
        let mut stats = rows.iter().copied().reduce(both).unwrap_or_default();
        stats.hits = self.counts.hits.load(Ordering::Relaxed);
        stats.misses = self.counts.misses.load(Ordering::Relaxed);
        stats
    }
}

fn both(one: TierStats, other: TierStats) -> TierStats {
    TierStats {
        blocks: one.blocks.min(other.blocks),
        capacity_blocks: one.capacity_blocks.min(other.capacity_blocks),
        bytes: one.bytes + other.bytes,
        max_bytes: one.max_bytes + other.max_bytes,
        queued_bytes: one.queued_bytes + other.queued_bytes,
        hits: 0,
        misses: 0,
        written: one.written.min(other.written),
        bytes_written: one.bytes_written + other.bytes_written,
        bytes_read: one.bytes_read + other.bytes_read,
        refused: one.refused.max(other.refused),
        dropped: one.dropped.max(other.dropped),
        evictions: one.evictions.max(other.evictions),
        corrupt: one.corrupt + other.corrupt,
        errors: one.errors + other.errors,
        late: one.late.max(other.late),
        recovered: one.recovered.min(other.recovered),
        scanning: one.scanning || other.scanning,
        failing: one.failing || other.failing,
    }
}
