//! The copies of a GPU on the simulated device, which runs streams in random order and checks every address.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use super::program::{self, Halves, Op, Program, Task};
use super::*;
use crate::arena::Arena;
use crate::copy::suite::{DeviceWorld, World, conforms_in};
use crate::copy::{Direction, Step};
use crate::device::{Priority, Stream};
use crate::map::{HostMemory, MapOptions};
use crate::sim::{Sim, SimOptions};
use crate::slots::SlotId;
use crate::span::{Parts, Pattern, Piece, Region, Segment};

const PAGE: usize = 24 << 10;
const PAGES: usize = 16;

/// A device, an engine on it, one region of pages of three layers, and an arena.
struct Bench {
    sim: Arc<Sim>,
    engine: GpuCopy,
    world: DeviceWorld,
    region: Region,
    arena: Arc<Arena>,
    stream: Stream,
}

/// Everything is small, so that transfers take several flights and buffers.
fn options(method: Option<Method>) -> GpuOptions {
    GpuOptions {
        method,
        staging_bytes: 64 << 10,
        flight_bytes: 256 << 10,
        first_bytes: 128 << 10,
        background_bytes: 128 << 10,
        ..GpuOptions::default()
    }
}

impl Bench {
    fn new(seed: u64, options: GpuOptions) -> Bench {
        let sim = Sim::new(seed);
        let device: Arc<dyn Device> = sim.clone();
        let engine = GpuCopy::new(Arc::clone(&device), options, Profile::ASSUMED).unwrap();
        let world = DeviceWorld::new(&device);
        let region = world.region(&vec![0; PAGES * PAGE], true);
        let arena = arena(&world, PAGES);
        Bench { stream: Stream::new(&device, Priority::Low).unwrap(), sim, engine, world, region, arena }
    }

    /// Pages of three fragments, one in each third of the region.
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

    /// Lets the engine's owner write all its pages in the order of its stream.
    fn compute(&self, value: u8) {
        let (addr, len) = (self.region.addr(), self.region.len());
        self.sim.compute(self.stream.raw(), move || {
            std::thread::sleep(Duration::from_micros(200));
            // SAFETY: memory of the simulation, which the bench keeps until the simulation is idle.
            unsafe { std::slice::from_raw_parts_mut(addr as *mut u8, len) }.fill(value);
        });
    }

    fn slots_hold(&self, value: u8) -> bool {
        (0..PAGES).all(|slot| slot_bytes(&self.arena, slot).iter().all(|&byte| byte == value))
    }

    fn fill_slots(&self, value: u8) {
        (0..PAGES).for_each(|slot| {
            let addr = self.arena.addr(SlotId(slot as u32)).unwrap();
            // SAFETY: a slot of the arena; no transfer is running.
            unsafe { addr.as_ptr().write_bytes(value, PAGE) };
        });
    }

    fn check(self) {
        assert!(self.engine.stop(Duration::from_secs(60)), "copies did not end");
        self.sim.idle();
        assert_eq!(self.sim.violations(), Vec::<String>::new());
    }
}

fn arena(world: &DeviceWorld, slots: usize) -> Arc<Arena> {
    let options = MapOptions { bytes: slots * PAGE, huge_pages: false, numa_node: None, touch_threads: 1 };
    let mut memory = HostMemory::map(&options).unwrap();
    world.pin(&mut memory);
    Arc::new(Arena::cut(memory, PAGE).unwrap())
}

fn slot_bytes(arena: &Arena, slot: usize) -> Vec<u8> {
    let addr: NonNull<u8> = arena.addr(SlotId(slot as u32)).unwrap();
    // SAFETY: a slot of the arena; no transfer is running.
    unsafe { std::slice::from_raw_parts(addr.as_ptr(), PAGE) }.to_vec()
}

fn methods() -> impl Iterator<Item = Option<Method>> {
    Method::ALL.into_iter().map(Some).chain([None])
}

fn ignored() -> Done {
    Box::new(|_| ())
}

