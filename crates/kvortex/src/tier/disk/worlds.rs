//! A disk tier for each rank's row, in the same folders.

use std::fs;
use std::path::Path;

use kvortex_mem::arena::Arena;
use kvortex_mem::file::{SlabFile, SlabOptions};

use super::DiskConfig;
use crate::error::Result;

/// The start of the names of folders for one rank's row.
const RANK: &str = "rank-";

/// The folder of a row inside the user's; an only row needs none.
fn folder_of(row: u32, world: u32) -> Option<String> {
    (world > 1).then(|| format!("{RANK}{row}-of-{world}"))
}

/// What waits to be written holds its slots; one in so many is left for other blocks.
const SHARE: usize = 4;

impl DiskConfig {
    /// What is for one of `world` rows, whose slots `arena` has: a folder in each of these, and an equal part of the room.
    #[must_use]
    pub(crate) fn share_of(&self, row: u32, world: u32, arena: &Arena) -> Self {
        let inside = |slab: &SlabOptions| match folder_of(row, world) {
            Some(name) => slab.clone().inside(&name),
            None => slab.clone(),
        };
        let slots = arena.slots().total();
        let held = (slots - slots / SHARE) * arena.stride();
        Self {
            folders: self.folders.iter().map(inside).collect(),
            max_bytes: self.max_bytes / u64::from(world),
            queue_bytes: (self.queue_bytes / world as usize).min(held),
            ..self.clone()
        }
    }

    /// Empties what another number of rows has kept in these folders: nobody could use it, and it would count for nobody.
    ///
    /// # Errors
    /// [`Error::Mem`](crate::Error::Mem) when another engine uses it, or it cannot be emptied.
    pub(crate) fn clear_other_worlds(&self, world: u32) -> Result<()> {
        for slab in &self.folders {
            for other in others(slab, world) {
                let file = SlabFile::open(&other)?;
                let failed = |cause| kvortex_mem::MemError::Disk { path: other.folder.display().to_string(), cause };
                if file.size().map_err(failed)?.0 > 0 {
                    log::info!("{}: blocks of another number of ranks are dropped", other.folder.display());
                    file.cut(0).map_err(failed)?;
                }
            }
        }
        Ok(())
    }
}

/// Names of folders for ranks' rows in the user's.
pub(super) fn ranks_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| is_rank(name)).collect()
}

fn is_rank(name: &str) -> bool {
    let numbers = name.strip_prefix(RANK).and_then(|rest| rest.split_once("-of-"));
    numbers.is_some_and(|(row, world)| row.parse::<u32>().is_ok() && world.parse::<u32>().is_ok())
}

/// What has a file in this folder that none of `world` rows uses.
fn others(slab: &SlabOptions, world: u32) -> Vec<SlabOptions> {
    let own: Vec<_> = (0..world).filter_map(|row| folder_of(row, world)).collect();
    let ranks = ranks_in(&slab.folder).into_iter().filter(|name| !own.contains(name));
    let alone = (world > 1 && slab.folder.join("v1").exists()).then(|| slab.clone());
    alone.into_iter().chain(ranks.map(|name| slab.clone().inside(&name))).collect()
}
