//! Mappings, slots and transfers: what is accepted, and what is refused with nothing changed.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::HashSet;
use std::mem::size_of;
use std::sync::Arc;

use kvortex_mem::MemError;
use kvortex_mem::arena::Arena;
use kvortex_mem::copy::{Direction, Step, Transfer};
use kvortex_mem::map::{HostMemory, MapOptions};
use kvortex_mem::numa;
use kvortex_mem::slots::{SlotClaim, SlotId, SlotPool};
use kvortex_mem::span::{Pages, Pattern, Piece, Region, Segment};
use proptest::prelude::*;

const MIB: usize = 1 << 20;

fn options(bytes: usize) -> MapOptions {
    MapOptions { bytes, huge_pages: true, numa_node: None, touch_threads: 2 }
}

fn arena(slots: usize, slot_bytes: usize) -> Arc<Arena> {
    let bytes = slots * slot_bytes.next_multiple_of(4096);
    Arc::new(Arena::cut(HostMemory::map(&options(bytes)).unwrap(), slot_bytes).unwrap())
}

/// Resident bytes of a range, as the system counts them.
fn resident(memory: &HostMemory) -> usize {
    let mut pages = vec![0u8; memory.len() / 4096];
    // SAFETY: one byte per page of the mapping.
    let rc = unsafe { libc::mincore(memory.addr().as_ptr().cast(), memory.len(), pages.as_mut_ptr()) };
    assert_eq!(rc, 0);
    pages.iter().filter(|&&page| page & 1 == 1).count() * 4096
}

#[test]
fn memory_is_aligned_zeroed_touched_and_given_back() {
    for (bytes, len) in [(1, 4096), (4097, 8192), (2 * MIB, 2 * MIB), (130 * MIB + 1, 130 * MIB + 4096)] {
        let memory = HostMemory::map(&options(bytes)).unwrap();
        assert_eq!(memory.len(), len);
        let alignment = if len >= 2 * MIB { 2 * MIB } else { 4096 };
        assert_eq!(memory.addr().as_ptr() as usize % alignment, 0);
        assert_eq!(resident(&memory), len, "touched");
        // SAFETY: the mapping is this test's alone.
        let bytes = unsafe { std::slice::from_raw_parts(memory.addr().as_ptr(), len) };
        assert!(bytes.iter().all(|&byte| byte == 0));
        assert!(memory.huge_page_bytes() <= len);
    }
    let untouched = HostMemory::map(&MapOptions { touch_threads: 0, ..options(8 * MIB) }).unwrap();
    assert_eq!(resident(&untouched), 0, "not touched");
}

#[test]
fn huge_pages_come_where_the_system_has_them() {
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let memory = HostMemory::map(&options(64 * MIB)).unwrap();
    if enabled.contains("[always]") || enabled.contains("[madvise]") {
        assert!(memory.huge_page_bytes() >= 32 * MIB, "{} bytes of 64 MiB", memory.huge_page_bytes());
    }
}

#[test]
fn more_than_there_is_is_refused_by_name() {
    let bytes = numa::total_memory_limit() / 4096 * 4096 + 4096;
    for bytes in [bytes, usize::MAX / 2, usize::MAX] {
        let error = HostMemory::map(&options(bytes)).unwrap_err();
        assert!(matches!(error, MemError::TooLarge { bytes: named, available } if named == bytes && available < bytes));
        assert!(error.to_string().contains("smaller pool"), "{error}");
    }
    assert!(matches!(HostMemory::map(&options(0)), Err(MemError::ZeroBytes { .. })));
    let untouched = MapOptions { touch_threads: 0, ..options(usize::MAX / 2) };
    assert!(matches!(HostMemory::map(&untouched), Err(MemError::Map { .. })), "the system itself refuses this");
}

#[test]
fn memory_limits_are_plausible() {
    assert!(numa::available_memory() > MIB && numa::available_memory() <= numa::total_memory_limit());
}

#[test]
fn a_node_must_exist() {
    let on = |node| HostMemory::map(&MapOptions { numa_node: Some(node), ..options(4096) });
    let last = numa::node_count() - 1;
    assert!(
        matches!(on(last + 1), Err(MemError::NoSuchNode { node, last: named }) if node == last + 1 && named == last)
    );
    assert!(on(last).is_ok());
}

#[test]
fn slots_are_equal_aligned_and_apart() {
    let arena = arena(10, 5000);
    assert_eq!((arena.slot_bytes(), arena.stride(), arena.slots().total()), (5000, 8192, 10));
    let start = arena.memory().addr().as_ptr() as usize;
    for slot in 0..10 {
        let addr = arena.addr(SlotId(slot)).unwrap().as_ptr() as usize;
        assert_eq!(addr, start + slot as usize * 8192);
    }
    assert_eq!(arena.addr(SlotId(10)), None);
    assert_eq!(arena.addr(SlotId(u32::MAX)), None);
}