#[test]
fn every_method_conforms() {
    for (index, method) in methods().enumerate() {
        for streams in [1, 2, 3, 4].into_iter().skip(index).step_by(2) {
            let sim = Sim::new(streams as u64);
            let device: Arc<dyn Device> = sim.clone();
            let options = GpuOptions { streams, method, staging_bytes: 1 << 20, ..GpuOptions::default() };
            let world = DeviceWorld::new(&device);
            conforms_in(&world, || {
                Arc::new(GpuCopy::new(Arc::clone(&device), options.clone(), Profile::ASSUMED).unwrap())
            });
            assert_eq!(sim.violations(), Vec::<String>::new(), "{method:?} with {streams} streams");
        }
    }
}

#[test]
fn a_store_waits_for_the_compute_before_it_and_not_for_the_compute_behind_a_fence() {
    for (seed, method) in (0..10).flat_map(|seed| methods().map(move |method| (seed, method))) {
        let bench = Bench::new(seed, options(method));
        let (raw, value) = (bench.stream.raw(), seed as u8 + 1);
        bench.compute(value);
        let pages = bench.pages().in_stream(raw);
        let pages = if seed % 2 == 0 { pages } else { pages.in_background() };
        bench.engine.submit(bench.transfer(Direction::Store, pages), ignored()).unwrap();
        bench.engine.fence(raw, &bench.pages()).unwrap();
        bench.compute(0xEE);
        assert!(bench.engine.stop(Duration::from_secs(60)));
        assert!(bench.slots_hold(value), "{method:?}, seed {seed}: other bytes were stored");
        bench.check();
    }
}

#[test]
fn without_the_fence_other_bytes_are_stored() {
    let mut wrong = 0;
    for seed in 0..20 {
        let bench = Bench::new(seed, options(Some(Method::Dma)));
        bench.compute(7);
        bench
            .engine
            .submit(bench.transfer(Direction::Store, bench.pages().in_stream(bench.stream.raw())), ignored())
            .unwrap();
        bench.compute(0xEE);
        assert!(bench.engine.stop(Duration::from_secs(60)));
        wrong += usize::from(!bench.slots_hold(7));
        bench.check();
    }
    assert!(wrong > 0, "the simulation does not show the race that the fence prevents");
}

#[test]
fn a_load_comes_before_what_its_stream_does_next() {
    for (seed, method) in (0..10).flat_map(|seed| methods().map(move |method| (seed, method))) {
        let bench = Bench::new(seed, options(method));
        let (raw, value) = (bench.stream.raw(), seed as u8 + 1);
        bench.fill_slots(value);
        bench.compute(0xEE);
        bench.engine.submit(bench.transfer(Direction::Load, bench.pages().in_stream(raw)), ignored()).unwrap();
        let (sender, receiver) = mpsc::channel();
        let (addr, len) = (bench.region.addr(), bench.region.len());
        bench.sim.compute(raw, move || {
            // SAFETY: memory of the simulation, which the bench keeps.
            sender.send(unsafe { std::slice::from_raw_parts(addr as *const u8, len) }.to_vec()).unwrap();
        });
        let seen = receiver.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(seen.iter().all(|&byte| byte == value), "{method:?}, seed {seed}: the stream saw other bytes");
        bench.check();
    }
}

#[test]
fn parts_are_complete_one_by_one() {
    for (seed, method) in (0..6).flat_map(|seed| methods().map(move |method| (seed, method))) {
        let bench = Bench::new(seed, options(method));
        let raw = bench.stream.raw();
        bench.fill_slots(9);
        let parts = Arc::new(Parts::new(vec![PAGE / 3, PAGE / 3 * 2, PAGE]).unwrap());
        assert!(parts.hold(0, raw).is_err(), "nothing was submitted yet");
        let pages = bench.pages().in_stream(raw).in_parts(Arc::clone(&parts));
        bench.engine.submit(bench.transfer(Direction::Load, pages), ignored()).unwrap();
        let (sender, receiver) = mpsc::channel();
        let layer = bench.region.len() / 3;
        for part in 0..3 {
            parts.hold(part, raw).unwrap();
            let (sender, addr) = (sender.clone(), bench.region.addr() + part * layer);
            bench.sim.compute(raw, move || {
                // SAFETY: memory of the simulation, which the bench keeps.
                let bytes = unsafe { std::slice::from_raw_parts(addr as *const u8, layer) };
                sender.send(bytes.iter().all(|&byte| byte == 9)).unwrap();
            });
        }
        for part in 0..3 {
            assert!(receiver.recv_timeout(Duration::from_secs(60)).unwrap(), "{method:?}: part {part} was not there");
        }
        bench.check();
    }
}

