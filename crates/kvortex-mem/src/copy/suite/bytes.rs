//! Every byte in its place, and no other byte touched.

use super::layouts::Layout;
use super::{Engine, WAYS, Way, World, execute};
use crate::arena::Arena;
use crate::copy::{Direction, Step, Transfer};
use crate::map::{HostMemory, MapOptions};
use crate::slots::SlotId;
use crate::span::{Pages, Pattern, Region, Segment};
use crate::sync::Arc;

const POISON: u8 = 0xA5;

/// Slots of an arena are few, because each takes 4 KiB at least.
const MAX_SLOTS: usize = 500;

pub(super) fn arena(world: &dyn World, slots: usize, slot_bytes: usize) -> Arc<Arena> {
    let bytes = slots * slot_bytes.next_multiple_of(4096);
    let options = MapOptions { bytes, huge_pages: false, numa_node: None, touch_threads: 0 };
    let mut memory = HostMemory::map(&options).expect("memory for the suite");
    world.pin(&mut memory);
    Arc::new(Arena::cut(memory, slot_bytes).expect("slots for the suite"))
}

/// All bytes of a slot, those behind the payload too.
pub(super) fn slot_bytes(arena: &Arena, slot: usize) -> Vec<u8> {
    let addr = arena.addr(SlotId(slot as u32)).expect("a slot of the arena");
    let mut bytes = vec![0; arena.stride()];
    // SAFETY: a slot has `stride` bytes, and no transfer is running.
    unsafe { addr.as_ptr().copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    bytes
}

fn set_slot(arena: &Arena, slot: usize, bytes: &[u8]) {
    assert_eq!(bytes.len(), arena.stride());
    let addr = arena.addr(SlotId(slot as u32)).expect("a slot of the arena");
    // SAFETY: a slot has `stride` bytes, and no transfer is running.
    unsafe { addr.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
}

/// Bytes that tell their place: neighbours and equal offsets elsewhere differ.
fn marks(place: usize, len: usize) -> Vec<u8> {
    let mut state = (place as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        bytes.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn step(slot: usize, page: usize) -> Step {
    Step { slot: SlotId(slot as u32), page: page as u32 }
}

/// Stores and loads pages of `layout`, each from and to a slot of another order.
pub(super) fn round_trip(engine: &Engine, world: &dyn World, layout: &Layout) {
    let slots = layout.count().min(MAX_SLOTS) + 1;
    let arena = arena(world, slots, layout.page_bytes() + 5);
    for way in WAYS {
        stores(engine, (world, layout), &arena, way);
        loads(engine, (world, layout), &arena, way);
    }
}

/// Page i goes to slot n - i, so that order matters; slot 0 and the pages beyond the slots stay out.
fn stores(engine: &Engine, (world, layout): (&dyn World, &Layout), arena: &Arc<Arena>, way: Way) {
    let count = arena.slots().total() - 1;
    let sources: Vec<Vec<u8>> = layout.regions.iter().enumerate().map(|(place, &len)| marks(place, len)).collect();
    let regions: Vec<Region> = sources.iter().map(|source| world.region(source, false)).collect();
    (0..=count).for_each(|slot| set_slot(arena, slot, &vec![POISON; arena.stride()]));
    let steps = (0..count).map(|page| step(count - page, page)).collect();
    let transfer = Transfer::new(Direction::Store, Arc::clone(arena), steps, layout.pages(&regions));
    execute(engine, transfer.expect("a valid store"), way).expect("a store");
    for page in 0..count {
        let mut expected = Vec::with_capacity(arena.stride());
        layout.for_each_item(page, |region, item| expected.extend_from_slice(&sources[region][item]));
        expected.resize(arena.stride(), POISON);
        assert!(slot_bytes(arena, count - page) == expected, "{}: {way:?} stored page {page} wrongly", layout.name);
    }
    assert!(slot_bytes(arena, 0).iter().all(|&byte| byte == POISON), "{}: a slot not named was written", layout.name);
    for (region, source) in regions.iter().zip(&sources) {
        assert!(world.bytes(region) == *source, "{}: a store wrote its source", layout.name);
    }
}

/// Page i comes from slot i mod n; several pages may come from one slot.
fn loads(engine: &Engine, (world, layout): (&dyn World, &Layout), arena: &Arc<Arena>, way: Way) {
    let sources: Vec<Vec<u8>> = (0..arena.slots().total()).map(|slot| marks(slot, arena.stride())).collect();
    sources.iter().enumerate().for_each(|(slot, source)| set_slot(arena, slot, source));
    let slots = sources.len();
    let regions: Vec<Region> = layout.regions.iter().map(|&len| world.region(&vec![POISON; len], true)).collect();
    let steps = (0..layout.count()).map(|page| step(page % slots, page)).collect();
    let transfer = Transfer::new(Direction::Load, Arc::clone(arena), steps, layout.pages(&regions));
    execute(engine, transfer.expect("a valid load"), way).expect("a load");
    let mut expected: Vec<Vec<u8>> = layout.regions.iter().map(|&len| vec![POISON; len]).collect();
    for page in 0..layout.count() {
        let mut source = sources[page % slots].as_slice();
        layout.for_each_item(page, |region, item| {
            let (bytes, rest) = source.split_at(item.len());
            expected[region][item].copy_from_slice(bytes);
            source = rest;
        });
    }
    for (region, expected) in regions.iter().zip(&expected) {
        assert!(world.bytes(region) == *expected, "{}: {way:?} loaded wrongly", layout.name);
    }
    for (slot, source) in sources.iter().enumerate() {
        assert!(slot_bytes(arena, slot) == *source, "{}: a load wrote its source", layout.name);
    }
}

pub(super) fn only_named_steps_are_copied(engine: &Engine, world: &dyn World) {
    for way in WAYS {
        let arena = arena(world, 8, 100);
        (0..8).for_each(|slot| set_slot(&arena, slot, &marks(slot, arena.stride())));
        let region = world.region(&[POISON; 1000], true);
        let steps = vec![step(6, 9), step(1, 2), step(6, 0)];
        let transfer = Transfer::new(Direction::Load, Arc::clone(&arena), steps, contiguous(&region, 100));
        execute(engine, transfer.expect("a valid load"), way).expect("a load");
        let mut expected = vec![POISON; 1000];
        for (slot, page) in [(6, 9), (1, 2), (6, 0)] {
            expected[page * 100..][..100].copy_from_slice(&marks(slot, 100));
        }
        assert!(world.bytes(&region) == expected, "{way:?} copied other pages than its steps name");
    }
}

/// As many pages of `page_bytes` as fill `region`.
pub(super) fn contiguous(region: &Region, page_bytes: usize) -> Pages {
    let pattern = Arc::new(Pattern::contiguous(page_bytes));
    let (stride, count) = (page_bytes as isize, region.len() / page_bytes);
    let table = Segment::Table { region: region.clone(), pattern, first: 0, stride, count };
    Pages::new(vec![table]).expect("valid pages")
}

/// A load of all of `region` in pages of `page_bytes`, from slots marked with their numbers, and what it must yield.
pub(super) fn marked_load(world: &dyn World, region: &Region, page_bytes: usize, seed: usize) -> (Transfer, Vec<u8>) {
    let slots = 8;
    let arena = arena(world, slots, page_bytes);
    let sources: Vec<Vec<u8>> = (0..slots).map(|slot| marks(slot + seed, arena.stride())).collect();
    sources.iter().enumerate().for_each(|(slot, source)| set_slot(&arena, slot, source));
    let pages = contiguous(region, page_bytes);
    let steps: Vec<Step> = (0..pages.count()).map(|page| step((page + seed) % slots, page)).collect();
    let sent: Vec<&[u8]> = steps.iter().map(|step| &sources[step.slot.0 as usize][..page_bytes]).collect();
    let expected = sent.concat();
    (Transfer::new(Direction::Load, arena, steps, pages).expect("a valid load"), expected)
}
