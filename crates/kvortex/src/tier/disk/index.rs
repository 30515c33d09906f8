//! Which block is at which place of one file, and which goes first. Every method for one block is O(1), but for
//! a heap of the free places.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use kvortex_mem::file::Digest;

use super::header::Header;
use crate::key::BlockKey;

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not looked at since the file was opened.
    Unknown,
    Free,
    /// Being written, or wiped.
    Busy,
    /// A block of ours; visible.
    Held,
    /// A block of another identity: kept while there is room.
    Foreign,
}

struct Place {
    key: BlockKey,
    digest: Digest,
    generation: u64,
    older: u32,
    newer: u32,
    state: State,
}

/// A block that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its place.
    pub(super) slot: u32,
    /// Of its bytes.
    pub(super) digest: Digest,
    /// Which writing of the place it is.
    pub(super) generation: u64,
}

/// Invariants: `map` leads to held places, and to busy ones that are being written, by their keys; the order holds exactly
/// the held and foreign ones; `free` holds exactly the free ones.
#[derive(Default)]
pub(super) struct DiskIndex {
    map: HashMap<BlockKey, u32>,
    places: Vec<Place>,
    /// The first of them is taken first, so that the end of a file stays free as long as it can.
    free: BinaryHeap<Reverse<u32>>,
    oldest: u32,
    newest: u32,
    held: usize,
    evictions: u64,
}

impl DiskIndex {
    /// Of no place.
    #[must_use]
    pub(super) fn new() -> Self {
        Self { oldest: NONE, newest: NONE, ..Self::default() }
    }

    /// Adds `count` places: free ones, or such that are still to be looked at.
    pub(super) fn add(&mut self, count: u32, known: bool) {
        let first = self.places.len() as u32;
        let state = if known { State::Free } else { State::Unknown };
        let blank = BlockKey::from_bytes([0; 32]);
        self.places.extend((0..count).map(|_| Place {
            key: blank,
            digest: [0; 16],
            generation: 0,
            older: NONE,
            newer: NONE,
            state,
        }));
        if known {
            self.free.extend((first..first + count).map(Reverse));
        }
    }

    /// Places in all.
    #[must_use]
    pub(super) fn capacity(&self) -> usize {
        self.places.len()
    }

    /// Places that hold nothing.
    #[must_use]
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Visible blocks.
    #[must_use]
    pub(super) const fn held(&self) -> usize {
        self.held
    }

    /// Blocks forgotten to make room.
    #[must_use]
    pub(super) const fn evictions(&self) -> u64 {
        self.evictions
    }

    /// The block, if it is visible.
    #[must_use]
    pub(super) fn find(&self, key: &BlockKey) -> Option<Entry> {
        let &slot = self.map.get(key)?;
        let place = &self.places[slot as usize];
        (place.state == State::Held).then_some(Entry { slot, digest: place.digest, generation: place.generation })
    }

    /// Whether the block is visible or being written.
    #[must_use]
    pub(super) fn knows(&self, key: &BlockKey) -> bool {
        self.map.contains_key(key)
    }

    /// Makes a visible block the last to go.
    pub(super) fn touch(&mut self, key: &BlockKey) {
        if let Some(&slot) = self.map.get(key)
            && self.places[slot as usize].state == State::Held
        {
            self.unlink(slot);
            self.link(slot);
        }
    }

    /// A place to write a block that is not known; made by forgetting another if none is free.
    pub(super) fn claim(&mut self, key: BlockKey) -> Option<u32> {
        let slot = match self.free.pop() {
            Some(Reverse(slot)) => slot,
            None => self.evict()?,
        };
        let place = &mut self.places[slot as usize];
        (place.key, place.state) = (key, State::Busy);
        self.map.insert(key, slot);
        Some(slot)
    }

    /// The block at a claimed place is written. False if it was forgotten meanwhile.
    pub(super) fn commit(&mut self, slot: u32, key: &BlockKey, digest: Digest, generation: u64) -> bool {
        if self.map.get(key) != Some(&slot) {
            self.release(slot);
            return false;
        }
        let place = &mut self.places[slot as usize];
        (place.digest, place.generation, place.state) = (digest, generation, State::Held);
        self.held += 1;
        self.link(slot);
        true
    }

    /// The block at a claimed place was not written.
    pub(super) fn abandon(&mut self, slot: u32, key: &BlockKey) {
        self.disown(slot, key);
        self.release(slot);
    }

