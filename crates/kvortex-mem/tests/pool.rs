//! The pool against a naive map of its bytes.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use kvortex_mem::MemError;
use kvortex_mem::map::{HostMemory, MapOptions, Pinned};
use kvortex_mem::pool::{Allocation, DEFAULT_ALIGNMENT, PinnedHostPool, PoolStats};
use proptest::prelude::*;

fn memory(bytes: usize) -> HostMemory {
    HostMemory::map(&MapOptions { bytes, huge_pages: false, numa_node: None, touch_threads: 0 }).unwrap()
}

fn pool(bytes: usize, alignment: usize) -> PinnedHostPool {
    PinnedHostPool::new(memory(bytes), alignment).unwrap()
}

/// Which allocation holds each unit of the pool, and which units were the start of one that is free now.
struct Model {
    base: usize,
    alignment: usize,
    owner: Vec<Option<usize>>,
    was_start: Vec<bool>,
    live: Vec<Allocation>,
    peak: usize,
    allocations: u64,
    failures: u64,
}

impl Model {
    fn new(base: usize, alignment: usize, capacity: usize) -> Model {
        let units = capacity / alignment;
        Model {
            base,
            alignment,
            owner: vec![None; units],
            was_start: vec![false; units],
            live: Vec::new(),
            peak: 0,
            allocations: 0,
            failures: 0,
        }
    }

    fn units(&self, allocation: Allocation) -> std::ops::Range<usize> {
        let first = (allocation.addr - self.base) / self.alignment;
        first..first + allocation.bytes.div_ceil(self.alignment)
    }

    fn free_runs(&self) -> Vec<usize> {
        self.owner.chunk_by(|a, b| a.is_some() == b.is_some()).filter(|run| run[0].is_none()).map(<[_]>::len).collect()
    }

    fn largest(&self) -> usize {
        self.free_runs().into_iter().max().unwrap_or(0) * self.alignment
    }

    fn free(&self) -> usize {
        self.free_runs().iter().sum::<usize>() * self.alignment
    }

    /// The length, in units, of the free run that best fit must choose.
    fn best_run(&self, bytes: usize) -> Option<usize> {
        let need = bytes.div_ceil(self.alignment);
        self.free_runs().into_iter().filter(|&run| run >= need).min()
    }

    fn run_around(&self, unit: usize) -> usize {
        let back = self.owner[..unit].iter().rev().take_while(|owner| owner.is_none()).count();
        back + self.owner[unit..].iter().take_while(|owner| owner.is_none()).count()
    }

    fn allocated(&mut self, allocation: Allocation) {
        assert_eq!(allocation.addr % self.alignment, 0, "aligned");
        let units = self.units(allocation);
        assert!(self.owner[units.clone()].iter().all(Option::is_none), "no overlap");
        assert_eq!(Some(self.run_around(units.start)), self.best_run(allocation.bytes), "best fit");
        for unit in units {
            self.owner[unit] = Some(allocation.addr);
            self.was_start[unit] = false;
        }
        self.live.push(allocation);
        self.allocations += 1;
        self.peak = self.peak.max(self.owner.len() * self.alignment - self.free());
    }

    fn freed(&mut self, index: usize) {
        let allocation = self.live.swap_remove(index);
        let units = self.units(allocation);
        self.was_start[units.start] = true;
        self.owner[units].fill(None);
    }

    fn stats(&self) -> PoolStats {
        let (capacity, free, largest_free) = (self.owner.len() * self.alignment, self.free(), self.largest());
        PoolStats {
            capacity,
            used: capacity - free,
            free,
            peak: self.peak,
            largest_free,
            fragmentation: if free == 0 { 0.0 } else { 1.0 - largest_free as f64 / free as f64 },
            live: self.live.len(),
            allocations: self.allocations,
            failures: self.failures,
        }
    }

    /// What freeing `addr`, which is no live start, must answer.
    fn refusal(&self, addr: usize) -> &'static str {
        let double = addr.checked_sub(self.base).is_some_and(|offset| {
            offset % self.alignment == 0 && self.was_start.get(offset / self.alignment) == Some(&true)
        });
        if double { "double" } else { "foreign" }
    }
}

#[derive(Debug, Clone)]
enum Op {
    Allocate(usize),
    Free(prop::sample::Index),
    FreeAnywhere(usize),
}

fn op(capacity: usize) -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1..capacity / 4).prop_map(Op::Allocate),
        1 => (1..=capacity + 1).prop_map(Op::Allocate),
        4 => any::<prop::sample::Index>().prop_map(Op::Free),
        2 => (0..capacity / 8 + 2).prop_map(|unit| Op::FreeAnywhere(unit * 8)),
    ]
}

fn apply(pool: &PinnedHostPool, model: &mut Model, op: &Op) {
    match *op {
        Op::Allocate(bytes) => match pool.allocate(bytes) {
            Ok(allocation) => {
                assert_eq!(allocation.bytes, bytes);
                model.allocated(allocation);
            }
            Err(MemError::OutOfMemory { requested, free, largest }) => {
                assert_eq!(model.best_run(bytes), None, "refused although a run fits");
                assert_eq!((requested, free, largest), (bytes, model.free(), model.largest()));
                model.failures += 1;
            }
            Err(other) => panic!("{other}"),
        },
        Op::Free(ref index) if !model.live.is_empty() => {
            let index = index.index(model.live.len());
            pool.free(model.live[index].addr).unwrap();
            model.freed(index);
        }
        Op::Free(_) => {}
        Op::FreeAnywhere(offset) => free_anywhere(pool, model, model.base + offset),
    }
}

