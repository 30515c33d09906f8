//! What ranks tell the planner, in words that their processes share.

use std::path::{Path, PathBuf};

use kvortex_mem::arena::Arena;
use kvortex_mem::board::{LANE_WORDS, LaneBoard};
use kvortex_mem::copy::gpu::Lane;
use kvortex_mem::shared::SharedWords;
use sha2::{Digest, Sha256};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::sync::Arc;

/// Differs between versions that would not understand each other.
const MAGIC: u64 = 0x4B56_5445_5800_0001;

const HEADER: usize = 4;
const ATTACHED: usize = 2;

/// Words of a rank before its lanes: its process, and what it published.
const RANK_HEAD: usize = 8;
const PUBLISHED: usize = 7;

const RANK: usize = RANK_HEAD + Lane::ALL.len() * LANE_WORDS;

/// What all ranks and the planner must agree on before anything is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Bytes of one block on one rank.
    pub block_bytes: usize,
    /// Slots of each rank's arena.
    pub slots: u32,
    /// Digest of what else makes KV incompatible.
    pub namespace: Namespace,
}

impl Seat {
    /// As many slots of `block_bytes` as `arena_bytes` hold.
    ///
    /// # Errors
    /// [`Error::Config`] when not even one fits.
    pub fn fit(arena_bytes: usize, block_bytes: usize, namespace: Namespace) -> Result<Self> {
        let slots = Arena::fit(arena_bytes, block_bytes).map_err(|error| Error::Config {
            knob: "cpu_pool_size_bytes",
            value: format!("{arena_bytes} for each rank"),
            remedy: error.to_string(),
        })?;
        Ok(Self { block_bytes, slots, namespace })
    }
}

/// The board of one engine's ranks. The planner and each rank join it once.
#[derive(Clone, Debug)]
pub struct RankBoard {
    words: Arc<SharedWords>,
    ranks: usize,
}

impl RankBoard {
    /// Joins the board of the engine named `engine_id`, which is made by whoever comes first.
    ///
    /// # Errors
    /// [`Error::Mem`] when the file cannot be had, [`Error::Config`] when somebody joined it with other ranks.
    pub fn join(engine_id: &str, ranks: usize) -> Result<Self> {
        Self::join_at(&folder().join(file_name(engine_id)), ranks)
    }

    fn join_at(path: &Path, ranks: usize) -> Result<Self> {
        let words = Arc::new(SharedWords::join(path, HEADER + ranks * RANK)?);
        let found = words.words()[0].compare_exchange(0, MAGIC, Ordering::AcqRel, Ordering::Acquire);
        if found.is_err_and(|found| found != MAGIC) {
            return Err(refuse(path.display(), "its processes run different versions of KVortex: install one"));
        }
        Ok(Self { words, ranks })
    }

    /// Number of ranks.
    #[must_use]
    pub const fn ranks(&self) -> usize {
        self.ranks
    }

    /// Takes the place of the planner, or of a rank, which must be free.
    pub(super) fn sit_down(&self, rank: Option<usize>) -> Result<()> {
        if let Some(rank) = rank.filter(|&rank| rank >= self.ranks) {
            return Err(refuse(rank, &format!("there are {} ranks, numbered from 0", self.ranks)));
        }
        let word = rank.map_or(&self.words.words()[1], |rank| self.rank_word(rank, 0));
        let own = u64::from(std::process::id());
        if let Err(other) = word.compare_exchange(0, own, Ordering::AcqRel, Ordering::Acquire) {
            let who = rank.map_or_else(|| "the planner".to_owned(), |rank| format!("rank {rank}"));
            return Err(Error::invalid(format!(
                "process {other} is {who} of this engine already: give each engine an engine_id of its own"
            )));
        }
        let attached = self.words.words()[ATTACHED].fetch_add(1, Ordering::AcqRel) + 1;
        if attached == self.ranks as u64 + 1 {
            self.words.close_door();
        }
        Ok(())
    }

    /// Tells the planner what `rank` has.
    pub(super) fn publish(&self, rank: usize, seat: &Seat) {
        for (at, value) in (1..).zip(words_of(seat)) {
            self.rank_word(rank, at).store(value, Ordering::Relaxed);
        }
        self.rank_word(rank, PUBLISHED).store(1, Ordering::Release);
    }

    /// Whether every rank has published exactly `seat`; false while one has not.
    pub(super) fn agrees(&self, seat: &Seat) -> Result<bool> {
        for rank in 0..self.ranks {
            if self.rank_word(rank, PUBLISHED).load(Ordering::Acquire) == 0 {
                return Ok(false);
            }
            let found = [1, 2, 3, 4, 5, 6].map(|at| self.rank_word(rank, at).load(Ordering::Relaxed));
            let wanted = words_of(seat);
            if found != wanted {
                return Err(Error::invalid(format!(
                    "rank {rank} has {} slots of {} bytes, the planner {} of {}, or their namespaces differ: \
                     all ranks need the same configuration",
                    found[1], found[0], wanted[1], wanted[0]
                )));
            }
        }
        Ok(true)
    }

    /// What has ended in a lane of `rank`.
    pub(super) fn lane(&self, rank: usize, lane: Lane) -> LaneBoard {
        LaneBoard::over(Arc::clone(&self.words), self.at(rank) + RANK_HEAD + lane as usize * LANE_WORDS)
    }

    fn at(&self, rank: usize) -> usize {
        HEADER + rank * RANK
    }

    fn rank_word(&self, rank: usize, at: usize) -> &AtomicU64 {
        &self.words.words()[self.at(rank) + at]
    }
}

fn words_of(seat: &Seat) -> [u64; 6] {
    let (digest, _) = seat.namespace.digest().as_chunks::<8>();
    let word = |at: usize| u64::from_le_bytes(digest[at]);
    [seat.block_bytes as u64, seat.slots.into(), word(0), word(1), word(2), word(3)]
}

fn refuse(value: impl std::fmt::Display, remedy: &str) -> Error {
    Error::Config { knob: "ranks", value: value.to_string(), remedy: remedy.to_owned() }
}

/// Where files are memory, else where temporary files go.
fn folder() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() }
}

/// No text of the user's in a name that others can see.
fn file_name(engine_id: &str) -> String {
    let digest = Sha256::digest(engine_id.as_bytes());
    let hex: String = digest.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    format!("kvortex-{hex}")
}
