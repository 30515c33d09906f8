//! Copies between the pages of a GPU and pinned slots, beside one contiguous copy of the same run.
//!
//! Run on a machine with a GPU: `cargo bench --bench gpu`. It prints tables; there is nothing to compare with on other machines.

#![expect(clippy::print_stdout, reason = "its output is the result")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvortex_mem::MemError;
use kvortex_mem::arena::Arena;
use kvortex_mem::copy::gpu::{GpuCopy, GpuOptions, Method, Profile};
use kvortex_mem::copy::{CopyEngine, Direction, Step, Transfer};
use kvortex_mem::cuda::Cuda;
use kvortex_mem::device::{Device, DeviceMemory, Event, Priority, RawStream, Stream};
use kvortex_mem::map::{HostMemory, MapOptions};
use kvortex_mem::slots::SlotId;
use kvortex_mem::span::{Pages, Pattern, Place, Region, Segment};

type Result<T> = std::result::Result<T, MemError>;

const BLOCKS: usize = 2000;
const RUNS: usize = 5;
const MIB: usize = 1 << 20;

/// One layout: `tensors` tensors, in each of which a block has one fragment.
struct Layout {
    name: &'static str,
    fragment: usize,
    tensors: usize,
}

const LAYOUTS: [Layout; 5] = [
    Layout { name: "16 KiB x 64", fragment: 16 << 10, tensors: 64 },
    Layout { name: "32 KiB x 64", fragment: 32 << 10, tensors: 64 },
    Layout { name: "64 KiB x 32", fragment: 64 << 10, tensors: 32 },
    Layout { name: "256 KiB x 8", fragment: 256 << 10, tensors: 8 },
    Layout { name: "1 MiB x 2", fragment: MIB, tensors: 2 },
];

impl Layout {
    fn block(&self) -> usize {
        self.fragment * self.tensors
    }
}

/// A GPU with room for blocks, and a pinned arena.
struct Bench {
    device: Arc<dyn Device>,
    region: Region,
    memory: Option<HostMemory>,
}

const ROOM: usize = BLOCKS * 2 * MIB;

impl Bench {
    fn new() -> Result<Bench> {
        let device: Arc<dyn Device> = Cuda::open(0)?;
        println!("{:?}", device.info());
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let start = Instant::now();
        let options = MapOptions {
            bytes: 2 * ROOM,
            huge_pages: true,
            numa_node: device.info().numa_node,
            touch_threads: threads,
        };
        let mut memory = HostMemory::map(&options)?;
        let mapped = start.elapsed();
        memory.pin(&device)?;
        let gib = (2 * ROOM) as f64 / f64::from(1 << 30);
        println!("mapped {gib:.1} GiB in {mapped:?}, with page-locking {:?}", start.elapsed());
        let there = DeviceMemory::new(&device, 2 * ROOM)?;
        let addr = there.addr();
        // SAFETY: the region owns the memory, which only the device touches.
        let region = unsafe { Region::from_raw(addr, 2 * ROOM, true, Box::new(there)) }.at(Place::Device(0));
        Ok(Bench { device, region, memory: Some(memory) })
    }

    /// Bytes per nanosecond of one long copy each way, and of both at once, together.
    fn peaks(&self) -> Result<(f64, f64, f64)> {
        let (host, there) = (self.memory.as_ref().expect("not cut").addr().as_ptr() as usize, self.region.addr());
        let bytes = 512 * MIB;
        let down = || (host, there, bytes);
        let up = || (there + ROOM, host + ROOM, bytes);
        Ok((self.rate(&[down()])?, self.rate(&[up()])?, self.rate(&[down(), up()])?))
    }

