//! Keys of one call, grouped by shard, so that each shard is locked once per call and not once per key.

use crate::key::{BlockKey, Keys};

/// log2 of the number of shards.
const SHARD_BITS: u32 = 6;

/// Number of shards of an index.
pub(super) const SHARDS: usize = 1 << SHARD_BITS;

/// The hash of a key inside the index. Keys are digests, but a caller's own keys may be anything, counters say: fold all
/// 32 bytes.
pub(super) fn hash(key: &BlockKey) -> u64 {
    let (words, _) = key.as_bytes().as_chunks::<8>();
    let word = |i: usize| u64::from_le_bytes(words[i]);
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        (product as u64) ^ (product >> 64) as u64
    };
    let low = fold(word(0) ^ 0x9E37_79B9_7F4A_7C15, word(1) ^ 0xC2B2_AE3D_27D4_EB4F);
    let high = fold(word(2) ^ 0x1656_67B1_9E37_79F9, word(3) ^ 0x85EB_CA77_C2B2_AE63);
    fold(low ^ 0xD6E8_FEB8_6659_FD93, high ^ 0xA076_1D64_78BD_642F)
}

/// The shard of a hash: its lowest bits. The table inside a shard takes its position from the bits above and its tag from
/// the highest.
pub(super) const fn shard_of(hash: u64) -> usize {
    hash as usize % SHARDS
}

/// The part of a hash that is left for the table of a shard.
pub(super) const fn table_hash(hash: u64) -> u64 {
    hash.rotate_right(SHARD_BITS)
}

/// One key of a batch.
#[derive(Clone, Copy)]
pub(super) struct Probe {
    /// What the shard's table is asked with.
    pub(super) hash: u64,
    /// Position of the key in the caller's list.
    pub(super) position: u32,
}

/// Probes grouped by shard, within a shard in the order of the caller's list.
pub(super) struct Batch {
    probes: Vec<Probe>,
    ends: [u32; SHARDS],
}

impl Batch {
    /// Groups `keys`; position `first + i` is key `i`'s.
    pub(super) fn of(keys: &Keys<'_>, first: usize) -> Self {
        let hashes: Vec<u64> = keys.iter().map(|key| hash(&key)).collect();
        let mut ends = [0_u32; SHARDS];
        hashes.iter().for_each(|&hash| ends[shard_of(hash)] += 1);
        let mut total = 0;
        for end in &mut ends {
            let count = std::mem::replace(end, total);
            total += count;
        }
        let mut probes = vec![Probe { hash: 0, position: 0 }; hashes.len()];
        for (position, &hash) in (first as u32..).zip(&hashes) {
            let end = &mut ends[shard_of(hash)];
            probes[*end as usize] = Probe { hash: table_hash(hash), position };
            *end += 1;
        }
        Self { probes, ends }
    }

    /// The shards that have a probe, with their probes.
    pub(super) fn shards(&self) -> impl Iterator<Item = (usize, &[Probe])> {
        let mut start = 0;
        self.ends.iter().enumerate().filter_map(move |(shard, &end)| {
            let probes = &self.probes[std::mem::replace(&mut start, end as usize)..end as usize];
            (!probes.is_empty()).then_some((shard, probes))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(n: u64) -> Vec<[u8; 32]> {
        (0..n)
            .map(|i| {
                let mut key = [0; 32];
                key[..8].copy_from_slice(&i.to_le_bytes());
                key
            })
            .collect()
    }

    #[test]
    fn every_key_comes_once_under_its_shard_and_in_order() {
        let keys = counters(1000);
        let keys = Keys::from_slices(&keys);
        let batch = Batch::of(&keys, 5);
        let mut seen = vec![false; 1000];
        for (shard, probes) in batch.shards() {
            assert!(probes.is_sorted_by_key(|probe| probe.position));
            for probe in probes {
                let i = probe.position as usize - 5;
                let hash = hash(&keys.get(i));
                assert_eq!((shard, probe.hash), (shard_of(hash), table_hash(hash)));
                assert!(!std::mem::replace(&mut seen[i], true));
            }
        }
        assert!(seen.iter().all(|&s| s));
    }

    #[test]
    fn counters_as_keys_spread_over_shards() {
        let keys = counters(64_000);
        let batch = Batch::of(&Keys::from_slices(&keys), 0);
        assert!(batch.shards().all(|(_, probes)| (800..1200).contains(&probes.len())));
        assert_eq!(batch.shards().count(), SHARDS);
    }
}