#[test]
fn the_same_bytes_of_neighbouring_slots_are_one_copy() {
    for seed in 0..6 {
        let bench = Bench::new(seed, GpuOptions { staging_bytes: 1 << 20, ..options(Some(Method::Staged)) });
        let raw = bench.stream.raw();
        (0..PAGES).for_each(|slot| {
            let addr = bench.arena.addr(SlotId(slot as u32)).unwrap();
            // SAFETY: a slot of the arena; no transfer is running.
            let bytes = unsafe { std::slice::from_raw_parts_mut(addr.as_ptr(), PAGE) };
            bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (slot * 7 + at / (PAGE / 3)) as u8);
        });
        let before: Vec<_> = (0..PAGES).map(|slot| slot_bytes(&bench.arena, slot)).collect();
        let parts = Arc::new(Parts::new(vec![PAGE / 3, PAGE / 3 * 2, PAGE]).unwrap());
        let pages = bench.pages().in_stream(raw).in_parts(Arc::clone(&parts));
        let copies = bench.sim.counts().copies;
        bench.engine.run(bench.transfer(Direction::Load, pages)).unwrap();
        // One for each part, and one that brings the tables.
        assert_eq!(bench.sim.counts().copies - copies, 4);
        bench.fill_slots(0);
        bench.engine.run(bench.transfer(Direction::Store, bench.pages())).unwrap();
        let after: Vec<_> = (0..PAGES).map(|slot| slot_bytes(&bench.arena, slot)).collect();
        assert!(before == after, "seed {seed}: other bytes came back");
        bench.check();
    }
}

/// The most bytes that the copy engine is given without a moment in which it has to wait for another stream.
fn most_at_once(bench: &Bench, direction: Direction, method: Method, piece: Option<usize>) -> usize {
    let transfer = bench.transfer(direction, bench.pages());
    let task = Task { transfer: &transfer, steps: 0..PAGES, method, in_rows: method == Method::Staged, piece };
    let (slot, mut program) = (task.slot_role(), Program::default());
    let halves = Halves { addrs: [1 << 20, 2 << 20], bytes: 128 << 10, next: 0 };
    program.add(&task, &[0..PAGE / 3, PAGE / 3..PAGE], false, &mut { halves });
    // How many copies a stream knows to have ended.
    let (mut known, mut copies, mut at_once, mut most) = ([0; 4], 0, 0, 0);
    for op in &program.ops {
        let bytes = match *op {
            Op::Order { first, then } => {
                let ended = if first == slot { copies } else { known[first as usize] };
                known[then as usize] = ended.max(known[then as usize]);
                continue;
            }
            Op::Copy { on, bytes, .. } if on == slot => bytes,
            Op::CopyRows { on, ref copy } if on == slot => copy.bytes * copy.rows,
            _ => continue,
        };
        at_once = if known[slot as usize] == copies { bytes } else { at_once + bytes };
        (copies, most) = (copies + 1, most.max(at_once));
    }
    most
}

#[test]
fn copies_in_the_background_leave_the_copy_engine_to_others() {
    let bench = Bench::new(4, options(None));
    for direction in [Direction::Store, Direction::Load] {
        for method in [Method::Dma, Method::Staged] {
            for piece in [8 << 10, 40 << 10, 64 << 10] {
                let most = most_at_once(&bench, direction, method, Some(piece));
                assert!((piece / 2..=piece).contains(&most), "{direction:?}, {method:?}: {most} of {piece}");
            }
        }
        assert_eq!(most_at_once(&bench, direction, Method::Dma, None), PAGES * PAGE);
    }
    bench.check();
}

