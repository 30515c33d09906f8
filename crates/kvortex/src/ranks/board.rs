//! What ranks tell the planner, in words that their processes share.

use std::path::{Path, PathBuf};

use kvortex_mem::arena::Arena;
use kvortex_mem::board::{LANE_WORDS, LaneBoard};
use kvortex_mem::copy::gpu::Lane;
use kvortex_mem::map::SharedPlace;
use kvortex_mem::shared::SharedWords;
use sha2::{Digest, Sha256};
use std::sync::atomic::{AtomicU64, Ordering};

use super::rows::Rows;
use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::sync::Arc;

/// Differs between versions that would not understand each other.
const MAGIC: u64 = 0x4B56_5445_5800_0003;

const PLANNER: usize = 1;
const ATTACHED: usize = 2;
/// Whether it is known where the row of all ranks is, and where.
const ROW_KNOWN: usize = 3;
const ROW: usize = 4;
const HEADER: usize = ROW + SharedPlace::WORDS;

/// Words of a rank before its lanes: its process, what it has, how its KV lies, whether that is written, and where its row is.
const RANK_HEAD: usize = RANK_ROW + SharedPlace::WORDS;
const SEAT: usize = 1;
const SEEN: usize = SEAT + SEAT_WORDS;
const PUBLISHED: usize = SEEN + DIGEST_WORDS;
const RANK_ROW: usize = PUBLISHED + 1;
const DIGEST_WORDS: usize = 4;

const SEAT_WORDS: usize = 7;

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
    /// Where the slots lie.
    pub rows: Rows,
}

impl Seat {
    /// As many slots of `block_bytes` as `arena_bytes` hold, in rows of the ranks' own.
    ///
    /// # Errors
    /// [`Error::Config`] when not even one fits.
    pub fn fit(arena_bytes: usize, block_bytes: usize, namespace: Namespace) -> Result<Self> {
        let slots = Arena::fit(arena_bytes, block_bytes).map_err(|error| Error::Config {
            knob: "cpu_pool_size_bytes",
            value: format!("{arena_bytes} for each rank"),
            remedy: error.to_string(),
        })?;
        Ok(Self { block_bytes, slots, namespace, rows: Rows::Private })
    }

    /// The same with other rows.
    #[must_use]
    pub const fn with_rows(self, rows: Rows) -> Self {
        Self { rows, ..self }
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
        let own = u64::from(std::process::id());
        let taken = self.chair(rank)?.compare_exchange(0, own, Ordering::AcqRel, Ordering::Acquire);
        taken.map_err(|other| occupied(rank, other))?;
        let attached = self.words.words()[ATTACHED].fetch_add(1, Ordering::AcqRel) + 1;
        if attached == self.ranks as u64 + 1 {
            self.words.close_door();
        }
        Ok(())
    }

    /// Refuses a rank that somebody has by now.
    pub(super) fn expect_free(&self, rank: usize) -> Result<()> {
        match self.chair(Some(rank))?.load(Ordering::Acquire) {
            0 => Ok(()),
            other => Err(occupied(Some(rank), other)),
        }
    }

    fn chair(&self, rank: Option<usize>) -> Result<&AtomicU64> {
        match rank {
            None => Ok(&self.words.words()[PLANNER]),
            Some(rank) if rank < self.ranks => Ok(self.rank_word(rank, 0)),
            Some(rank) => Err(refuse(rank, &format!("there are {} ranks, numbered from 0", self.ranks))),
        }
    }

    /// Lets `make` have the one row of all ranks: with where it is, or with `None` to make it, and the others wait. Returns
    /// what it returns, and remembers where that is.
    pub(super) fn one_row<T>(
        &self,
        make: impl FnOnce(Option<SharedPlace>) -> Result<(T, Option<SharedPlace>)>,
    ) -> Result<T> {
        self.words.alone(|| {
            let (row, made) = make(self.row(None))?;
            if let Some(place) = made {
                self.write_row(ROW, &place);
                self.words.words()[ROW_KNOWN].store(1, Ordering::Release);
            }
            Ok(row)
        })?
    }

    /// Where the row of a rank that has published, or of all, is.
    pub(super) fn row(&self, rank: Option<usize>) -> Option<SharedPlace> {
        let (known, at) = rank.map_or((ROW_KNOWN, ROW), |rank| (self.at(rank) + PUBLISHED, self.at(rank) + RANK_ROW));
        let words = self.words.words();
        let place = || std::array::from_fn(|index| words[at + index].load(Ordering::Relaxed));
        (words[known].load(Ordering::Acquire) == 1).then(|| SharedPlace::from_words(place()))
    }

    fn write_row(&self, at: usize, place: &SharedPlace) {
        for (word, value) in self.words.words()[at..].iter().zip(place.words()) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Tells how the KV of `rank` was seen to lie: a digest of all that decides which bytes a block is. Before its mover is made.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no such rank, [`Error::InvalidArgument`] when somebody has its place.
    pub fn describe(&self, rank: usize, seen: &[u8; 32]) -> Result<()> {
        self.expect_free(rank)?;
        for (at, word) in (SEEN..).zip(digest_words(seen)) {
            self.rank_word(rank, at).store(word, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What [`describe`](Self::describe) was told of a rank that has published; zeros if nothing.
    pub(super) fn seen(&self, rank: usize) -> [u8; 32] {
        let mut seen = [0; 32];
        for (at, bytes) in (SEEN..).zip(seen.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&self.rank_word(rank, at).load(Ordering::Relaxed).to_le_bytes());
        }
        seen
    }

    /// Tells the planner what `rank` has, and where its own row is if the planner may reach it.
    pub(super) fn publish(&self, rank: usize, seat: &Seat, row: Option<SharedPlace>) {
        for (at, value) in (SEAT..).zip(words_of(seat)) {
            self.rank_word(rank, at).store(value, Ordering::Relaxed);
        }
        if let Some(place) = row {
            self.write_row(self.at(rank) + RANK_ROW, &place);
        }
        self.rank_word(rank, PUBLISHED).store(1, Ordering::Release);
    }

    /// Whether every rank has published exactly `seat`; false while one has not.
    pub(super) fn agrees(&self, seat: &Seat) -> Result<bool> {
        for rank in 0..self.ranks {
            if self.rank_word(rank, PUBLISHED).load(Ordering::Acquire) == 0 {
                return Ok(false);
            }
            let found: [u64; SEAT_WORDS] =
                std::array::from_fn(|at| self.rank_word(rank, SEAT + at).load(Ordering::Relaxed));
            let wanted = words_of(seat);
            if found != wanted {
                return Err(Error::invalid(format!(
                    "rank {rank} has {} slots of {} bytes, the planner {} of {}, or their namespaces or rows differ: \
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

fn words_of(seat: &Seat) -> [u64; SEAT_WORDS] {
    let [a, b, c, d] = digest_words(seat.namespace.digest());
    [seat.block_bytes as u64, seat.slots.into(), a, b, c, d, seat.rows as u64]
}

fn digest_words(digest: &[u8; 32]) -> [u64; DIGEST_WORDS] {
    let (words, _) = digest.as_chunks::<8>();
    std::array::from_fn(|at| u64::from_le_bytes(words[at]))
}

fn occupied(rank: Option<usize>, process: u64) -> Error {
    let who = rank.map_or_else(|| "the planner".to_owned(), |rank| format!("rank {rank}"));
    Error::invalid(format!(
        "process {process} is {who} of this engine already: give each engine an engine_id of its own"
    ))
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
