//! Copies between pages and slots beside plain `memcpy` of as many bytes by as many threads, in one run.
//!
//! Each transfer is built anew for each copy, so its checks are part of what is measured.

#![expect(clippy::print_stdout, reason = "the ratios are printed beside criterion's figures")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use kvortex_mem::arena::Arena;
use kvortex_mem::copy::{CopyEngine, Direction, HostCopy, Step, Transfer};
use kvortex_mem::map::{HostMemory, MapOptions};
use kvortex_mem::slots::SlotId;
use kvortex_mem::span::{Pages, Pattern, Region, Segment};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const THREADS: [usize; 2] = [1, 2];

fn map(bytes: usize) -> HostMemory {
    let options = MapOptions { bytes, huge_pages: true, numa_node: None, touch_threads: 2 };
    HostMemory::map(&options).expect("memory for the bench")
}

/// Blocks of `block` bytes, each in fragments of `fragment` bytes that lie `count` fragments apart: layers outside pages.
struct Case {
    arena: Arc<Arena>,
    region: Region,
    pattern: Arc<Pattern>,
    stride: usize,
    count: usize,
}

impl Case {
    fn new(count: usize, block: usize, fragment: usize) -> Case {
        let pattern = Pattern::strided(fragment, &[block / fragment], &[(fragment * count) as isize]);
        Case::of(count, block, pattern.expect("a valid pattern"), fragment, count * block)
    }

    /// Every other `item` bytes are of the page.
    fn with_gaps(count: usize, block: usize, item: usize) -> Case {
        let pattern = Pattern::strided(item, &[block / item], &[2 * item as isize]);
        Case::of(count, block, pattern.expect("a valid pattern"), 2 * block, 2 * count * block)
    }

    fn of(count: usize, block: usize, pattern: Pattern, stride: usize, bytes: usize) -> Case {
        let arena = Arena::cut(map(count * block), block).expect("slots");
        let memory = map(bytes);
        // SAFETY: the mapping lives as long as its owner, and nothing else uses it.
        let region = unsafe { Region::from_raw(memory.addr(), memory.len(), true, Box::new(memory)) };
        Case { arena: Arc::new(arena), region, pattern: Arc::new(pattern), stride, count }
    }

    fn bytes(&self) -> usize {
        self.count * self.pattern.bytes()
    }

    fn transfer(&self, direction: Direction) -> Transfer {
        let (region, pattern) = (self.region.clone(), Arc::clone(&self.pattern));
        let table = Segment::Table { region, pattern, first: 0, stride: self.stride as isize, count: self.count };
        let steps = (0..self.count as u32).map(|index| Step { slot: SlotId(index), page: index }).collect();
        let pages = Pages::new(vec![table]).expect("valid pages");
        Transfer::new(direction, Arc::clone(&self.arena), steps, pages).expect("a valid transfer")
    }

    /// The two sides as plain memory of `bytes()` bytes: source, target.
    fn sides(&self, direction: Direction) -> (usize, usize) {
        let arena = self.arena.memory().addr().as_ptr() as usize;
        match direction {
            Direction::Store => (self.region.addr(), arena),
            Direction::Load => (arena, self.region.addr()),
        }
    }
}

/// One `memcpy` per thread.
fn plain((source, target): (usize, usize), bytes: usize, threads: usize) {
    let part = bytes / threads;
    let copy = move |index: usize| {
        let (from, to) = ((source + index * part) as *const u8, (target + index * part) as *mut u8);
        // SAFETY: both sides have `bytes` bytes, lie apart, and each thread has its own part.
        unsafe { std::ptr::copy_nonoverlapping(black_box(from), black_box(to), part) };
    };
    std::thread::scope(|scope| {
        (1..threads).for_each(|index| drop(scope.spawn(move || copy(index))));
        copy(0);
    });
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn measure(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, case: &Case) {
    group.throughput(Throughput::Bytes(case.bytes() as u64));
    for direction in [Direction::Store, Direction::Load] {
        for threads in THREADS {
            beside_memcpy(group, &format!("{name}/{direction:?}"), case, (direction, threads));
        }
    }
}

/// Measures the engine, with a `memcpy` before each copy, and prints the median of the pairs' ratios: on a machine with
/// other users only neighbours in time can be compared.
fn beside_memcpy(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    case: &Case,
    (direction, threads): (Direction, usize),
) {
    let engine = HostCopy::new(threads);
    let mut pairs = Vec::new();
    group.bench_function(BenchmarkId::new(name, threads), |bencher| {
        bencher.iter_custom(|times| {
            let pair = |_| {
                let reference = timed(|| plain(case.sides(direction), case.bytes(), threads));
                let copy = timed(|| engine.run(case.transfer(direction)).expect("a copy"));
                pairs.push((reference, copy));
                copy
            };
            (0..times).map(pair).sum()
        });
    });
    report(&mut pairs, case.bytes());
}

fn report(pairs: &mut [(Duration, Duration)], bytes: usize) {
    if pairs.is_empty() {
        return;
    }
    let middle = pairs.len() / 2;
    let ratio = |&(reference, copy): &(Duration, Duration)| reference.as_secs_f64() / copy.as_secs_f64();
    pairs.sort_by(|a, b| ratio(a).total_cmp(&ratio(b)));
    let median = ratio(&pairs[middle]);
    pairs.sort();
    let speed = bytes as f64 / pairs[middle].0.as_secs_f64() / (1u64 << 30) as f64;
    println!("                        {median:.3} of memcpy, which moves {speed:.1} GiB/s (medians)");
}

/// Many bytes: at least 0.9 of `memcpy` for whole blocks of 1 MiB.
fn large(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("copy");
    group.sampling_mode(SamplingMode::Flat).sample_size(10).measurement_time(Duration::from_secs(3));
    measure(&mut group, "1000 x 1 MiB", &Case::new(1000, MIB, MIB));
    for fragment in [64 * KIB, 16 * KIB, 4 * KIB] {
        measure(&mut group, &format!("512 x 1 MiB in {} KiB", fragment / KIB), &Case::new(512, MIB, fragment));
    }
    for item in [256, 16] {
        measure(&mut group, &format!("512 x 1 MiB in every other {item} B"), &Case::with_gaps(512, MIB, item));
    }
    group.finish();
}

/// Few bytes: what a thread's wake-up costs, and from where it pays.
fn small(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("copy few");
    group.sample_size(30).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(500));
    for blocks in [1, 4, 16, 32, 64, 128] {
        measure(&mut group, &format!("{blocks} x 32 KiB"), &Case::new(blocks, 32 * KIB, 32 * KIB));
    }
    group.finish();
}

/// Mapping and touching, which starting an engine waits for.
fn touch(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("touch");
    group.sampling_mode(SamplingMode::Flat).sample_size(10).measurement_time(Duration::from_secs(3));
    group.throughput(Throughput::Bytes(1 << 30));
    for huge_pages in [true, false] {
        for touch_threads in THREADS {
            let options = MapOptions { bytes: 1 << 30, huge_pages, numa_node: None, touch_threads };
            let id = BenchmarkId::new(if huge_pages { "1 GiB huge" } else { "1 GiB small" }, touch_threads);
            group.bench_function(id, |b| {
                b.iter_with_large_drop(|| HostMemory::map(&options).expect("memory for the bench"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, large, small, touch);
criterion_main!(benches);