#[test]
fn conflicting_transfers_go_in_order() {
    for (seed, method) in (0..10).flat_map(|seed| methods().map(move |method| (seed, method))) {
        let bench = Bench::new(seed, options(method));
        bench.fill_slots(3);
        let other = arena(&bench.world, PAGES);
        for _ in 0..4 {
            bench.engine.submit(bench.transfer(Direction::Load, bench.pages()), ignored()).unwrap();
            let steps = (0..PAGES).map(|page| Step { slot: SlotId(page as u32), page: page as u32 }).collect();
            let store = Transfer::new(Direction::Store, Arc::clone(&other), steps, bench.pages()).unwrap();
            bench.engine.submit(store, ignored()).unwrap();
        }
        assert!(bench.engine.stop(Duration::from_secs(60)));
        let stored = (0..PAGES).all(|slot| slot_bytes(&other, slot).iter().all(|&byte| byte == 3));
        assert!(stored, "{method:?}, seed {seed}: stored before it was loaded");
        bench.check();
    }
}

#[test]
fn tickets_end_in_order_and_watermarks_say_so() {
    let bench = Bench::new(5, options(None));
    let (sender, receiver) = mpsc::channel();
    let mut tickets = Vec::new();
    for index in 0..100 {
        let sender = sender.clone();
        let done: Done = Box::new(move |result| sender.send((index, result.is_ok())).unwrap());
        tickets.push(bench.engine.submit_ticket(bench.transfer(Direction::Store, bench.pages()), done).unwrap());
    }
    assert!(bench.engine.stop(Duration::from_secs(60)));
    let ends: Vec<_> = receiver.try_iter().collect();
    assert_eq!(ends, (0..100).map(|index| (index, true)).collect::<Vec<_>>());
    assert!(tickets.is_sorted());
    assert_eq!(bench.engine.board(Lane::Store).watermark(), tickets[99]);
    assert_eq!(bench.engine.board(Lane::Load).watermark(), 0);
    assert_eq!(bench.engine.board(Lane::Store).failures(), 0);
    bench.check();
}

#[test]
fn a_load_overtakes_loads_in_the_background() {
    let bench = Bench::new(11, options(Some(Method::Dma)));
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let others: Vec<_> = (0..30).map(|_| bench.world.region(&vec![0; PAGES * PAGE], true)).collect();
    bench.sim.pause();
    let tell = |name: &'static str| -> Done {
        let order = Arc::clone(&order);
        Box::new(move |_| order.lock().push(name))
    };
    for other in others {
        let pages = Pages::contiguous(other, PAGES).unwrap().in_background();
        bench.engine.submit(bench.transfer(Direction::Load, pages), tell("background")).unwrap();
    }
    bench.engine.submit(bench.transfer(Direction::Load, bench.pages()), tell("step")).unwrap();
    bench.sim.resume();
    assert!(bench.engine.stop(Duration::from_secs(60)));
    let place = order.lock().iter().position(|&name| name == "step").unwrap();
    assert!(place <= 4, "the load came after {place} loads in the background");
    bench.check();
}

#[test]
fn a_failed_call_fails_its_transfer_alone() {
    for call in ["copy", "launch", "record", "wait", "create_event"] {
        for (index, method) in methods().enumerate() {
            let bench = Bench::new(index as u64, options(method));
            bench.fill_slots(1);
            bench.sim.fail_next(call, 1);
            let outcome = bench.engine.run(bench.transfer(Direction::Load, bench.pages()));
            if bench.sim.check().is_ok() && outcome.is_err() {
                assert!(!matches!(outcome, Err(MemError::Stopped)), "{call}: {outcome:?}");
            }
            bench.sim.fail_next(call, 0);
            if !matches!(outcome, Err(MemError::DeviceLost { .. })) {
                bench.engine.run(bench.transfer(Direction::Load, bench.pages())).unwrap();
                assert!(bench.world.bytes(&bench.region).iter().all(|&byte| byte == 1), "{call}, {method:?}");
            }
            assert!(bench.engine.stop(Duration::from_secs(60)), "{call}: copies did not end");
        }
    }
}

#[test]
fn a_lost_device_fails_everything_and_still_stops() {
    for method in methods() {
        let bench = Bench::new(2, options(method));
        let failed = Arc::new(AtomicUsize::new(0));
        bench.sim.pause();
        for index in 0..12 {
            let failed = Arc::clone(&failed);
            let done: Done = Box::new(move |result| {
                assert!(matches!(result, Err(MemError::DeviceLost { .. })), "{result:?}");
                failed.fetch_add(1, Ordering::SeqCst);
            });
            let direction = if index % 2 == 0 { Direction::Store } else { Direction::Load };
            bench.engine.submit(bench.transfer(direction, bench.pages()), done).unwrap();
        }
        bench.sim.lose("an illegal address");
        bench.sim.resume();
        assert!(bench.engine.stop(Duration::from_secs(60)), "copies on a lost device did not end");
        assert_eq!(failed.load(Ordering::SeqCst), 12);
        let refused = bench.engine.run(bench.transfer(Direction::Store, bench.pages()));
        assert!(matches!(refused, Err(MemError::DeviceLost { .. })), "{refused:?}");
        assert_eq!(bench.engine.board(Lane::Store).failures(), 6);
    }
}