    /// The block at a claimed place is not wanted any more. The place stays busy until [`release`](Self::release).
    pub(super) fn disown(&mut self, slot: u32, key: &BlockKey) {
        if self.map.get(key) == Some(&slot) {
            self.map.remove(key);
        }
    }

    /// Forgets a block, if it is visible and, where one is given, of that generation. Its place stays busy until
    /// [`release`](Self::release).
    pub(super) fn forget(&mut self, key: &BlockKey, generation: Option<u64>) -> Option<u32> {
        let entry = self.find(key).filter(|entry| generation.is_none_or(|wanted| wanted == entry.generation))?;
        self.map.remove(key);
        self.unlink(entry.slot);
        self.held -= 1;
        self.places[entry.slot as usize].state = State::Busy;
        Some(entry.slot)
    }

    /// A busy place is free again.
    pub(super) fn release(&mut self, slot: u32) {
        self.places[slot as usize].state = State::Free;
        self.free.push(Reverse(slot));
    }

    /// Forgets everything. Places that are busy become free when they are released.
    pub(super) fn clear(&mut self) {
        self.map.clear();
        while self.oldest != NONE {
            let slot = self.oldest;
            self.unlink(slot);
            self.release(slot);
        }
        for slot in 0..self.places.len() as u32 {
            if self.places[slot as usize].state == State::Unknown {
                self.release(slot);
            }
        }
        self.held = 0;
    }

    /// What was found at a place that was unknown. Of two entries with one key the newer one stays.
    pub(super) fn recover(&mut self, slot: u32, found: Option<(Header, bool)>) {
        if self.places[slot as usize].state != State::Unknown {
            return;
        }
        let Some((header, ours)) = found.filter(|(header, ours)| !ours || self.wins(header)) else {
            return self.release(slot);
        };
        let place = &mut self.places[slot as usize];
        (place.key, place.digest, place.generation) = (header.key, header.payload, header.generation);
        place.state = if ours { State::Held } else { State::Foreign };
        if ours {
            self.map.insert(header.key, slot);
            self.held += 1;
        }
        self.link(slot);
    }

    /// Whether an entry is to be believed; one that it is newer than makes room.
    fn wins(&mut self, header: &Header) -> bool {
        match self.find(&header.key) {
            None => !self.knows(&header.key),
            Some(other) if other.generation >= header.generation => false,
            Some(other) => {
                self.forget(&header.key, Some(other.generation));
                self.release(other.slot);
                true
            }
        }
    }

    /// Orders what was recovered by age, once, when all of it is known. `since` is the first generation of this opening:
    /// what was written or touched since stays where it is.
    pub(super) fn sort_recovered(&mut self, since: u64) {
        let mut old = Vec::new();
        let mut at = self.oldest;
        while at != NONE {
            let place = &self.places[at as usize];
            if place.generation < since {
                old.push((place.generation, at));
            }
            at = place.newer;
        }
        old.sort_unstable();
        old.iter().for_each(|&(_, slot)| self.unlink(slot));
        // Linked as the oldest, so from the newest on.
        old.iter().rev().for_each(|&(_, slot)| self.link_oldest(slot));
    }

    fn evict(&mut self) -> Option<u32> {
        let slot = self.oldest;
        if slot == NONE {
            return None;
        }
        self.unlink(slot);
        if self.places[slot as usize].state == State::Held {
            self.map.remove(&self.places[slot as usize].key);
            self.held -= 1;
            self.evictions += 1;
        }
        Some(slot)
    }

    fn join(&mut self, older: u32, newer: u32) {
        match self.places.get_mut(older as usize) {
            Some(place) => place.newer = newer,
            None => self.oldest = newer,
        }
        match self.places.get_mut(newer as usize) {
            Some(place) => place.older = older,
            None => self.newest = older,
        }
    }

    fn unlink(&mut self, slot: u32) {
        let place = &self.places[slot as usize];
        let (older, newer) = (place.older, place.newer);
        self.join(older, newer);
    }

    fn link(&mut self, slot: u32) {
        let last = self.newest;
        self.join(last, slot);
        self.join(slot, NONE);
    }

    fn link_oldest(&mut self, slot: u32) {
        let first = self.oldest;
        self.join(slot, first);
        self.join(NONE, slot);
    }

