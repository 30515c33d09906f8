//! Eight threads that save, load, evict, lease and reset at once: no byte is wrong and nothing is lost.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod common;

use std::time::Duration;

use common::*;
use kvortex::{Engine, Keys};

/// A small reproducible generator, one per thread.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % sides
    }
}

fn act(engine: &Engine, dice: &mut Dice) {
    let start = dice.roll(100);
    let run = keys(start..start + 1 + dice.roll(12));
    match dice.roll(20) {
        0 => drop(engine.reset().unwrap()),
        1..8 => drop(save(engine, &run)),
        8 | 9 => {
            let source = filled(&run);
            let ticket = engine.save_async(Keys::from_slices(&run), pages(&source, run.len())).unwrap();
            ticket.wait(Some(Duration::from_secs(20))).unwrap();
        }
        10..17 => drop(load(engine, &run)),
        17 => {
            let target = poisoned(run.len());
            let ticket = engine.load_async(Keys::from_slices(&run), pages(&target, run.len())).unwrap();
            check(&run, &target, &ticket.wait(Some(Duration::from_secs(20))).unwrap());
        }
        _ => {
            let lease = engine.lease_prefix(Keys::from_slices(&run)).unwrap();
            let report = load(engine, &run[..lease.len()]);
            drop(lease);
            assert!(report.blocks <= run.len());
        }
    }
}

#[test]
fn eight_threads_never_see_a_wrong_byte() {
    // Room for 60 of about 112 blocks, so that eviction never rests.
    let engine = engine(60);
    let rounds = if cfg!(debug_assertions) { 400 } else { 4000 };
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let engine = &engine;
            scope.spawn(move || {
                let mut dice = Dice(seed);
                (0..rounds).for_each(|_| act(engine, &mut dice));
            });
        }
    });
    let stats = engine.stats();
    assert_eq!((stats.in_flight, stats.leased_blocks, stats.failed), (0, 0, 0));
    assert_eq!(stats.bytes_used, stats.blocks * BLOCK, "every slot is a block's or free");
    assert!(stats.evictions > 0 && stats.hits > 0 && stats.misses > 0);
    engine.reset().unwrap();
    assert_eq!(engine.stats().bytes_used, 0);
}
