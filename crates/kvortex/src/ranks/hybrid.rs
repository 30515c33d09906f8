//! The longest hit of several groups: one number of blocks, of which each group has what it still reads.

use super::groups::Groups;
use crate::index::Index;
use crate::key::{KEY_BYTES, Keys};
use crate::lease::Lease;
use crate::lower::Lower;
use crate::mask::BlockMask;
use crate::sync::Arc;

/// Blocks looked at in one go when a window is searched for, at least.
const STRETCH: usize = 64;

/// Which blocks a hit can be made of.
pub(super) trait Presence {
    /// Length of the longest prefix of `keys` that is there.
    fn prefix_len(&self, keys: Keys<'_>) -> usize;

    /// Which of `keys` are there.
    fn mask(&self, keys: Keys<'_>) -> BlockMask;
}

impl Presence for Index {
    fn prefix_len(&self, keys: Keys<'_>) -> usize {
        self.prefix_len(keys)
    }

    fn mask(&self, keys: Keys<'_>) -> BlockMask {
        self.ready_mask(keys)
    }
}

/// In memory, or below.
pub(super) struct Somewhere<'a> {
    pub(super) index: &'a Index,
    pub(super) lower: &'a Lower,
}

impl Presence for Somewhere<'_> {
    fn prefix_len(&self, keys: Keys<'_>) -> usize {
        let mut start = 0;
        while start < keys.len() {
            let end = keys.len().min(2 * start + STRETCH);
            let there = self.mask(keys.slice(start..end)).prefix();
            if there < end - start {
                return start + there;
            }
            start = end;
        }
        start
    }

    fn mask(&self, keys: Keys<'_>) -> BlockMask {
        let mut mask = self.index.ready_mask(keys);
        if mask.count() < keys.len() {
            mask.include(&self.lower.contains(keys));
        }
        mask
    }
}

/// Leases what a hit needs that is as long as possible: more than `first` blocks, which the engine has, and at most `most`.
/// `hashes` name the blocks from `first` on. Returns the hit's blocks, 0 for none, and the lease: block after block, of each
/// the groups in order.
pub(super) fn lease(
    index: &Arc<Index>,
    groups: &Groups,
    hashes: Keys<'_>,
    first: usize,
    most: usize,
) -> (usize, Lease) {
    let hit = longest(&**index, groups, hashes, first, most);
    let keys = loaded(groups, hashes, first, hit);
    if keys.is_empty() {
        return (0, Lease::none());
    }
    let (lease, found) = index.lease_each(Keys::from_slices(&keys));
    if found.count() == keys.len() { (hit, lease) } else { (0, Lease::none()) }
}

/// The longest hit that `there` could be made of, as in [`lease`], and the keys of what it needs: what it loads, and what must
/// be there besides. Without any it is 0.
pub(super) fn reach(
    there: &impl Presence,
    groups: &Groups,
    hashes: Keys<'_>,
    (first, most): (usize, usize),
) -> (usize, Vec<[u8; KEY_BYTES]>) {
    let hit = longest(there, groups, hashes, first, most);
    let mut keys = loaded(groups, hashes, first, hit);
    if keys.is_empty() {
        return (0, keys);
    }
    let ahead = groups.all().iter().enumerate().filter(|(_, group)| group.looks_ahead);
    keys.extend(ahead.map(|(group, _)| groups.key(group, hashes.get(hit - first).as_bytes())));
    (hit, keys)
}

/// Keys of what a hit of `hit` blocks loads beyond `first`.
fn loaded(groups: &Groups, hashes: Keys<'_>, first: usize, hit: usize) -> Vec<[u8; KEY_BYTES]> {
    let starts: Vec<usize> = (0..groups.all().len()).map(|group| groups.first_read(group, hit)).collect();
    let mut keys = Vec::new();
    for (block, hash) in (first..hit).zip(hashes.iter()) {
        let read = starts.iter().enumerate().filter(|&(_, &start)| block >= start);
        keys.extend(read.map(|(group, _)| groups.key(group, hash.as_bytes())));
    }
    keys
}

/// The longest hit; `first` if there is none. A group that looks ahead must have the block behind the hit as well, for only
/// that names the token which its last position was computed with.
fn longest(there: &impl Presence, groups: &Groups, hashes: Keys<'_>, first: usize, most: usize) -> usize {
    let mut hit = most.min((first + hashes.len()).saturating_sub(usize::from(groups.look_ahead()))).max(first);
    let (whole, windows): (Vec<_>, Vec<_>) =
        (0..groups.all().len()).partition(|&group| groups.all()[group].window == 0);
    for group in whole {
        let ahead = usize::from(groups.all()[group].looks_ahead);
        let keys = groups.keys(group, hashes.slice(0..hit - first + ahead.min(hashes.len())));
        let ready = there.prefix_len(Keys::from_slices(&keys));
        hit = hit.min(first + ready.saturating_sub(ahead));
        if hit == first {
            return first;
        }
    }
    let mut windows: Vec<_> = windows.into_iter().map(|group| Window::new(groups, group, hashes, first, hit)).collect();
    loop {
        let before = hit;
        for window in &mut windows {
            hit = window.settle(there, hit);
        }
        if hit == before || hit == first {
            return hit;
        }
    }
}

/// What is known of the blocks of one group with a window, from the end of the longest hit downwards.
struct Window<'a> {
    groups: &'a Groups,
    group: usize,
    hashes: Keys<'a>,
    first: usize,
    ahead: usize,
    /// Whether each block from `first` on is ready; known from `from` on.
    ready: Vec<bool>,
    from: usize,
}

impl<'a> Window<'a> {
    fn new(groups: &'a Groups, group: usize, hashes: Keys<'a>, first: usize, most: usize) -> Self {
        let ahead = usize::from(groups.all()[group].looks_ahead);
        let end = most + ahead;
        Self { groups, group, hashes, first, ahead, ready: vec![false; end - first], from: end }
    }

    /// The longest hit up to `hit` for which this group has what it reads.
    fn settle(&mut self, there: &impl Presence, mut hit: usize) -> usize {
        while hit > self.first {
            let start = self.groups.first_read(self.group, hit).max(self.first);
            self.look(there, start);
            let read = &self.ready[start - self.first..hit + self.ahead - self.first];
            // Every hit between the first hole and this one reads the hole as well.
            let Some(hole) = read.iter().position(|&ready| !ready) else { return hit };
            hit = (start + hole).saturating_sub(self.ahead).max(self.first);
        }
        hit
    }

    /// Looks up what is not known from `start` on.
    fn look(&mut self, there: &impl Presence, start: usize) {
        if start >= self.from {
            return;
        }
        let start = start.min(self.from.saturating_sub(STRETCH)).max(self.first);
        let range = start - self.first..self.from - self.first;
        let keys = self.groups.keys(self.group, self.hashes.slice(range.clone()));
        let mask = there.mask(Keys::from_slices(&keys));
        for (at, known) in self.ready[range].iter_mut().enumerate() {
            *known = mask.get(at);
        }
        self.from = start;
    }
}

#[cfg(test)]
mod tests;