    /// Walks everything and asserts the invariants.
    #[cfg(test)]
    pub(super) fn validate(&self) {
        let count = |state| self.places.iter().filter(|place| place.state == state).count();
        assert_eq!(self.free.len(), count(State::Free));
        assert_eq!(self.held, count(State::Held));
        let mut listed = 0;
        let (mut at, mut before) = (self.oldest, NONE);
        while at != NONE {
            let place = &self.places[at as usize];
            assert!(matches!(place.state, State::Held | State::Foreign) && place.older == before);
            (before, at, listed) = (at, place.newer, listed + 1);
        }
        assert_eq!((before, listed), (self.newest, self.held + count(State::Foreign)));
        for (key, &slot) in &self.map {
            let place = &self.places[slot as usize];
            assert!(place.key == *key && matches!(place.state, State::Held | State::Busy));
        }
        assert!(self.map.len() >= self.held);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(i: u8) -> BlockKey {
        BlockKey::from_bytes([i; 32])
    }

    fn header(i: u8, generation: u64) -> Header {
        Header { key: key(i), slot: 0, generation, written_at: 0, payload: [i; 16] }
    }

    fn written(index: &mut DiskIndex, i: u8, generation: u64) -> Option<u32> {
        let slot = index.claim(key(i))?;
        index.commit(slot, &key(i), [i; 16], generation);
        Some(slot)
    }

    #[test]
    fn the_oldest_goes_first_and_a_touch_saves() {
        let mut index = DiskIndex::new();
        index.add(3, true);
        (1..=3).for_each(|i| assert!(written(&mut index, i, u64::from(i)).is_some()));
        index.touch(&key(1));
        written(&mut index, 4, 4);
        assert!(index.find(&key(2)).is_none() && index.find(&key(1)).is_some());
        assert_eq!((index.held(), index.evictions()), (3, 1));
        index.validate();
    }

    #[test]
    fn what_is_being_written_is_known_and_not_seen() {
        let mut index = DiskIndex::new();
        index.add(1, true);
        let slot = index.claim(key(1)).unwrap();
        assert!(index.knows(&key(1)) && index.find(&key(1)).is_none());
        assert_eq!(index.claim(key(2)), None, "a busy place is nobody's");
        index.clear();
        assert!(!index.commit(slot, &key(1), [0; 16], 1), "cleared meanwhile");
        assert!(index.claim(key(2)).is_some());
        index.validate();
    }

    #[test]
    fn the_newer_of_two_entries_wins_and_age_is_restored() {
        let mut index = DiskIndex::new();
        index.add(5, false);
        index.recover(0, Some((header(1, 30), true)));
        index.recover(1, Some((header(2, 10), true)));
        index.recover(2, Some((header(1, 20), true)));
        index.recover(3, Some((header(3, 5), false)));
        index.recover(4, Some((header(2, 40), true)));
        index.sort_recovered(1000);
        index.validate();
        assert_eq!(index.find(&key(1)).map(|entry| entry.slot), Some(0));
        assert_eq!(index.find(&key(2)).map(|entry| entry.slot), Some(4));
        assert!(index.find(&key(3)).is_none(), "another identity's");
        let mut order: Vec<u32> = (10..15).map(|i| index.claim(key(i)).unwrap()).collect();
        order[..2].sort_unstable();
        assert_eq!(order, [1, 2, 3, 0, 4], "free places first, then by age");
    }

    proptest! {
        #[test]
        fn any_order_of_calls_keeps_the_invariants(steps in prop::collection::vec((0u8..8, 0u8..12), 1..200)) {
            let mut index = DiskIndex::new();
            index.add(4, true);
            let mut busy: Vec<(u32, BlockKey)> = Vec::new();
            for (generation, (step, i)) in (1..).zip(steps) {
                match step {
                    0 | 1 if !index.knows(&key(i)) => busy.extend(index.claim(key(i)).map(|slot| (slot, key(i)))),
                    2 | 3 if !busy.is_empty() => {
                        let (slot, key) = busy.swap_remove(usize::from(i) % busy.len());
                        index.commit(slot, &key, [0; 16], generation);
                    }
                    4 if !busy.is_empty() => {
                        let (slot, key) = busy.swap_remove(usize::from(i) % busy.len());
                        index.abandon(slot, &key);
                    }
                    5 => index.touch(&key(i)),
                    6 => index.forget(&key(i), None).into_iter().for_each(|slot| index.release(slot)),
                    7 if i == 0 => index.clear(),
                    _ => {}
                }
                index.validate();
            }
        }
    }
}
