//! What the benchmarks share: blocks, and the rivals that ours is measured beside.

use std::collections::HashMap;
use std::sync::Arc;

use kvortex::index::Index;
use kvortex::tier::host::SlotPool;
use kvortex::{KeyChain, Keys, Namespace};
use parking_lot::Mutex;

/// Blocks of a prompt of 131,072 tokens.
pub const PROMPT_BLOCKS: usize = 8192;

/// Tokens that belong to prompt `seed`.
#[must_use]
pub fn tokens(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(seed) % 128_000).collect()
}

/// The packed keys of prompt `seed`.
///
/// # Panics
/// Never: 16 is a legal block size and the prompt is short enough.
#[must_use]
pub fn prompt_keys(seed: u32, blocks: usize) -> Vec<u8> {
    let mut chain = KeyChain::new(&Namespace::default(), 16, b"").expect("16 tokens a block are legal");
    chain.extend(&tokens(seed, blocks * 16), b"").expect("the prompt is short enough");
    chain.keys().to_vec()
}

/// Packed keys of `resident` blocks, in prompts of [`PROMPT_BLOCKS`].
#[must_use]
pub fn resident_keys(resident: usize) -> Vec<u8> {
    let prompts = resident.div_ceil(PROMPT_BLOCKS) as u32;
    let mut keys: Vec<u8> = (0..prompts).flat_map(|seed| prompt_keys(seed, PROMPT_BLOCKS)).collect();
    keys.truncate(resident * 32);
    keys
}

/// Splits packed keys.
///
/// # Panics
/// When the length is no multiple of 32.
#[must_use]
pub fn keys(packed: &[u8]) -> Keys<'_> {
    Keys::packed(packed).expect("whole keys")
}

/// An index that holds `packed`, stored prompt by prompt.
#[must_use]
pub fn index_of(packed: &[u8]) -> Arc<Index> {
    let all = keys(packed);
    let pool = SlotPool::new(all.len() as u32);
    let index = Arc::new(Index::new(pool.clone()));
    for start in (0..all.len()).step_by(PROMPT_BLOCKS) {
        let run = all.slice(start..all.len().min(start + PROMPT_BLOCKS));
        index.reserve(run).reservation.begin(pool.claim_many(run.len())).publish();
    }
    index
}

/// What one would write first: a map per shard, one lock taken for each key.
pub struct LockPerKey {
    shards: Vec<Mutex<Slots>>,
}

/// Slot and leases by key.
type Slots = HashMap<[u8; 32], (u32, u32)>;

impl LockPerKey {
    /// Holds `packed`.
    #[must_use]
    pub fn of(packed: &[u8]) -> Self {
        let shards = (0..64).map(|_| Mutex::default()).collect();
        let this = Self { shards };
        for (i, key) in keys(packed).iter().enumerate() {
            this.shard(key.as_bytes()).lock().insert(*key.as_bytes(), (i as u32, 0));
        }
        this
    }

    fn shard(&self, key: &[u8; 32]) -> &Mutex<Slots> {
        &self.shards[key[0] as usize % 64]
    }

    /// Length of the longest prefix.
    #[must_use]
    pub fn prefix_len(&self, keys: Keys<'_>) -> usize {
        keys.iter().take_while(|key| self.shard(key.as_bytes()).lock().contains_key(key.as_bytes())).count()
    }

    /// Leases the longest prefix and gives it back.
    #[must_use]
    pub fn lease_and_return(&self, keys: Keys<'_>) -> usize {
        let lease = |key: &[u8; 32]| self.shard(key).lock().get_mut(key).map(|entry| entry.1 += 1).is_some();
        let leased = keys.iter().take_while(|key| lease(key.as_bytes())).count();
        for key in keys.slice(0..leased).iter() {
            if let Some(entry) = self.shard(key.as_bytes()).lock().get_mut(key.as_bytes()) {
                entry.1 -= 1;
            }
        }
        leased
    }
}
