//! Saving and loading by key, beside plain memcpy of the same bytes by the same number of threads.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "criterion's macros make public items; a bench that fails should panic"
)]

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvortex::{Engine, EngineConfig};
use kvortex_bench::{keys, prompt_keys};
use kvortex_mem::map::{HostMemory, MapOptions};
use kvortex_mem::span::{Pages, Region};

const BLOCKS: usize = 1000;

/// Plain memory as the arena has it: huge pages, touched.
fn like_the_arena(bytes: usize, threads: usize) -> HostMemory {
    HostMemory::map(&MapOptions { bytes, huge_pages: true, numa_node: None, touch_threads: threads }).unwrap()
}

/// How long `threads` threads take to copy `bytes` bytes, block by block, an equal share each.
fn memcpy(from: &[u8], to: &HostMemory, block: usize, threads: usize) -> Duration {
    let to = to.addr().as_ptr() as usize;
    let start = Instant::now();
    std::thread::scope(|scope| {
        for share in from.chunks(from.len() / threads) {
            let at = to + (share.as_ptr() as usize - from.as_ptr() as usize);
            scope.spawn(move || {
                for (i, part) in share.chunks(block).enumerate() {
                    // SAFETY: `to` has as many bytes as `from`, and each thread writes its own share of them.
                    unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), (at + i * block) as *mut u8, part.len()) };
                }
            });
        }
    });
    start.elapsed()
}

fn timed(rounds: u64, mut round: impl FnMut() -> Duration) -> Duration {
    (0..rounds).map(|_| round()).sum()
}

fn one_size(c: &mut Criterion, block: usize, threads: usize) {
    let bytes = BLOCKS * block;
    let source: Vec<u8> = (0..bytes).map(|i| (i / 7) as u8).collect();
    let copy = like_the_arena(bytes, threads);
    let pages = Region::from_vec(source.clone());
    let packed = prompt_keys(1, BLOCKS);
    let config = EngineConfig { threads, watermark: 1.0, ..EngineConfig::new(bytes + (1 << 21)) };
    let engine = Engine::create(config).unwrap();
    let view = || Pages::contiguous(pages.clone(), BLOCKS).unwrap();

    let mut group = c.benchmark_group(format!("1,000 blocks of {} KiB, {threads} threads", block / 1024));
    group.sample_size(10).throughput(Throughput::Bytes(bytes as u64));
    group.bench_function(BenchmarkId::from_parameter("memcpy"), |b| {
        b.iter_custom(|rounds| timed(rounds, || memcpy(&source, &copy, block, threads)));
    });
    group.bench_function(BenchmarkId::from_parameter("save"), |b| {
        b.iter_custom(|rounds| {
            timed(rounds, || {
                engine.reset().unwrap();
                let (start, view) = (Instant::now(), view());
                assert_eq!(engine.save(keys(&packed), view).unwrap().blocks, BLOCKS);
                start.elapsed()
            })
        });
    });
    group.bench_function(BenchmarkId::from_parameter("load"), |b| {
        b.iter_custom(|rounds| {
            timed(rounds, || {
                let (start, view) = (Instant::now(), view());
                assert_eq!(engine.load(keys(&packed), view).unwrap().blocks, BLOCKS);
                start.elapsed()
            })
        });
    });
    group.finish();
}

fn copies(c: &mut Criterion) {
    for block in [32 << 10, 1 << 20] {
        for threads in [1, 2] {
            one_size(c, block, threads);
        }
    }
}

criterion_group!(benches, copies);
criterion_main!(benches);
