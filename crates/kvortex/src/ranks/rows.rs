//! The memory behind the slots: of one rank, of one rank and the planner, or of all ranks.

use kvortex_mem::arena::Arena;
use kvortex_mem::device::Device;
use kvortex_mem::map::{HostMemory, MapOptions, SharedFile, SharedPlace};

use super::board::{RankBoard, Seat};
use crate::config::EngineConfig;
use crate::copies;
use crate::error::{Error, Result};
use crate::sync::Arc;

/// Where the slots of the ranks lie, and who reaches them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rows {
    /// Each rank has a row of its own that nobody else maps: the fastest to make.
    #[default]
    Private,
    /// Each rank has a row of its own that the planner can map as well.
    Open,
    /// There is one row: what the first rank stores all ranks load, since their bytes are the same.
    One,
}

impl Rows {
    /// Whether `rank` stores.
    pub(super) fn stores(self, rank: usize) -> bool {
        self != Self::One || rank == 0
    }
}

/// Maps the row of `rank`; the memory of the one of all ranks is made by whoever comes first.
pub(super) fn map(
    config: &EngineConfig,
    (board, rank): (&RankBoard, usize),
    rows: Rows,
    device: Option<&Arc<dyn Device>>,
) -> Result<HostMemory> {
    board.expect_free(rank)?;
    let options = copies::map_options(config, device);
    match rows {
        Rows::Private => Ok(HostMemory::map(&options)?),
        Rows::Open => Ok(HostMemory::share(&options)?),
        Rows::One => board.one_row(|place| match place {
            Some(place) => Ok((HostMemory::attach(&place.open()?, &options)?, None)),
            None => {
                let memory = HostMemory::share(&options)?;
                let place = memory.place();
                Ok((memory, place))
            }
        }),
    }
}

/// Rows that the planner has opened: they stay, whichever rank ends.
#[derive(Debug)]
pub(super) struct OpenRows(Vec<SharedFile>);

impl OpenRows {
    /// Opens what the ranks of `board` have published. All have attached by then, so that nothing needs a name any more.
    pub(super) fn of(board: &RankBoard, seat: &Seat) -> Result<Self> {
        let missing = || Error::invalid("a rank did not tell where its row is: all ranks need the same configuration");
        let ranks: Vec<Option<usize>> = match seat.rows {
            Rows::Private => Vec::new(),
            Rows::Open => (0..board.ranks()).map(Some).collect(),
            Rows::One => vec![None],
        };
        let places: Vec<SharedPlace> =
            ranks.into_iter().map(|rank| board.row(rank).ok_or_else(missing)).collect::<Result<_>>()?;
        let files = places.iter().map(SharedPlace::open).collect::<Result<_, _>>();
        places.iter().for_each(SharedPlace::close_door);
        Ok(Self(files?))
    }

    /// Maps them, in the order of ranks. Nothing is touched.
    pub(super) fn map(&self, seat: &Seat) -> Result<Vec<Arc<Arena>>> {
        let arena = |file: &SharedFile| {
            let options = MapOptions { bytes: file.len(), huge_pages: true, numa_node: None, touch_threads: 0 };
            Ok(Arc::new(Arena::cut(HostMemory::attach(file, &options)?, seat.block_bytes)?))
        };
        self.0.iter().map(arena).collect()
    }
}