    /// The median of several times for copies of (to, from, bytes), each on a stream of its own.
    fn rate(&self, copies: &[(usize, usize, usize)]) -> Result<f64> {
        let streams: Vec<_> =
            copies.iter().map(|_| Stream::new(&self.device, Priority::High)).collect::<Result<_>>()?;
        let ends: Vec<_> = copies.iter().map(|_| Event::new(&self.device)).collect::<Result<_>>()?;
        let mut rates = Vec::new();
        for _ in 0..RUNS {
            let start = Instant::now();
            for ((stream, end), &(to, from, bytes)) in streams.iter().zip(&ends).zip(copies) {
                for _ in 0..4 {
                    // SAFETY: both ranges are in bounds of pinned and device memory that nothing else uses.
                    unsafe { self.device.copy(stream.raw(), to, from, bytes)? };
                }
                end.record(stream.raw())?;
            }
            ends.iter().try_for_each(Event::synchronize)?;
            let bytes: usize = copies.iter().map(|copy| 4 * copy.2).sum();
            rates.push(bytes as f64 / start.elapsed().as_nanos() as f64);
        }
        Ok(median(rates))
    }

    fn arena(&mut self, layout: &Layout) -> Result<Arc<Arena>> {
        Ok(Arc::new(Arena::cut(self.memory.take().expect("cut once at a time"), layout.block())?))
    }

    fn pages(&self, layout: &Layout) -> Result<Pages> {
        let pattern = Arc::new(Pattern::contiguous(layout.fragment));
        let table = |tensor: usize| Segment::Table {
            region: self.region.clone(),
            pattern: Arc::clone(&pattern),
            first: (tensor * 2 * BLOCKS * layout.fragment) as isize,
            stride: layout.fragment as isize,
            count: 2 * BLOCKS,
        };
        Pages::new((0..layout.tensors).map(table).collect())
    }

    /// Blocks `blocks`, shuffled on both sides.
    fn transfer(
        &self,
        direction: Direction,
        (layout, arena): (&Layout, &Arc<Arena>),
        blocks: std::ops::Range<usize>,
        stream: Option<RawStream>,
    ) -> Result<Transfer> {
        let spread = |index: usize| blocks.start + (index * 7919) % blocks.len();
        let steps = (0..blocks.len())
            .map(|index| Step { slot: SlotId(spread(index) as u32), page: spread(blocks.len() - 1 - index) as u32 })
            .collect();
        let pages = self.pages(layout)?;
        let pages = match stream {
            Some(stream) => pages.in_stream(stream),
            None => pages,
        };
        Transfer::new(direction, Arc::clone(arena), steps, pages)
    }
}

