//! Copies on a real GPU: the suite of the copy engines, and the order against a stream that somebody else uses.
//!
//! Ignored, since most machines have none: `.ci/gpu` runs them where there is one.
#![allow(
    clippy::unwrap_used,
    clippy::mut_from_ref,
    reason = "a test that cannot go on should panic; slots are raw memory"
)]

use std::ptr::NonNull;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use kvortex_mem::MemError;
use kvortex_mem::arena::Arena;
use kvortex_mem::copy::gpu::{GpuCopy, GpuOptions, Method, Profile};
use kvortex_mem::copy::suite::{DeviceWorld, conforms_in};
use kvortex_mem::copy::{CopyEngine, Direction, Step, Transfer};
use kvortex_mem::cuda::Cuda;
use kvortex_mem::device::{Device, DeviceMemory, Event, Item, Launch, Priority, Row, Stream};
use kvortex_mem::device_suite::device_conforms;
use kvortex_mem::map::{HostMemory, MapOptions};
use kvortex_mem::slots::SlotId;
use kvortex_mem::span::{Pages, Parts, Pattern, Place, Region, Segment};

fn device() -> Arc<dyn Device> {
    Cuda::open(0).expect("a GPU; these tests are for machines that have one")
}

fn methods() -> impl Iterator<Item = Option<Method>> {
    Method::ALL.into_iter().map(Some).chain([None])
}

fn pinned(device: &Arc<dyn Device>, bytes: usize) -> HostMemory {
    let options = MapOptions { bytes, huge_pages: true, numa_node: None, touch_threads: 4 };
    let mut memory = HostMemory::map(&options).unwrap();
    memory.pin(device).unwrap();
    memory
}

#[test]
#[ignore = "needs a GPU"]
fn every_method_conforms() {
    let device = device();
    let world = DeviceWorld::new(&device);
    for method in methods() {
        for streams in [1, 2, 3, 4] {
            let options = GpuOptions { streams, method, staging_bytes: 1 << 20, ..GpuOptions::default() };
            conforms_in(&world, || {
                Arc::new(GpuCopy::new(Arc::clone(&device), options.clone(), Profile::ASSUMED).unwrap())
            });
        }
    }
}

/// The kernel alone, for every alignment of both sides and lengths around its words.
#[test]
#[ignore = "needs a GPU"]
fn the_kernel_copies_any_bytes_from_and_to_any_address() {
    const SPAN: usize = 4096 + 64;
    let device = device();
    let stream = Stream::new(&device, Priority::High).unwrap();
    let (end, there) = (Event::new(&device).unwrap(), DeviceMemory::new(&device, 2 * SPAN).unwrap());
    let host = pinned(&device, 1 << 20);
    let (base, device_base) = (host.addr().as_ptr(), there.addr().as_ptr() as usize);
    let (source, target, tables) = (0, 2 * SPAN, 4 * SPAN);
    let copy = |to: usize, from: usize, bytes: usize| {
        // SAFETY: in bounds of pinned and device memory of this test.
        unsafe { device.copy(stream.raw(), to, from, bytes) }.unwrap();
    };
    for to_slots in [true, false] {
        for (page, slot) in (0..17).flat_map(|page| (0..17).map(move |slot| (page, slot))) {
            for bytes in [1usize, 2, 3, 15, 16, 17, 31, 100, 255, 1000, 4095, 4096] {
                let pattern: Vec<u8> = (0..SPAN).map(|at| (at * 131 + bytes + page * 7 + slot) as u8).collect();
                // SAFETY: in bounds; the stream has passed everything.
                unsafe {
                    base.add(source).copy_from_nonoverlapping(pattern.as_ptr(), SPAN);
                    base.add(target).write_bytes(0xA5, SPAN);
                    let row = base.add(tables).cast::<Row>();
                    row.write(Row { page: device_base as u64, slot: base as u64 });
                    let slot_at = if to_slots { target } else { source } + 16 + slot;
                    let item = Item { page: (16 + page) as u64, slot: slot_at as u64, bytes: bytes as u64 };
                    row.add(1).cast::<Item>().write(item);
                }
                // The device's side starts as the pattern, or as poison.
                copy(device_base, base as usize + if to_slots { source } else { target }, SPAN);
                let (rows, items) = (base as usize + tables, base as usize + tables + 16);
                let launch = Launch { rows, row_count: 1, items, item_count: 1, to_slots, blocks: 1 };
                // SAFETY: the tables name bytes in bounds.
                unsafe { device.launch(stream.raw(), &launch) }.unwrap();
                if !to_slots {
                    copy(base as usize + target, device_base, SPAN);
                }
                end.record(stream.raw()).unwrap();
                end.synchronize().unwrap();
                // SAFETY: in bounds; the stream has passed everything.
                let seen = unsafe { std::slice::from_raw_parts(base.add(target), SPAN) };
                let (from, to) = if to_slots { (16 + page, 16 + slot) } else { (16 + slot, 16 + page) };
                let mut expected = vec![0xA5; SPAN];
                expected[to..to + bytes].copy_from_slice(&pattern[from..from + bytes]);
                assert!(seen == expected, "{bytes} bytes at {page} and {slot}, to slots: {to_slots}");
            }
        }
    }
}

