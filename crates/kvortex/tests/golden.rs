//! Files that earlier versions wrote: what they keep is found, or the format has another number.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod folder;

use std::fs;
use std::path::PathBuf;

use folder::{Folder, IDENTITY};
use kvortex::tier::Tier;
use kvortex::tier::disk::{DiskConfig, DiskTier};
use kvortex::tier::suite::{PATIENCE, World};

const BLOCK: usize = 300;
const KEPT: usize = 3;

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/blocks-v1")
}

fn open(folder: &Folder, world: &World) -> DiskTier {
    DiskTier::open(DiskConfig::new([&folder.path], 72 << 10), &world.arena, IDENTITY).unwrap()
}

#[test]
fn a_file_of_version_1_is_read() {
    let (folder, world) = (Folder::new("golden"), World::new(8, BLOCK));
    fs::create_dir_all(folder.path.join("v1")).unwrap();
    fs::copy(golden(), folder.blocks_file()).unwrap();
    let tier = open(&folder, &world);
    assert!(tier.flush(PATIENCE));
    assert_eq!(tier.stats().recovered, KEPT);
    assert_eq!(world.get(&tier, &[0, 1, 2, 3], PATIENCE), [true, true, true, false]);
}

/// Writes the file anew, for a new version of the format; the old one stays beside it.
#[test]
#[ignore = "writes the file that the other test reads"]
fn write_the_golden_file() {
    let (folder, world) = (Folder::new("golden-new"), World::new(8, BLOCK));
    let tier = open(&folder, &world);
    world.keep(&tier, 0..KEPT);
    assert!(tier.stop(PATIENCE));
    drop(tier);
    fs::copy(folder.blocks_file(), golden()).unwrap();
}
