//! Groups of layers that an engine gives blocks of their own: what a block of each is called, and which blocks a hit needs.

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::key::{KEY_BYTES, Keys};

/// Layers whose blocks an engine hands out and takes back together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// How many tokens a token sees, itself among them; 0 if it sees all before it.
    pub window: usize,
    /// Whether the last position of a block also holds something of the token behind it, as a drafter's layers do.
    pub looks_ahead: bool,
}

/// All groups of an engine, whose blocks have the same number of tokens.
///
/// The engine names the tokens of a block, not the group. The key of a block of group `g` is the engine's hash, combined by
/// exclusive or with SHA-256("kvortex group 1" ‖ g as u32); of group 0 it is the hash itself. Two of them are the same only if
/// two hashes differ by just that much, which is as hard to find as two that are the same.
#[derive(Clone, Debug)]
pub struct Groups {
    block_tokens: usize,
    groups: Vec<Group>,
    marks: Vec<[u8; KEY_BYTES]>,
}

impl Groups {
    /// `groups` with blocks of `block_tokens` tokens.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) when there is no group or blocks have no token.
    pub fn new(block_tokens: usize, groups: Vec<Group>) -> Result<Self> {
        if block_tokens == 0 || groups.is_empty() {
            return Err(Error::invalid(format!(
                "{} groups with blocks of {block_tokens} tokens: give at least one of each",
                groups.len()
            )));
        }
        let marks = (0..groups.len() as u32).map(mark).collect();
        Ok(Self { block_tokens, groups, marks })
    }

    /// The groups in order.
    #[must_use]
    pub fn all(&self) -> &[Group] {
        &self.groups
    }

    /// The keys of `group`'s blocks, which the engine names `hashes`.
    ///
    /// # Panics
    /// When there is no such group.
    #[must_use]
    pub fn keys(&self, group: usize, hashes: Keys<'_>) -> Vec<[u8; KEY_BYTES]> {
        hashes.iter().map(|hash| self.key(group, hash.as_bytes())).collect()
    }

    /// The first block of `group` that is still read by the tokens behind `blocks` blocks.
    ///
    /// # Panics
    /// When there is no such group.
    #[must_use]
    pub fn first_read(&self, group: usize, blocks: usize) -> usize {
        match self.groups[group].window {
            0 => 0,
            window => (blocks * self.block_tokens + 1).saturating_sub(window) / self.block_tokens,
        }
    }

    /// Whether some group looks ahead.
    #[must_use]
    pub fn look_ahead(&self) -> bool {
        self.groups.iter().any(|group| group.looks_ahead)
    }

    /// Keys of the blocks that `blocks` numbers, and those numbers: for each of `hashes` one of each group, where 0 is none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) when there are not as many.
    pub fn pick(&self, hashes: Keys<'_>, blocks: &[u32]) -> Result<(Vec<[u8; KEY_BYTES]>, Vec<u32>)> {
        let count = self.groups.len();
        if blocks.len() != hashes.len() * count {
            return Err(Error::invalid(format!(
                "{} blocks for {} keys of {count} groups: give one block of each group for each key, 0 for none",
                blocks.len(),
                hashes.len()
            )));
        }
        let tables = hashes.iter().zip(blocks.chunks_exact(count));
        let all = tables
            .flat_map(|(hash, blocks)| blocks.iter().enumerate().map(move |(group, &block)| (hash, group, block)));
        let given = all.filter(|&(_, _, block)| block != 0);
        Ok(given.map(|(hash, group, block)| (self.key(group, hash.as_bytes()), block)).unzip())
    }

    /// For each block that [`pick`](Self::pick) picks, what its hash has in `of_each`; nothing if that is empty.
    #[must_use]
    pub fn spread<T: Copy>(&self, of_each: &[T], blocks: &[u32]) -> Vec<T> {
        let tables = of_each.iter().zip(blocks.chunks_exact(self.groups.len()));
        tables.flat_map(|(&one, blocks)| blocks.iter().filter(|&&block| block != 0).map(move |_| one)).collect()
    }

    pub(super) fn key(&self, group: usize, hash: &[u8; KEY_BYTES]) -> [u8; KEY_BYTES] {
        let mark = &self.marks[group];
        std::array::from_fn(|i| hash[i] ^ mark[i])
    }
}

fn mark(group: u32) -> [u8; KEY_BYTES] {
    if group == 0 {
        return [0; KEY_BYTES];
    }
    Sha256::new().chain_update(b"kvortex group 1").chain_update(group.to_le_bytes()).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(windows: &[usize]) -> Groups {
        let groups = windows.iter().map(|&window| Group { window, looks_ahead: false }).collect();
        Groups::new(16, groups).unwrap()
    }

    #[test]
    fn keys_of_the_first_group_are_the_hashes_and_no_others_are() {
        let hashes: Vec<[u8; KEY_BYTES]> = (0..50).map(|i| Sha256::digest([i]).into()).collect();
        let groups = groups(&[0, 32, 0]);
        assert_eq!(groups.keys(0, Keys::from_slices(&hashes)), hashes);
        let mut all: Vec<_> = (0..3).flat_map(|group| groups.keys(group, Keys::from_slices(&hashes))).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 150);
    }

    #[test]
    fn a_window_reads_the_blocks_that_it_reaches_into() {
        // With 10 blocks, the next token is number 160 and sees itself and the window - 1 before it.
        let read = |window: usize| groups(&[window]).first_read(0, 10);
        assert_eq!(read(0), 0);
        assert_eq!(read(1), 10, "it sees only itself");
        assert_eq!(read(2), 9);
        assert_eq!(read(17), 9, "144 to 160");
        assert_eq!(read(18), 8, "143 to 160");
        assert_eq!(read(160), 0);
        assert_eq!(read(1000), 0);
    }

    #[test]
    fn what_has_no_block_is_not_picked() {
        let hashes = [[1; KEY_BYTES], [2; KEY_BYTES]];
        let groups = groups(&[0, 32]);
        let (keys, blocks) = groups.pick(Keys::from_slices(&hashes), &[7, 0, 8, 9]).unwrap();
        assert_eq!(blocks, [7, 8, 9]);
        assert_eq!(keys, [hashes[0], hashes[1], groups.key(1, &hashes[1])]);
        assert!(groups.pick(Keys::from_slices(&hashes), &[7, 8, 9]).is_err());
    }

    #[test]
    fn there_is_a_group_and_a_token() {
        assert!(Groups::new(16, Vec::new()).is_err());
        assert!(Groups::new(0, vec![Group::default()]).is_err());
    }
}