#[test]
fn memory_of_the_host_is_refused() {
    let bench = Bench::new(1, options(None));
    let host = Pages::contiguous(Region::from_vec(vec![0; PAGES * PAGE]), PAGES).unwrap();
    let refused = bench.engine.run(bench.transfer(Direction::Store, host));
    assert!(matches!(refused, Err(MemError::WrongPlace { .. })), "{refused:?}");
    bench.check();
}

#[test]
fn the_link_is_measured() {
    let device: Arc<dyn Device> = Sim::new(1);
    let profile = GpuCopy::calibrate(&device).unwrap();
    for rates in [profile.store, profile.load] {
        assert!(rates.link > 0.0 && rates.kernel > 0.0 && rates.copy_us > 0.0 && rates.staged_us > 0.0, "{rates:?}");
    }
}

#[test]
fn parts_of_unequal_length_bring_each_byte_to_its_place() {
    // Two are equally long; each takes several buffers, the last of which is not full.
    let ends = [4 << 10, 9 << 10, 13 << 10, PAGE];
    for (seed, method) in (0..6).flat_map(|seed| methods().map(move |method| (seed, method))) {
        let bench = Bench::new(seed, GpuOptions { staging_bytes: 30 << 10, ..options(method) });
        (0..PAGES).for_each(|slot| {
            let addr = bench.arena.addr(SlotId(slot as u32)).unwrap();
            // SAFETY: a slot of the arena; no transfer is running.
            let bytes = unsafe { std::slice::from_raw_parts_mut(addr.as_ptr(), PAGE) };
            bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = byte_of(slot, at));
        });
        let parts = Arc::new(Parts::new(ends.to_vec()).unwrap());
        let pages = bench.pages().in_stream(bench.stream.raw()).in_parts(parts);
        bench.engine.run(bench.transfer(Direction::Load, pages)).unwrap();
        let found = bench.world.bytes(&bench.region);
        let pages = bench.pages();
        for page in 0..PAGES {
            let mut at = 0;
            pages.for_each_run(page, |addr, len| {
                let start = addr as usize - bench.region.addr();
                let is_right = (0..len).all(|byte| found[start + byte] == byte_of(PAGES - 1 - page, at + byte));
                assert!(is_right, "{method:?}, seed {seed}: page {page} has other bytes at {at}");
                at += len;
            });
        }
        bench.check();
    }
}

/// What lies at `at` of a slot: others elsewhere in it, and in the other slots.
fn byte_of(slot: usize, at: usize) -> u8 {
    (slot * 131 + at / 256 * 29 + at * 7) as u8
}

#[test]
fn parts_of_a_load_that_are_equally_long_share_their_rows() {
    let bench = Bench::new(3, options(None));
    let transfer = bench.transfer(Direction::Load, bench.pages());
    let task = Task { transfer: &transfer, steps: 0..PAGES, method: Method::Staged, in_rows: true, piece: None };
    let third = PAGE / 3;
    let mut program = Program::default();
    let halves = &mut Halves { addrs: [1 << 20, 2 << 20], bytes: 128 << 10, next: 0 };
    program.add(&task, &[0..third, third..2 * third, 2 * third..PAGE], true, halves);
    let mut rows: Vec<_> = program
        .ops
        .iter()
        .filter_map(|op| if let Op::Launch { rows, .. } = op { Some(rows.start) } else { None })
        .collect();
    assert_eq!(rows.len(), 3);
    rows.dedup();
    assert_eq!(rows.len(), 1);
    bench.check();
}