const PAGE: usize = 96 << 10;
const PAGES: usize = 64;

/// An engine, pages of three layers on the GPU, an arena, and the stream of somebody who computes.
struct Bench {
    device: Arc<dyn Device>,
    engine: GpuCopy,
    /// Knows nothing of the copies of the first one.
    other: GpuCopy,
    stream: Stream,
    end: Event,
    region: Region,
    /// What keeps the stream busy, and a source of one value after the other.
    busy: DeviceMemory,
    values: HostMemory,
    arena: Arc<Arena>,
    /// What another block's load brings.
    foreign: Arc<Arena>,
}

const BUSY: usize = 64 << 20;

impl Bench {
    fn new(method: Option<Method>) -> Bench {
        let device = device();
        let options = GpuOptions { method, staging_bytes: 1 << 20, ..GpuOptions::default() };
        let there = DeviceMemory::new(&device, PAGES * PAGE).unwrap();
        let addr = there.addr();
        // SAFETY: the region owns the memory, which only the device touches.
        let region = unsafe { Region::from_raw(addr, PAGES * PAGE, true, Box::new(there)) }.at(Place::Device(0));
        let values = pinned(&device, 2 * PAGES * PAGE);
        let arena = || Arc::new(Arena::cut(pinned(&device, PAGES * PAGE), PAGE).unwrap());
        let (arena, foreign) = (arena(), arena());
        // SAFETY: the slots of an arena follow each other; no transfer is running.
        unsafe { foreign.addr(SlotId(0)).unwrap().as_ptr().write_bytes(0xEE, PAGES * PAGE) };
        Bench {
            engine: GpuCopy::new(Arc::clone(&device), options.clone(), Profile::ASSUMED).unwrap(),
            other: GpuCopy::new(Arc::clone(&device), options, Profile::ASSUMED).unwrap(),
            stream: Stream::new(&device, Priority::Low).unwrap(),
            end: Event::new(&device).unwrap(),
            busy: DeviceMemory::new(&device, 2 * BUSY).unwrap(),
            region,
            values,
            arena,
            foreign,
            device,
        }
    }

    fn pages(&self) -> Pages {
        let layer = PAGE / 3;
        let pattern = Pattern::strided(1, &[3, layer], &[(layer * PAGES) as isize, 1]).unwrap();
        let (region, pattern) = (self.region.clone(), Arc::new(pattern));
        let table = Segment::Table { region, pattern, first: 0, stride: layer as isize, count: PAGES };
        Pages::new(vec![table]).unwrap()
    }

    fn transfer(&self, direction: Direction, pages: Pages) -> Transfer {
        let step = |page: usize| Step { slot: SlotId((PAGES - 1 - page) as u32), page: page as u32 };
        Transfer::new(direction, Arc::clone(&self.arena), (0..PAGES).map(step).collect(), pages).unwrap()
    }

    fn value(&self, which: usize) -> NonNull<u8> {
        // SAFETY: there are two.
        unsafe { self.values.addr().add(which * PAGES * PAGE) }
    }

    /// Some hundred microseconds of work of the stream, then all pages get the bytes of value `which`.
    fn compute(&self, which: usize, rounds: usize) {
        let busy = self.busy.addr().as_ptr() as usize;
        // SAFETY: memory of this bench, in bounds.
        unsafe {
            for _ in 0..rounds {
                self.device.copy(self.stream.raw(), busy, busy + BUSY, BUSY).unwrap();
            }
            let from = self.value(which).as_ptr() as usize;
            self.device.copy(self.stream.raw(), self.region.addr(), from, PAGES * PAGE).unwrap();
        }
    }