fn free_anywhere(pool: &PinnedHostPool, model: &mut Model, addr: usize) {
    if let Some(index) = model.live.iter().position(|allocation| allocation.addr == addr) {
        pool.free(addr).unwrap();
        return model.freed(index);
    }
    let refused = match pool.free(addr).unwrap_err() {
        MemError::DoubleFree { addr: named } if named == addr => "double",
        MemError::ForeignPointer { addr: named } if named == addr => "foreign",
        other => panic!("{other}"),
    };
    assert_eq!(refused, model.refusal(addr));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pool_behaves_like_a_map_of_its_bytes(
        alignment in prop::sample::select(vec![8usize, 64, 128, 512]),
        ops in prop::collection::vec(op(8192), 1..200),
    ) {
        let pool = pool(8192, alignment);
        let first = pool.allocate(1).unwrap();
        let base = first.addr;
        let mut model = Model::new(base, alignment, 8192);
        model.allocated(first);
        for op in &ops {
            apply(&pool, &mut model, op);
            prop_assert_eq!(pool.stats(), model.stats());
        }
        let mut live = model.live.clone();
        live.sort();
        prop_assert_eq!(pool.live(), live.clone());
        for allocation in live {
            pool.free(allocation.addr).unwrap();
        }
        prop_assert_eq!(pool.stats().largest_free, 8192, "all neighbours joined");
    }
}

#[test]
fn errors_are_distinct_and_change_nothing() {
    let pool = pool(1 << 16, DEFAULT_ALIGNMENT);
    let held = pool.allocate(1000).unwrap();
    let gone = pool.allocate(10).unwrap();
    pool.free(gone.addr).unwrap();
    let before = pool.stats();
    assert!(matches!(pool.free(gone.addr), Err(MemError::DoubleFree { .. })));
    for foreign in [held.addr + 128, held.addr + 1, held.addr - 128, 0, usize::MAX, held.addr + (1 << 16)] {
        assert!(matches!(pool.free(foreign), Err(MemError::ForeignPointer { .. })), "{foreign:#x}");
    }
    assert!(matches!(pool.allocate(0), Err(MemError::ZeroBytes { .. })));
    assert_eq!(pool.stats(), before);
    for huge in [usize::MAX, usize::MAX - 63, 1 << 16] {
        let free = (1 << 16) - 1024;
        let error = pool.allocate(huge).unwrap_err();
        assert!(matches!(error, MemError::OutOfMemory { free: f, .. } if f == free), "{error}");
    }
}

#[test]
fn an_address_used_again_is_no_double_free() {
    let pool = pool(4096, 128);
    let first = pool.allocate(128).unwrap();
    let second = pool.allocate(128).unwrap();
    pool.free(first.addr).unwrap();
    pool.free(second.addr).unwrap();
    let both = pool.allocate(256).unwrap();
    assert_eq!(both.addr, first.addr);
    assert!(matches!(pool.free(second.addr), Err(MemError::ForeignPointer { .. })), "inside a live allocation");
    pool.free(both.addr).unwrap();
    assert!(matches!(pool.free(second.addr), Err(MemError::ForeignPointer { .. })), "forgotten when covered");
    assert!(matches!(pool.free(both.addr), Err(MemError::DoubleFree { .. })));
}

#[test]
fn bad_alignments_are_refused() {
    for alignment in [0, 1, 4, 12, 96, usize::MAX] {
        let error = PinnedHostPool::new(memory(4096), alignment).unwrap_err();
        assert!(matches!(error, MemError::BadAlignment { .. }), "{alignment}: {error}");
    }
    let error = PinnedHostPool::new(memory(4096), 1 << 40).unwrap_err();
    assert!(matches!(error, MemError::TooSmall { .. }), "{error}");
}

#[test]
fn large_alignments_hold_inside_an_unaligned_mapping() {
    let pool = pool(3 << 20, 1 << 20);
    while let Ok(piece) = pool.allocate(1) {
        assert_eq!(piece.addr % (1 << 20), 0);
    }
    assert!(pool.stats().live >= 2);
}

#[test]
fn closing_names_what_is_still_allocated() {
    let pool = pool(1 << 16, 128);
    let held = pool.allocate(777).unwrap();
    let freed = pool.allocate(1).unwrap();
    pool.free(freed.addr).unwrap();
    assert_eq!(pool.close(), [held]);
    assert!(matches!(pool.allocate(1), Err(MemError::Stopped)));
    pool.free(held.addr).unwrap();
    assert_eq!(pool.close(), []);
}

#[test]
fn plain_memory_says_so() {
    let Pinned::No { reason } = pool(4096, 128).pinned() else { panic!("pinned without a GPU") };
    assert!(reason.contains("CUDA"), "{reason}");
}

#[test]
fn threads_share_a_pool_without_sharing_bytes() {
    let pool = pool(1 << 20, 128);
    let own_bytes_stay = |seed: usize| {
        for round in 0..500 {
            let Ok(piece) = pool.allocate(1 + (seed * 7919 + round * 104729) % 9000) else {
                continue;
            };
            let mark = (seed * 500 + round) as u8;
            let bytes = std::ptr::with_exposed_provenance_mut::<u8>(piece.addr);
            // SAFETY: the piece is this thread's until it is freed.
            unsafe {
                bytes.write_bytes(mark, piece.bytes);
                std::thread::yield_now();
                assert!((0..piece.bytes).all(|at| bytes.add(at).read() == mark));
            }
            pool.free(piece.addr).unwrap();
        }
    };
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || own_bytes_stay(seed));
        }
    });
    let stats = pool.stats();
    assert_eq!((stats.used, stats.live, stats.largest_free), (0, 0, stats.capacity));
}