#[test]
fn a_cut_that_holds_no_slot_is_refused() {
    let cut = |bytes, slot_bytes| Arena::cut(HostMemory::map(&options(bytes)).unwrap(), slot_bytes).unwrap_err();
    assert!(matches!(cut(8192, 8193), MemError::TooSmall { bytes: 8192, slot_bytes: 12288 }));
    assert!(matches!(cut(8192, usize::MAX), MemError::TooSmall { .. }));
    assert!(matches!(cut(8192, 0), MemError::ZeroBytes { .. }));
    assert_eq!(Arena::fit(8192, 4097).unwrap(), 1);
    assert!(matches!(Arena::fit(1 << 50, 1), Err(MemError::TooManySlots { .. })));
}

#[test]
fn a_claim_is_two_words() {
    assert_eq!(size_of::<SlotClaim>(), 16);
}

#[test]
fn slots_go_round_in_ascending_order() {
    let pool = SlotPool::new(6);
    let ids = |claims: &[SlotClaim]| claims.iter().map(|claim| claim.id().0).collect::<Vec<_>>();
    let mut first = pool.claim_many(4);
    assert_eq!(ids(&first), [0, 1, 2, 3]);
    drop(first.remove(1));
    let next = pool.claim().unwrap();
    assert_eq!(next.id(), SlotId(4), "what was given back comes when its turn comes");
    pool.return_many(first.into_iter().rev().collect());
    assert_eq!((pool.free(), pool.largest_free_run()), (5, 4));
    let rest = pool.claim_many(100);
    assert_eq!(ids(&rest), [5, 0, 1, 2, 3], "in whatever order they were given back");
    assert!(pool.claim().is_none() && pool.claim_many(1).is_empty());
    assert_eq!((pool.free(), pool.largest_free_run()), (0, 0));
}

#[test]
fn a_free_slot_is_found_however_far_it_is() {
    let pool = SlotPool::new(20_000);
    let mut all = pool.claim_many(20_000);
    for id in [19_999, 12_345, 4_096, 4_095, 64, 63, 0] {
        let at = all.iter().position(|claim| claim.id().0 == id).unwrap();
        drop(all.swap_remove(at));
        let found = pool.claim().unwrap();
        assert_eq!((found.id().0, pool.free()), (id, 0));
        all.push(found);
    }
}