    fn set(&self, which: usize, byte: u8) {
        // SAFETY: in bounds; nothing is using it.
        unsafe { self.value(which).as_ptr().write_bytes(byte, PAGES * PAGE) };
    }

    fn slots(&self) -> &mut [u8] {
        // SAFETY: the arena's slots follow each other; no transfer is running when this is used.
        unsafe { std::slice::from_raw_parts_mut(self.arena.addr(SlotId(0)).unwrap().as_ptr(), PAGES * PAGE) }
    }

    fn settle(&self) {
        self.end.record(self.stream.raw()).unwrap();
        self.end.synchronize().unwrap();
    }

    /// Stores what the stream computes, then lets the stream overwrite it; true if the right bytes were stored.
    fn store_between(&self, round: usize, barriers: bool) -> bool {
        let value = (round % 200) as u8 + 1;
        self.set(0, value);
        self.set(1, 0xEE);
        self.slots().fill(0);
        let raw = self.stream.raw();
        self.compute(0, round % 4);
        let pages = if barriers { self.pages().in_stream(raw) } else { self.pages() };
        let (sender, receiver) = mpsc::channel();
        let transfer = self.transfer(Direction::Store, pages);
        self.engine.submit(transfer, Box::new(move |result| sender.send(result).unwrap())).unwrap();
        if barriers {
            self.engine.fence(raw, &self.pages()).unwrap();
        }
        self.compute(1, 0);
        receiver.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
        self.settle();
        self.slots().iter().all(|&byte| byte == value)
    }

    /// Loads behind what the stream does and before what it does next; true if that saw the right bytes.
    fn load_between(&self, round: usize, barriers: bool) -> bool {
        let value = (round % 200) as u8 + 1;
        self.set(1, 0xEE);
        self.slots().fill(value);
        let raw = self.stream.raw();
        self.compute(1, round % 4);
        let pages = if barriers { self.pages().in_stream(raw) } else { self.pages() };
        let (sender, receiver) = mpsc::channel();
        let transfer = self.transfer(Direction::Load, pages);
        self.engine.submit(transfer, Box::new(move |result| sender.send(result).unwrap())).unwrap();
        // What the stream reads next.
        // SAFETY: memory of this bench, in bounds.
        unsafe { self.device.copy(raw, self.value(0).as_ptr() as usize, self.region.addr(), PAGES * PAGE) }.unwrap();
        receiver.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
        self.settle();
        // SAFETY: in bounds; the stream has passed.
        unsafe { std::slice::from_raw_parts(self.value(0).as_ptr(), PAGES * PAGE) }.iter().all(|&byte| byte == value)
    }
}

impl Bench {
    /// Stores what the stream computes, and loads something else into the same pages at once; true if the right bytes were
    /// stored. The barrier is the scoreboard, which another engine does not see.
    fn reuse_behind_store(&self, round: usize, barriers: bool) -> bool {
        let value = (round % 200) as u8 + 1;
        self.set(0, value);
        self.slots().fill(0);
        self.compute(0, round % 4);
        let (sender, receiver) = mpsc::channel();
        let store = self.transfer(Direction::Store, self.pages().in_stream(self.stream.raw()));
        self.engine.submit(store, Box::new(move |result| sender.send(result).unwrap())).unwrap();
        let step = |page: usize| Step { slot: SlotId(page as u32), page: page as u32 };
        let steps = (0..PAGES).map(step).collect();
        let load = Transfer::new(Direction::Load, Arc::clone(&self.foreign), steps, self.pages()).unwrap();
        if barriers {
            self.engine.run(load).unwrap()
        } else {
            self.other.run(load).unwrap()
        }
        receiver.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
        self.settle();
        self.slots().iter().all(|&byte| byte == value)
    }
}

