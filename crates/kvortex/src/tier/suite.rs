//! The tests of the tiers' contract: every tier, and every wrapper of one, must pass them.
//!
//! The bytes of every block follow from its key, so that a byte under another key is seen.

use std::any::Any;
use std::time::{Duration, Instant};

use kvortex_mem::arena::Arena;
use kvortex_mem::map::{HostMemory, MapOptions};
use kvortex_mem::slots::{SlotClaim, SlotId};
use kvortex_mem::span::{Pages, Pattern, Region, Segment};

use kvortex_mem::copy::{CopyEngine, Direction, HostCopy, Step, Transfer};

use super::{Landing, Offer, Put, Tier, Want};
use crate::key::{BlockKey, Keys};
use crate::sync::{Arc, AtomicUsize, Condvar, Mutex, Ordering};

/// Long enough for any disk.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What the tests move blocks in: an arena, and copies to look into it without unsafe code.
pub struct World {
    /// Where blocks lie.
    pub arena: Arc<Arena>,
    copies: HostCopy,
    /// Dropped with this: a folder, say.
    pub guard: Option<Box<dyn Any + Send + Sync>>,
}

/// The bytes of a block.
#[must_use]
pub fn bytes_of(key: &BlockKey, len: usize) -> Vec<u8> {
    let (words, _) = key.as_bytes().as_chunks::<8>();
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

/// Key number `i`.
#[must_use]
pub fn key(i: usize) -> BlockKey {
    let mut key = [0xAB; 32];
    key[..8].copy_from_slice(&(i as u64).to_le_bytes());
    BlockKey::from_bytes(key)
}

/// How a batch of wants goes on.
#[derive(Default)]
struct Wave {
    ended: AtomicUsize,
    landed: Mutex<Vec<(usize, SlotClaim)>>,
    lock: Mutex<()>,
    changed: Condvar,
}

struct Place {
    wave: Arc<Wave>,
    index: usize,
    claim: Option<SlotClaim>,
}

impl Landing for Place {
    fn slot(&self) -> SlotId {
        self.claim.as_ref().map_or(SlotId(u32::MAX), SlotClaim::id)
    }

    fn land(mut self: Box<Self>) {
        let claim = self.claim.take();
        self.wave.landed.lock().extend(claim.map(|claim| (self.index, claim)));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _guard = self.wave.lock.lock();
        self.wave.ended.fetch_add(1, Ordering::AcqRel);
        self.wave.changed.notify_all();
    }
}

impl World {
    /// Room for `slots` blocks of `block_bytes`.
    ///
    /// # Panics
    /// When there is no memory.
    #[must_use]
    pub fn new(slots: usize, block_bytes: usize) -> Self {
        let bytes = slots * block_bytes.next_multiple_of(4096);
        let options = MapOptions { bytes, huge_pages: false, numa_node: None, touch_threads: 1 };
        let memory = HostMemory::map(&options).expect("there is memory for a test");
        let arena = Arc::new(Arena::cut(memory, block_bytes).expect("it holds a block"));
        Self { arena, copies: HostCopy::new(1), guard: None }
    }

    fn copy(&self, direction: Direction, slot: SlotId, bytes: Vec<u8>) -> Vec<u8> {
        let len = bytes.len();
        let region = Region::from_vec(bytes);
        let pattern = Arc::new(Pattern::contiguous(len));
        let table = Segment::Table { region: region.clone(), pattern, first: 0, stride: len as isize, count: 1 };
        let pages = Pages::new(vec![table]).expect("a page");
        let transfer = Transfer::new(direction, Arc::clone(&self.arena), vec![Step { slot, page: 0 }], pages);
        self.copies.run(transfer.expect("it fits")).expect("memory is copied");
        region.to_vec()
    }

    /// A slot that holds the bytes of `key`.
    ///
    /// # Panics
    /// When no slot is free.
    #[must_use]
    pub fn filled(&self, key: &BlockKey) -> SlotClaim {
        let claim = self.arena.slots().claim().expect("a free slot");
        self.copy(Direction::Store, claim.id(), bytes_of(key, self.arena.slot_bytes()));
        claim
    }

    /// The bytes of a slot.
    #[must_use]
    pub fn bytes(&self, slot: SlotId) -> Vec<u8> {
        self.copy(Direction::Load, slot, vec![0; self.arena.slot_bytes()])
    }

    /// Offers blocks and tells what became of each.
    #[must_use]
    pub fn put(&self, tier: &dyn Tier, ids: impl IntoIterator<Item = usize>) -> Vec<Put> {
        let offer = |id| {
            let claim = self.filled(&key(id));
            Offer { key: key(id), slot: claim.id(), keep: Arc::new(claim) }
        };
        tier.put(ids.into_iter().map(offer).collect())
    }

    /// Offers blocks and waits until they are kept.
    ///
    /// # Panics
    /// When one is not queued.
    pub fn keep(&self, tier: &dyn Tier, ids: impl IntoIterator<Item = usize>) {
        let puts = self.put(tier, ids);
        assert!(puts.iter().all(|put| matches!(put, Put::Queued | Put::Present)), "{puts:?}");
        assert!(tier.flush(PATIENCE));
    }

    /// Which of `ids` come back by the deadline. Every byte that comes is checked.
    ///
    /// # Panics
    /// When a block has bytes that are not its own, or a landing is never dropped.
    pub fn get(&self, tier: &dyn Tier, ids: &[usize], deadline: Duration) -> Vec<bool> {
        let wave = Arc::new(Wave::default());
        let want = |(index, &id): (usize, &usize)| {
            let claim = self.arena.slots().claim();
            assert!(claim.is_some(), "a free slot");
            Want { key: key(id), landing: Box::new(Place { wave: Arc::clone(&wave), index, claim }) }
        };
        tier.get(ids.iter().enumerate().map(want).collect(), Instant::now() + deadline);
        let end = Instant::now() + PATIENCE;
        let mut guard = wave.lock.lock();
        while wave.ended.load(Ordering::Acquire) < ids.len() {
            let late = wave.changed.wait_until(&mut guard, end).timed_out();
            assert!(!late || wave.ended.load(Ordering::Acquire) == ids.len(), "a landing was never dropped");
        }
        drop(guard);
        let mut found = vec![false; ids.len()];
        for (index, claim) in wave.landed.lock().drain(..) {
            let wanted = bytes_of(&key(ids[index]), self.arena.slot_bytes());
            assert!(self.bytes(claim.id()) == wanted, "block {} has bytes that are not its own", ids[index]);
            found[index] = true;
        }
        found
    }
}

fn packed(ids: impl IntoIterator<Item = usize>) -> Vec<[u8; 32]> {
    ids.into_iter().map(|id| *key(id).as_bytes()).collect()
}

/// Which of `ids` the tier says it has.
#[must_use]
pub fn has(tier: &dyn Tier, ids: impl IntoIterator<Item = usize>) -> Vec<bool> {
    let keys = packed(ids);
    let mask = tier.contains(Keys::from_slices(&keys), Instant::now() + PATIENCE);
    (0..keys.len()).map(|i| mask.get(i)).collect()
}

/// A tier that holds at least 8 and at most 64 blocks, made anew for each test, with the world whose slots it uses, of which
/// there are at least 128.
pub type Make<'a> = &'a dyn Fn() -> (World, Box<dyn Tier>);

/// Runs all of it.
///
/// # Panics
/// When the tier breaks the contract.
pub fn conforms(make: Make<'_>) {
    what_was_put_comes_back(make);
    the_unknown_is_a_miss(make);
    a_second_put_is_present(make);
    removed_is_gone(make);
    cleared_is_gone(make);
    it_is_bounded_and_the_tail_goes_first(make);
    what_is_offered_again_stays(make);
    nothing_comes_after_its_deadline(make);
    a_stopped_tier_drops_and_misses(make);
    no_slot_is_kept(make);
    many_threads_see_only_what_was_put(make);
}

fn what_was_put_comes_back(make: Make<'_>) {
    let (world, tier) = make();
    world.keep(&*tier, 0..6);
    assert_eq!(has(&*tier, 0..8), [true, true, true, true, true, true, false, false]);
    assert_eq!(world.get(&*tier, &[5, 0, 7, 3], PATIENCE), [true, true, false, true]);
    let stats = tier.stats();
    assert_eq!((stats.blocks, stats.hits, stats.misses, stats.written), (6, 3, 1, 6));
}

fn the_unknown_is_a_miss(make: Make<'_>) {
    let (world, tier) = make();
    assert_eq!(world.get(&*tier, &[1, 2, 3], PATIENCE), [false; 3]);
    assert_eq!(world.get(&*tier, &[], PATIENCE), [false; 0]);
    assert_eq!(world.put(&*tier, []), []);
}

fn a_second_put_is_present(make: Make<'_>) {
    let (world, tier) = make();
    world.keep(&*tier, [1]);
    assert_eq!(world.put(&*tier, [1, 2]), [Put::Present, Put::Queued]);
    assert!(tier.flush(PATIENCE));
    assert_eq!(tier.stats().blocks, 2);
}

fn removed_is_gone(make: Make<'_>) {
    let (world, tier) = make();
    world.keep(&*tier, 0..4);
    let keys = packed([1, 2, 9]);
    assert_eq!(tier.remove(Keys::from_slices(&keys), Instant::now() + PATIENCE), 2);
    assert_eq!(world.get(&*tier, &[0, 1, 2, 3], PATIENCE), [true, false, false, true]);
    // Whether they wait, are being written, or are kept by now.
    for round in 10..20 {
        let _ = world.put(&*tier, [10 * round, 10 * round + 1]);
        let keys = packed([10 * round]);
        assert_eq!(tier.remove(Keys::from_slices(&keys), Instant::now() + PATIENCE), 1);
        assert!(tier.flush(PATIENCE));
        assert_eq!(world.get(&*tier, &[10 * round, 10 * round + 1], PATIENCE), [false, true]);
    }
    world.keep(&*tier, [1]);
    assert_eq!(world.get(&*tier, &[1], PATIENCE), [true]);
}

fn cleared_is_gone(make: Make<'_>) {
    let (world, tier) = make();
    world.keep(&*tier, 0..4);
    assert!(tier.clear());
    assert_eq!(world.get(&*tier, &[0, 1, 2, 3], PATIENCE), [false; 4]);
    assert_eq!(tier.stats().blocks, 0);
    world.keep(&*tier, [2]);
    assert_eq!(world.get(&*tier, &[1, 2], PATIENCE), [false, true]);
}

fn it_is_bounded_and_the_tail_goes_first(make: Make<'_>) {
    let (world, tier) = make();
    world.keep(&*tier, 0..8);
    for first in (100..400).step_by(20) {
        world.keep(&*tier, first..first + 20);
        let stats = tier.stats();
        assert!(stats.blocks <= 64 && stats.bytes <= stats.max_bytes, "{stats:?}");
    }
    assert!(tier.stats().evictions > 0);
    let kept = has(&*tier, 380..400);
    assert!(kept[..8].iter().all(|&kept| kept), "the head of what came last is kept: {kept:?}");
}

fn what_is_offered_again_stays(make: Make<'_>) {
    let (world, tier) = make();
    for first in (100..200).step_by(5) {
        world.keep(&*tier, [1, 2]);
        world.keep(&*tier, [1, 2].into_iter().chain(first..first + 5));
        assert_eq!(has(&*tier, [1, 2]), [true, true]);
    }
}

fn nothing_comes_after_its_deadline(make: Make<'_>) {
    let (world, tier) = make();
    world.keep(&*tier, 0..4);
    assert_eq!(world.get(&*tier, &[0, 1, 2, 3], Duration::ZERO), [false; 4]);
    assert_eq!(world.get(&*tier, &[0, 1, 2, 3], PATIENCE), [true; 4]);
}

fn a_stopped_tier_drops_and_misses(make: Make<'_>) {
    let (world, tier) = make();
    world.keep(&*tier, 0..4);
    assert!(tier.stop(PATIENCE) && tier.stop(PATIENCE));
    assert_eq!(world.put(&*tier, [9]), [Put::Dropped]);
    assert_eq!(world.get(&*tier, &[0, 1], PATIENCE), [false; 2]);
}

fn no_slot_is_kept(make: Make<'_>) {
    let (world, tier) = make();
    world.keep(&*tier, 0..8);
    world.get(&*tier, &[0, 1, 50, 2], PATIENCE);
    world.get(&*tier, &[0, 1], Duration::ZERO);
    assert!(tier.stop(PATIENCE));
    drop(tier);
    assert_eq!(world.arena.slots().free(), world.arena.slots().total());
}

fn many_threads_see_only_what_was_put(make: Make<'_>) {
    let (world, tier) = make();
    world.keep(&*tier, 0..30);
    std::thread::scope(|scope| {
        let (world, tier) = (&world, &*tier);
        let start = |thread: usize| {
            scope.spawn(move || {
                for round in 0..40 {
                    let ids: Vec<usize> = (0..6).map(|i| (round * 7 + i * (thread + 1)) % 90).collect();
                    let _ = world.put(tier, ids.iter().copied());
                    world.get(tier, &ids, PATIENCE);
                }
            })
        };
        let threads: Vec<_> = (0..4).map(start).collect();
        // One by one, for a sanitizer does not see how the scope waits for them.
        assert!(threads.into_iter().all(|thread| thread.join().is_ok()));
    });
    assert!(tier.flush(PATIENCE));
    let stats = tier.stats();
    assert!(stats.hits > 0, "{stats:?}");
}