#[test]
fn beside_computation_multiprocessors_are_left_to_it() {
    let bench = Bench::new(9, options(None));
    let in_parts = |pages: Pages| pages.in_parts(Arc::new(Parts::new(vec![PAGE / 3, PAGE]).unwrap()));
    let faster = Rates { kernel: 1.2 * Profile::ASSUMED.load.link, ..Profile::ASSUMED.load };
    let way = |direction: Direction, pages: Pages| {
        let transfer = bench.transfer(direction, pages);
        let task = Task { transfer: &transfer, steps: 0..PAGES, method: Method::Dma, in_rows: true, piece: None };
        let Shape { beside, .. } = program::shape(&task, 32 << 20, 1);
        faster.choose(&Shape { bytes: 1 << 30, fragments: 1 << 14, slots: 33, rows: 1, beside }, true)
    };
    assert_eq!(way(Direction::Load, bench.pages()), Method::Kernel);
    assert_eq!(way(Direction::Load, bench.pages().in_background()), Method::Staged);
    assert_eq!(way(Direction::Load, in_parts(bench.pages())), Method::Staged);
    assert_eq!(way(Direction::Store, bench.pages()), Method::Staged);
    bench.check();
}

/// Costs at which many fragments are staged and few are copied one by one, never by the kernel alone.
fn engine_or_staging() -> Profile {
    let rates = |rates: Rates| Rates { kernel: 1.0, ..rates };
    Profile { store: rates(Profile::ASSUMED.store), load: rates(Profile::ASSUMED.load) }
}

#[test]
fn a_transfer_ends_with_all_of_its_flights_whichever_way_each_went() {
    let mut ways = (0, 0);
    for seed in 0..40 {
        let sim = Sim::new(seed);
        let device: Arc<dyn Device> = sim.clone();
        let (world, stream) = (DeviceWorld::new(&device), Stream::new(&device, Priority::Low).unwrap());
        let engine = GpuCopy::new(Arc::clone(&device), options(None), engine_or_staging()).unwrap();
        let (region, arena) = (world.region(&vec![0; PAGES * PAGE], true), arena(&world, PAGES));
        (0..PAGES).for_each(|slot| {
            // SAFETY: a slot of the arena; no transfer is running.
            unsafe { arena.addr(SlotId(slot as u32)).unwrap().as_ptr().write_bytes(seed as u8 + 1, PAGE) };
        });
        // The first flight is of 10 pages of fragments, which lie in another order than their bytes; the rest is one run.
        let whole = Arc::new(Pattern::contiguous(PAGE));
        let scattered = Arc::new(Pattern::strided(1, &[PAGE / 32, 32], &[-32, 1]).unwrap());
        let piece = |page: usize| {
            let (offset, pattern) =
                if page < 10 { ((page + 1) * PAGE - 32, &scattered) } else { (page * PAGE, &whole) };
            Piece { region: region.clone(), offset: offset as isize, pattern: Arc::clone(pattern) }
        };
        let pages = Pages::new(vec![Segment::List((0..PAGES).map(piece).collect())]).unwrap();
        let steps = (0..PAGES).map(|page| Step { slot: SlotId(page as u32), page: page as u32 });
        let load = Transfer::new(Direction::Load, arena, steps.collect(), pages.in_stream(stream.raw())).unwrap();
        engine.submit(load, ignored()).unwrap();
        let (sender, receiver) = mpsc::channel();
        let (addr, len) = (region.addr(), region.len());
        sim.compute(stream.raw(), move || {
            // SAFETY: memory of the simulation, which this test keeps.
            sender.send(unsafe { std::slice::from_raw_parts(addr as *const u8, len) }.to_vec()).unwrap();
        });
        let seen = receiver.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(seen.iter().all(|&byte| byte == seed as u8 + 1), "seed {seed}: the stream saw other bytes");
        assert!(engine.stop(Duration::from_secs(60)));
        ways = (ways.0 + sim.counts().launches, ways.1 + sim.counts().copies);
        assert_eq!(sim.violations(), Vec::<String>::new());
    }
    assert!(ways.0 > 0 && ways.1 > ways.0, "only one way was taken: {ways:?}");
}