/// Rounds with barriers; `KVORTEX_ORDER_ROUNDS` for the long campaign.
fn rounds() -> usize {
    std::env::var("KVORTEX_ORDER_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(200)
}

fn wrong(rounds: usize, right: impl Fn(usize) -> bool) -> usize {
    (0..rounds).filter(|&round| !right(round)).count()
}

#[test]
#[ignore = "needs a GPU"]
fn order_holds_with_barriers_and_breaks_without() {
    let only = std::env::var("KVORTEX_ORDER_METHOD").ok().filter(|name| !name.is_empty());
    for method in Method::ALL.into_iter().filter(|method| only.as_deref().is_none_or(|only| only == method.name())) {
        let bench = Bench::new(Some(method));
        for (name, broken, kept) in [
            (
                "store",
                wrong(200, |round| bench.store_between(round, false)),
                wrong(rounds(), |round| bench.store_between(round, true)),
            ),
            (
                "load",
                wrong(200, |round| bench.load_between(round, false)),
                wrong(rounds(), |round| bench.load_between(round, true)),
            ),
            (
                "reuse",
                wrong(200, |round| bench.reuse_behind_store(round, false)),
                wrong(rounds(), |round| bench.reuse_behind_store(round, true)),
            ),
        ] {
            println!("{name}, {}: {broken} of 200 wrong without barriers, {kept} of {} with", method.name(), rounds());
            assert!(broken >= 2, "{name}, {method:?}: the test cannot fail");
            assert_eq!(kept, 0, "{name}, {method:?}");
        }
        assert!(bench.engine.stop(Duration::from_secs(60)));
    }
}

#[test]
#[ignore = "needs a GPU"]
fn parts_can_be_awaited_one_by_one() {
    for method in methods() {
        let bench = Bench::new(method);
        let raw = bench.stream.raw();
        for round in 0..50u8 {
            bench.slots().fill(round + 1);
            let parts = Arc::new(Parts::new(vec![PAGE / 3, PAGE / 3 * 2, PAGE]).unwrap());
            let pages = bench.pages().in_stream(raw).in_parts(Arc::clone(&parts));
            let (sender, receiver) = mpsc::channel();
            let transfer = bench.transfer(Direction::Load, pages);
            bench.engine.submit(transfer, Box::new(move |result| sender.send(result).unwrap())).unwrap();
            let layer = PAGES * PAGE / 3;
            for part in 0..3 {
                parts.hold(part, raw).unwrap();
                let to = bench.value(0).as_ptr() as usize + part * layer;
                // SAFETY: memory of this bench, in bounds.
                unsafe { bench.device.copy(raw, to, bench.region.addr() + part * layer, layer) }.unwrap();
            }
            receiver.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
            bench.settle();
            // SAFETY: in bounds; the stream has passed.
            let seen = unsafe { std::slice::from_raw_parts(bench.value(0).as_ptr(), PAGES * PAGE) };
            assert!(seen.iter().all(|&byte| byte == round + 1), "{method:?}, round {round}");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn it_keeps_the_contract_of_a_device() {
    device_conforms(&device());
}

#[test]
#[ignore = "needs a GPU, which it ruins for this process: run it alone"]
fn a_lost_gpu_fails_what_is_unfinished_and_refuses_more() {
    let bench = Bench::new(None);
    let raw = bench.stream.raw();
    bench.slots().fill(1);
    let tables = pinned(&bench.device, 4096);
    let at = tables.addr().as_ptr();
    // SAFETY: in bounds. The row leads nowhere, on purpose.
    unsafe {
        at.cast::<Row>().write(Row { page: 0x10, slot: 0x10 });
        at.add(16).cast::<Item>().write(Item { page: 0, slot: 4096, bytes: 64 });
    }
    let launch =
        Launch { rows: at as usize, row_count: 1, items: at as usize + 16, item_count: 1, to_slots: true, blocks: 1 };
    bench.compute(0, 50);
    // SAFETY: an illegal address, which ends the context; that is the test.
    unsafe { bench.device.launch(raw, &launch) }.unwrap();
    let mut ends = Vec::new();
    for _ in 0..8 {
        let (sender, receiver) = mpsc::channel();
        let transfer = bench.transfer(Direction::Store, bench.pages().in_stream(raw));
        if bench.engine.submit(transfer, Box::new(move |result| sender.send(result).unwrap())).is_ok() {
            ends.push(receiver);
        }
    }
    for end in ends {
        let result = end.recv_timeout(Duration::from_secs(60)).expect("an end");
        assert!(matches!(result, Err(MemError::DeviceLost { .. })), "{result:?}");
    }
    let refused = bench.engine.run(bench.transfer(Direction::Load, bench.pages()));
    assert!(matches!(refused, Err(MemError::DeviceLost { .. })), "{refused:?}");
    assert!(bench.engine.stop(Duration::from_secs(10)));
}