#[test]
fn claims_of_another_pool_go_home() {
    let (home, away) = (SlotPool::new(2), SlotPool::new(2));
    let claims = home.claim_many(2);
    away.return_many(claims);
    assert_eq!((home.free(), away.free()), (2, 2));
    assert_eq!(away.claim_many(3).len(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn slots_behave_like_a_set(
        total in prop::sample::select(vec![20usize, 64, 65, 4160]),
        ops in prop::collection::vec((0u8..4, 0usize..12), 1..120),
    ) {
        let pool = SlotPool::new(total as u32);
        // Far from the start, where the round begins anew.
        drop(pool.claim_many(total - total / 3));
        let mut held: Vec<SlotClaim> = Vec::new();
        for (op, n) in ops {
            match op {
                0 => held.extend(pool.claim()),
                1 => {
                    let free = total - held.len();
                    let claims = pool.claim_many(n);
                    prop_assert_eq!(claims.len(), n.min(free));
                    held.extend(claims);
                }
                2 if n < held.len() => drop(held.swap_remove(n)),
                _ => pool.return_many(held.drain(..n.min(held.len())).collect()),
            }
            let taken: HashSet<u32> = held.iter().map(|claim| claim.id().0).collect();
            prop_assert_eq!(taken.len(), held.len(), "no slot has two holders");
            prop_assert_eq!(pool.free(), total - held.len());
            let free: Vec<bool> = (0..total as u32).map(|id| !taken.contains(&id)).collect();
            let longest = free.chunk_by(|a, b| a == b).filter(|run| run[0]).map(<[_]>::len).max();
            prop_assert_eq!(pool.largest_free_run(), longest.unwrap_or(0));
        }
    }
}

fn pages(region: &Region, page_bytes: usize, stride: isize, count: usize) -> Pages {
    let pattern = Arc::new(Pattern::contiguous(page_bytes));
    Pages::new(vec![Segment::Table { region: region.clone(), pattern, first: 0, stride, count }]).unwrap()
}

fn transfer(direction: Direction, steps: &[(u32, u32)], pages: Pages) -> Result<Transfer, MemError> {
    let steps = steps.iter().map(|&(slot, page)| Step { slot: SlotId(slot), page }).collect();
    Transfer::new(direction, arena(4, 100), steps, pages)
}

#[test]
fn wrong_transfers_are_refused() {
    use Direction::{Load, Store};
    let region = Region::from_vec(vec![0; 800]);
    let good = || pages(&region, 100, 100, 8);
    for direction in [Store, Load] {
        assert!(transfer(direction, &[(3, 7), (0, 0)], good()).is_ok());
        let slot = transfer(direction, &[(4, 0)], good()).unwrap_err();
        assert!(matches!(slot, MemError::OutOfRange { what: "slot", index: 4, count: 4 }), "{slot}");
        let page = transfer(direction, &[(0, 8)], good()).unwrap_err();
        assert!(matches!(page, MemError::OutOfRange { what: "page", index: 8, count: 8 }), "{page}");
        let large = transfer(direction, &[], pages(&region, 101, 101, 7)).unwrap_err();
        assert!(matches!(large, MemError::PagesMismatch { expected: 100, actual: 101, .. }), "{large}");
    }
    let twice = transfer(Store, &[(1, 0), (2, 1), (1, 2)], good()).unwrap_err();
    assert!(matches!(twice, MemError::WrittenTwice { what: "slot", index: 1 }), "{twice}");
    let twice = transfer(Load, &[(1, 5), (2, 1), (3, 5)], good()).unwrap_err();
    assert!(matches!(twice, MemError::WrittenTwice { what: "page", index: 5 }), "{twice}");
    assert!(transfer(Store, &[(1, 5), (2, 5)], good()).is_ok(), "one page into two slots");
    assert!(transfer(Load, &[(1, 5), (1, 4)], good()).is_ok(), "one slot into two pages");
}

#[test]
fn targets_must_be_writable_apart_and_outside_the_arena() {
    use Direction::{Load, Store};
    let read_only = || pages(&Region::from_vec_read_only(vec![0; 800]), 100, 100, 8);
    assert!(transfer(Store, &[(0, 0)], read_only()).is_ok());
    assert!(matches!(transfer(Load, &[(0, 0)], read_only()), Err(MemError::ReadOnly)));
    let overlapping = || pages(&Region::from_vec(vec![0; 800]), 100, 99, 8);
    assert!(transfer(Store, &[(0, 0)], overlapping()).is_ok());
    let overlap = transfer(Load, &[(0, 0), (1, 1)], overlapping()).unwrap_err();
    assert!(matches!(overlap, MemError::Overlap { .. }), "{overlap}");

    let arena = arena(4, 4096);
    let lent = arena.addr(SlotId(2)).unwrap();
    // SAFETY: the arena is the owner, and no copy is executed.
    let lent = unsafe { Region::from_raw(lent, 4096, true, Box::new(Arc::clone(&arena))) };
    let step = vec![Step { slot: SlotId(1), page: 0 }];
    let make = |direction| Transfer::new(direction, Arc::clone(&arena), step.clone(), pages(&lent, 4096, 0, 1));
    assert!(make(Store).is_ok(), "a lent block may be stored under another name");
    assert!(matches!(make(Load), Err(MemError::TargetInArena)));
}

#[test]
fn a_place_written_twice_is_found_among_many() {
    let (arena, region) = (arena(100, 8), Region::from_vec(vec![0; 800]));
    for direction in [Direction::Store, Direction::Load] {
        let make = |last| {
            let steps = (0..99).chain([last]).map(|index| Step { slot: SlotId(index), page: index }).collect();
            Transfer::new(direction, Arc::clone(&arena), steps, pages(&region, 8, 8, 100))
        };
        assert!(make(99).is_ok());
        assert!(matches!(make(64), Err(MemError::WrittenTwice { index: 64, .. })));
    }
}

/// Two pages whose items alternate, described by two patterns: nothing but their fragments tells that they lie apart.
#[test]
fn pages_of_a_million_fragments_are_compared_in_bounded_memory() {
    let items = 700_000;
    let region = Region::from_vec(vec![0; items * 4 + 4]);
    let piece = |offset| {
        let pattern = Arc::new(Pattern::strided(2, &[items], &[4]).unwrap());
        Piece { region: region.clone(), offset, pattern }
    };
    let overlap = |second| Pages::new(vec![Segment::List(vec![piece(0), piece(second)])]).unwrap().first_overlap();
    assert_eq!(overlap(2), None);
    assert_eq!(overlap(1), Some((0, 1)));
}