fn engine(
    bench: &Bench,
    profile: Profile,
    method: Option<Method>,
    change: impl Fn(&mut GpuOptions),
) -> Result<GpuCopy> {
    let mut options = GpuOptions { method, ..GpuOptions::default() };
    change(&mut options);
    GpuCopy::new(Arc::clone(&bench.device), options, profile)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Bytes per nanosecond, the median after one warm-up.
fn speed(runs: usize, bytes: usize, mut run: impl FnMut() -> Result<Duration>) -> Result<f64> {
    run()?;
    let rates = (0..runs).map(|_| run().map(|time| bytes as f64 / time.as_nanos() as f64));
    Ok(median(rates.collect::<Result<Vec<_>>>()?))
}

fn main() -> Result<()> {
    let mut bench = Bench::new()?;
    let (store_peak, load_peak, both_peak) = bench.peaks()?;
    println!("contiguous 512 MiB: store {store_peak:.1}, load {load_peak:.1}, both {both_peak:.1} GB/s");
    driver_calls(&bench)?;
    gaps(&bench, store_peak, load_peak)?;
    let start = Instant::now();
    let profile = GpuCopy::calibrate(&bench.device)?;
    println!("calibrated in {:?}: {profile:?}", start.elapsed());
    for layout in &LAYOUTS {
        println!("\n{} ({} blocks): GB/s and share of the peak", layout.name, BLOCKS);
        let arena = bench.arena(layout)?;
        for method in [Some(Method::Dma), Some(Method::Kernel), Some(Method::Staged), None] {
            let copies = engine(&bench, profile, method, |_| ())?;
            let name = method.map_or("auto", Method::name);
            print!("{name:>8}");
            for (direction, peak) in [(Direction::Store, store_peak), (Direction::Load, load_peak)] {
                let bytes = BLOCKS * layout.block();
                let rate = speed(RUNS, bytes, || {
                    let transfer = bench.transfer(direction, (layout, &arena), 0..BLOCKS, None)?;
                    let start = Instant::now();
                    copies.run(transfer)?;
                    Ok(start.elapsed())
                })?;
                print!("  {direction:?} {rate:6.2} ({:.3})", rate / peak);
            }
            let rate = both(&bench, &copies, layout, &arena)?;
            println!("  both {rate:6.2} ({:.3})", rate / both_peak);
        }
        submissions(&bench, profile, layout, &arena)?;
        if layout.fragment == 64 << 10 {
            sweep(&bench, profile, layout, &arena)?;
        }
        bench.memory = Some(Arc::into_inner(arena).expect("nothing uses the arena").into_memory());
    }
    Ok(())
}

/// Both directions at once, on different halves of the blocks.
fn both(bench: &Bench, copies: &GpuCopy, layout: &Layout, arena: &Arc<Arena>) -> Result<f64> {
    let (down, up) = (0..BLOCKS, BLOCKS..2 * BLOCKS);
    speed(3, 2 * BLOCKS * layout.block(), || {
        let store = bench.transfer(Direction::Store, (layout, arena), down.clone(), None)?;
        let load = bench.transfer(Direction::Load, (layout, arena), up.clone(), None)?;
        let (sender, receiver) = std::sync::mpsc::channel();
        let other = sender.clone();
        let start = Instant::now();
        copies.submit(store, Box::new(move |result| sender.send(result).unwrap_or(())))?;
        copies.submit(load, Box::new(move |result| other.send(result).unwrap_or(())))?;
        for _ in 0..2 {
            receiver.recv().map_err(|_| MemError::Stopped)??;
        }
        Ok(start.elapsed())
    })
}

/// What the submitting thread spends on a plan of 4,096 fragments: a store, and a load that a stream waits for.
fn submissions(bench: &Bench, profile: Profile, layout: &Layout, arena: &Arc<Arena>) -> Result<()> {
    let blocks = (4096 / layout.tensors).min(BLOCKS);
    let stream = Stream::new(&bench.device, Priority::Low)?;
    let ways = [Some(Method::Kernel), Some(Method::Staged), None];
    for (method, mib) in ways.into_iter().flat_map(|method| [32usize, 128].map(|mib| (method, mib))) {
        let copies = engine(bench, profile, method, |options| options.first_bytes = mib << 20)?;
        print!("{:>8}  first {mib} MiB at once: submitted 4,096 fragments in", method.map_or("auto", Method::name));
        for direction in [Direction::Store, Direction::Load] {
            let mut times = Vec::new();
            for _ in 0..50 {
                let transfer = bench.transfer(direction, (layout, arena), 0..blocks, Some(stream.raw()))?;
                let (sender, receiver) = std::sync::mpsc::channel();
                let start = Instant::now();
                copies.submit(transfer, Box::new(move |result| sender.send(result).unwrap_or(())))?;
                times.push(start.elapsed().as_nanos() as f64 / 1e3);
                receiver.recv().map_err(|_| MemError::Stopped)??;
            }
            print!(" {:.0} us ({direction:?})", median(times));
        }
        println!(", medians of 50");
    }
    Ok(())
}

/// What the driver takes of the submitting thread, call by call, after it was left alone for as long as a copy takes.
fn driver_calls(bench: &Bench) -> Result<()> {
    let stream = Stream::new(&bench.device, Priority::High)?;
    let (host, there) = (bench.memory.as_ref().expect("not cut").addr().as_ptr() as usize, bench.region.addr());
    let end = Event::new(&bench.device)?;
    let mut times = [const { Vec::new() }; 5];
    for _ in 0..30 {
        end.record(stream.raw())?;
        end.synchronize()?;
        std::thread::sleep(Duration::from_millis(4));
        let mut last = Instant::now();
        let mut lap = |which: usize| {
            times[which].push(last.elapsed().as_nanos() as f64 / 1e3);
            last = Instant::now();
        };
        let event = Event::new(&bench.device)?;
        lap(0);
        // SAFETY: in bounds of pinned and device memory that nothing else uses.
        unsafe { bench.device.copy(stream.raw(), there, host, 16 << 10)? };
        lap(1);
        event.record(stream.raw())?;
        lap(2);
        // SAFETY: as above.
        unsafe { bench.device.copy(stream.raw(), host, there, 2 * MIB)? };
        lap(3);
        for index in 0..63 {
            // SAFETY: as above.
            unsafe { bench.device.copy(stream.raw(), host + index * 2 * MIB, there + index * 2 * MIB, 2 * MIB)? };
        }
        lap(4);
    }
    let [create, table, record, copy, copies] = times.map(median);
    println!(
        "driver calls, us: event {create:.1}, table of 16 KiB {table:.1}, record {record:.1}, copy of 2 MiB {copy:.1}, \
         63 more {copies:.1}"
    );
    Ok(())
}

/// Copies of 2 MiB one after the other, on several streams: what the copy engine leaves of the link between two of them.
fn gaps(bench: &Bench, store_peak: f64, load_peak: f64) -> Result<()> {
    let (host, there) = (bench.memory.as_ref().expect("not cut").addr().as_ptr() as usize, bench.region.addr());
    for count in [1usize, 2, 3] {
        let streams: Vec<_> = (0..count).map(|_| Stream::new(&bench.device, Priority::High)).collect::<Result<_>>()?;
        let ends: Vec<_> = (0..count).map(|_| Event::new(&bench.device)).collect::<Result<_>>()?;
        print!("512 copies of 2 MiB on {count} streams:");
        for (name, peak, up) in [("store", store_peak, false), ("load", load_peak, true)] {
            let rate = speed(RUNS, 512 * 2 * MIB, || {
                let start = Instant::now();
                for index in 0..512 {
                    let spread = (index * 7919) % 512 * 2 * MIB;
                    let (to, from) = if up { (there + spread, host + spread) } else { (host + spread, there + spread) };
                    // SAFETY: in bounds of pinned and device memory that nothing else uses.
                    unsafe { bench.device.copy(streams[index % count].raw(), to, from, 2 * MIB)? };
                }
                for (stream, end) in streams.iter().zip(&ends) {
                    end.record(stream.raw())?;
                }
                ends.iter().try_for_each(Event::synchronize)?;
                Ok(start.elapsed())
            })?;
            print!("  {name} {rate:.1} ({:.3})", rate / peak);
        }
        println!();
    }
    Ok(())
}

/// Thread blocks, sizes of staging buffers and flights, numbers of streams.
fn sweep(bench: &Bench, profile: Profile, layout: &Layout, arena: &Arc<Arena>) -> Result<()> {
    type Change = fn(&mut GpuOptions, usize);
    let blocks: (&str, Method, &[usize], Change) =
        ("thread blocks", Method::Kernel, &[8, 12, 16, 24, 32], |options, value| options.blocks = value as u32);
    let staging: (&str, Method, &[usize], Change) =
        ("MiB of staging", Method::Staged, &[4, 8, 16, 32, 64], |options, value| options.staging_bytes = value << 20);
    let flights: (&str, Method, &[usize], Change) =
        ("MiB a flight", Method::Staged, &[32, 64, 128], |options, value| options.flight_bytes = value << 20);
    let kernel_flights = ("MiB a flight", Method::Kernel, flights.2, flights.3);
    let streams: (&str, Method, &[usize], Change) =
        ("streams", Method::Staged, &[1, 2, 3, 4], |options, value| options.streams = value);
    for (name, method, values, change) in [blocks, staging, flights, kernel_flights, streams] {
        for &value in values {
            let copies = engine(bench, profile, Some(method), |options| change(options, value))?;
            print!("{:>8}, {value} {name}:", method.name());
            for direction in [Direction::Store, Direction::Load] {
                let rate = speed(3, BLOCKS * layout.block(), || {
                    let transfer = bench.transfer(direction, (layout, arena), 0..BLOCKS, None)?;
                    let start = Instant::now();
                    copies.run(transfer)?;
                    Ok(start.elapsed())
                })?;
                print!("  {direction:?} {rate:6.2}");
            }
            println!("  both {:6.2}", both(bench, &copies, layout, arena)?);
        }
    }
    Ok(())
}
