//! Identity, lookup, leases and eviction, beside the index that one would write first.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "criterion's macros make public items; a bench that fails should panic"
)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvortex::{KeyChain, Namespace};
use kvortex_bench::{LockPerKey, PROMPT_BLOCKS, index_of, keys, prompt_keys, resident_keys, tokens};

fn identity(c: &mut Criterion) {
    let tokens = tokens(0, PROMPT_BLOCKS * 16);
    let mut group = c.benchmark_group("keys of 131,072 tokens");
    group.throughput(Throughput::Elements(PROMPT_BLOCKS as u64));
    group.bench_function("KeyChain", |b| {
        b.iter_batched(
            || KeyChain::new(&Namespace::default(), 16, b"").unwrap(),
            |mut chain| chain.extend(black_box(&tokens), b"").unwrap().len(),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("longest prefix of 8,192 keys");
    group.throughput(Throughput::Elements(PROMPT_BLOCKS as u64));
    for resident in [100_000, 1_000_000] {
        let packed = resident_keys(resident);
        let (index, rival) = (index_of(&packed), LockPerKey::of(&packed));
        // Another prompt each time, so that the caches hold no more of it than they would in use.
        let mut prompts = (0..resident / PROMPT_BLOCKS).cycle();
        let mut next = || {
            let prompt = prompts.next().unwrap_or(0);
            keys(&packed[prompt * PROMPT_BLOCKS * 32..][..PROMPT_BLOCKS * 32])
        };
        group.bench_function(BenchmarkId::new("kvortex looked up", resident), |b| {
            b.iter(|| assert_eq!(index.prefix_len(next()), PROMPT_BLOCKS));
        });
        group.bench_function(BenchmarkId::new("lock per key looked up", resident), |b| {
            b.iter(|| assert_eq!(rival.prefix_len(next()), PROMPT_BLOCKS));
        });
        group.bench_function(BenchmarkId::new("kvortex leased and returned", resident), |b| {
            b.iter(|| assert_eq!(index.lease_prefix(next()).len(), PROMPT_BLOCKS));
        });
        group.bench_function(BenchmarkId::new("lock per key leased and returned", resident), |b| {
            b.iter(|| assert_eq!(rival.lease_and_return(next()), PROMPT_BLOCKS));
        });
    }
    group.finish();
}

fn miss(c: &mut Criterion) {
    let index = index_of(&resident_keys(100_000));
    let unknown = prompt_keys(1_000_000, PROMPT_BLOCKS);
    c.bench_function("a miss of 8,192 keys with 100,000 resident", |b| {
        b.iter(|| assert_eq!(index.prefix_len(keys(black_box(&unknown))), 0));
    });
}

/// How long `threads` threads take for `rounds` leases of a prompt each.
fn leases_by(threads: u32, index: &Arc<kvortex::index::Index>, packed: &[u8], rounds: u64) -> Duration {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads as usize {
            scope.spawn(move || {
                for round in 0..rounds as usize {
                    let prompt = (thread * 5 + round) % 12;
                    let run = keys(&packed[prompt * PROMPT_BLOCKS * 32..][..PROMPT_BLOCKS * 32]);
                    assert_eq!(index.lease_prefix(run).len(), PROMPT_BLOCKS);
                }
            });
        }
    });
    start.elapsed()
}

fn threads(c: &mut Criterion) {
    let packed = resident_keys(100_000);
    let index = index_of(&packed);
    let mut group = c.benchmark_group("8,192 keys leased and returned by each thread");
    for threads in [1, 2] {
        group.throughput(Throughput::Elements(u64::from(threads) * PROMPT_BLOCKS as u64));
        group.bench_function(BenchmarkId::from_parameter(threads), |b| {
            b.iter_custom(|rounds| leases_by(threads, &index, &packed, rounds));
        });
    }
    group.finish();
}

fn eviction(c: &mut Criterion) {
    let packed = resident_keys(100_000);
    let mut group = c.benchmark_group("eviction, 100,000 resident, 10 % leased");
    let victims = 10_000;
    group.sample_size(20).throughput(Throughput::Elements(victims));
    for batch in [1, 64] {
        group.bench_function(BenchmarkId::new("per victim, victims a call", batch), |b| {
            b.iter_batched(
                || {
                    let index = index_of(&packed);
                    let lease = index.lease_prefix(keys(&packed[..10_000 * 32]).slice(0..PROMPT_BLOCKS));
                    (index, lease)
                },
                |(index, lease)| {
                    let evicted: usize = (0..victims as usize / batch).map(|_| index.evict(batch).len()).sum();
                    assert_eq!(evicted, victims as usize / batch * batch);
                    (index, lease)
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, identity, lookup, miss, threads, eviction);
criterion_main!(benches);
