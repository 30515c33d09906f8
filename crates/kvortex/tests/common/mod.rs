//! What the tests of the engine share. The bytes of every block follow from its key, so that a byte served under another
//! key is seen.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses some of it")]

use std::sync::Arc;

use kvortex::{Engine, EngineConfig, Keys};
use kvortex_mem::span::{Pages, Pattern, Region, Segment};

pub const BLOCK: usize = 5000;

pub type Key = [u8; 32];

pub fn key(i: usize) -> Key {
    let mut key = [0xAB; 32];
    key[..8].copy_from_slice(&(i as u64).to_le_bytes());
    key
}

pub fn keys(ids: impl IntoIterator<Item = usize>) -> Vec<Key> {
    ids.into_iter().map(key).collect()
}

/// The bytes that belong to a key, and to no other.
pub fn bytes_of(key: &Key, len: usize) -> Vec<u8> {
    let (words, _) = key.as_chunks::<8>();
    let mut state = words.iter().fold(0, |mixed: u64, word| (mixed ^ u64::from_le_bytes(*word)).rotate_left(17));
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bytes.extend_from_slice(&(mixed ^ (mixed >> 27)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// `count` pages of [`BLOCK`] bytes, one after the other.
pub fn pages(region: &Region, count: usize) -> Pages {
    let pattern = Arc::new(Pattern::contiguous(BLOCK));
    let segment = Segment::Table { region: region.clone(), pattern, first: 0, stride: BLOCK as isize, count };
    Pages::new(vec![segment]).unwrap()
}

pub fn filled(keys: &[Key]) -> Region {
    Region::from_vec(keys.iter().flat_map(|key| bytes_of(key, BLOCK)).collect())
}

pub fn poisoned(count: usize) -> Region {
    Region::from_vec(vec![0xEE; count * BLOCK])
}

pub fn engine(blocks: usize) -> Engine {
    Engine::create(config(blocks)).unwrap()
}

pub fn config(blocks: usize) -> EngineConfig {
    EngineConfig { threads: 2, ..EngineConfig::new(blocks * 8192) }
}

pub fn save(engine: &Engine, keys: &[Key]) -> kvortex::Report {
    engine.save(Keys::from_slices(keys), pages(&filled(keys), keys.len())).unwrap()
}

/// Loads `keys` into poisoned memory and checks every byte: of blocks that were loaded, and of those that were not.
pub fn load(engine: &Engine, keys: &[Key]) -> kvortex::Report {
    let target = poisoned(keys.len());
    let report = engine.load(Keys::from_slices(keys), pages(&target, keys.len())).unwrap();
    check(keys, &target, &report);
    report
}

pub fn check(keys: &[Key], target: &Region, report: &kvortex::Report) {
    for (i, (key, got)) in keys.iter().zip(target.to_vec().chunks(BLOCK)).enumerate() {
        let want = if report.mask.get(i) { bytes_of(key, BLOCK) } else { vec![0xEE; BLOCK] };
        assert!(got == want, "block {i} has bytes that are not its own");
    }
}