#[test]
fn a_load_that_failed_halfway_ends_after_what_it_had_started() {
    let bench = Bench::new(1, options(Some(Method::Staged)));
    // Between what fills the staging buffer, and is held up, and what empties it.
    bench.sim.fail_next("record", 1);
    bench.sim.hold_copies(PAGE);
    let (sender, receiver) = mpsc::channel();
    let load = bench.transfer(Direction::Load, bench.pages());
    bench.engine.submit(load, Box::new(move |result| sender.send(result).unwrap())).unwrap();
    let early = receiver.recv_timeout(Duration::from_millis(100));
    bench.sim.hold_copies(usize::MAX);
    assert!(early.is_err(), "the end was told while a copy still read the slots: {early:?}");
    assert!(matches!(receiver.recv_timeout(Duration::from_secs(60)).unwrap(), Err(MemError::CopyFailed(_))));
    bench.check();
}

#[test]
fn without_memory_for_staging_transfers_go_another_way() {
    for maps_host in [true, false] {
        let sim = Sim::with(&SimOptions { seed: 1, maps_host, memory_bytes: 64 << 20 });
        let device: Arc<dyn Device> = sim.clone();
        let options = GpuOptions { method: Some(Method::Staged), staging_bytes: 1 << 30, ..GpuOptions::default() };
        let world = DeviceWorld::new(&device);
        conforms_in(&world, || Arc::new(GpuCopy::new(Arc::clone(&device), options.clone(), Profile::ASSUMED).unwrap()));
        assert_eq!(sim.violations(), Vec::<String>::new());
        assert_eq!(sim.counts().launches > 0, maps_host, "{:?}", sim.counts());
    }
}

#[test]
fn two_engines_share_a_device() {
    for seed in 0..6 {
        let bench = Bench::new(seed, options(None));
        let other = GpuCopy::new(Arc::clone(bench.engine.device()), options(None), Profile::ASSUMED).unwrap();
        let raw = bench.stream.raw();
        bench.compute(5);
        bench.engine.submit(bench.transfer(Direction::Store, bench.pages().in_stream(raw)), ignored()).unwrap();
        bench.engine.fence(raw, &bench.pages()).unwrap();
        bench.compute(6);
        let second = arena(&bench.world, PAGES);
        let steps = (0..PAGES).map(|page| Step { slot: SlotId(page as u32), page: page as u32 }).collect();
        let store = Transfer::new(Direction::Store, Arc::clone(&second), steps, bench.pages().in_stream(raw));
        other.run(store.unwrap()).unwrap();
        assert!((0..PAGES).all(|slot| slot_bytes(&second, slot).iter().all(|&byte| byte == 6)));
        assert!(other.stop(Duration::from_secs(60)) && bench.engine.stop(Duration::from_secs(60)));
        assert!(bench.slots_hold(5), "seed {seed}");
        bench.check();
    }
}

#[test]
fn a_load_waits_for_the_store_that_still_reads_its_pages() {
    let mut wrong = [0; 2];
    for seed in 0..40 {
        // A second engine knows nothing of the first one's stores: that is the barrier taken away.
        for (ordered, wrong) in [true, false].into_iter().zip(&mut wrong) {
            let bench = Bench::new(seed, options(Some(Method::Dma)));
            let other = GpuCopy::new(Arc::clone(bench.engine.device()), options(None), Profile::ASSUMED).unwrap();
            let (raw, source) = (bench.stream.raw(), arena(&bench.world, PAGES));
            (0..PAGES).for_each(|slot| {
                // SAFETY: a slot of the arena; no transfer is running.
                unsafe { source.addr(SlotId(slot as u32)).unwrap().as_ptr().write_bytes(0xEE, PAGE) };
            });
            bench.compute(7);
            bench.engine.submit(bench.transfer(Direction::Store, bench.pages().in_stream(raw)), ignored()).unwrap();
            let steps = (0..PAGES).map(|page| Step { slot: SlotId(page as u32), page: page as u32 }).collect();
            let load = Transfer::new(Direction::Load, source, steps, bench.pages()).unwrap();
            if ordered {
                bench.engine.run(load).unwrap()
            } else {
                other.run(load).unwrap()
            }
            assert!(bench.engine.stop(Duration::from_secs(60)));
            *wrong += usize::from(!bench.slots_hold(7));
            drop(other);
            bench.check();
        }
    }
    assert_eq!(wrong[0], 0, "a page was overwritten while it was stored");
    assert!(wrong[1] > 0, "the simulation does not show the race that the scoreboard prevents");
}
