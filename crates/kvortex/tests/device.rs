//! The engine with pages on a simulated device.
#![cfg(not(shuttle))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use kvortex::{Engine, Error, Keys};
use kvortex_mem::MemError;
use kvortex_mem::copy::suite::{DeviceWorld, World};
use kvortex_mem::device::Device;
use kvortex_mem::sim::Sim;
use kvortex_mem::span::Region;

/// An engine on a simulated device, and memory there.
fn on_device(seed: u64, blocks: usize) -> (Arc<Sim>, Engine, DeviceWorld) {
    let sim = Sim::new(seed);
    let device: Arc<dyn Device> = sim.clone();
    let world = DeviceWorld::new(&device);
    (sim, Engine::with_device(config(blocks), device).unwrap(), world)
}

fn there(world: &DeviceWorld, host: &Region) -> Region {
    world.region(&host.to_vec(), true)
}

#[test]
fn blocks_go_to_the_host_and_back_by_their_keys() {
    for seed in 0..4 {
        let (sim, engine, world) = on_device(seed, 200);
        let all = keys(0..90);
        let report = engine.save(Keys::from_slices(&all), pages(&there(&world, &filled(&all)), 90)).unwrap();
        assert_eq!((report.blocks, report.bytes), (90, 90 * BLOCK as u64));
        assert_eq!(load(&engine, &all).blocks, 90, "pages of the host");
        let asked = keys((0..120).rev());
        let target = there(&world, &poisoned(120));
        let report = engine.load(Keys::from_slices(&asked), pages(&target, 120)).unwrap();
        assert_eq!((report.blocks, report.missing), (90, 30));
        check(&asked, &Region::from_vec(world.bytes(&target)), &report);
        assert!(engine.shutdown(Duration::from_secs(60)));
        assert_eq!(sim.violations(), Vec::<String>::new());
    }
}

#[test]
fn a_lost_device_fails_what_is_unfinished_and_the_rest_ends_in_order() {
    let (sim, engine, world) = on_device(7, 200);
    let (kept, new) = (keys(0..20), keys(100..120));
    save(&engine, &kept);
    let (source, target) = (there(&world, &filled(&new)), there(&world, &poisoned(20)));
    sim.pause();
    let mut tickets = vec![engine.save_async(Keys::from_slices(&new), pages(&source, 20)).unwrap()];
    tickets.push(engine.load_async(Keys::from_slices(&kept), pages(&target, 20)).unwrap());
    let resting = keys(200..220);
    tickets.push(engine.save_after(Keys::from_slices(&resting), pages(&target, 20), &tickets[1..2]).unwrap());
    sim.lose("an illegal address");
    sim.resume();
    for ticket in &tickets {
        let outcome = ticket.wait(Some(Duration::from_secs(60)));
        assert!(matches!(outcome, Err(Error::Transfer { .. })), "{outcome:?}");
        let said = outcome.unwrap_err().to_string();
        assert!(
            said.contains("the GPU is lost to this process: an illegal address") || said.contains("rests on"),
            "{said}"
        );
    }
    assert!(!engine.check(Keys::from_slices(&new)).unwrap().any(), "a block of a failed save is visible");
    assert!(!engine.check(Keys::from_slices(&resting)).unwrap().any(), "a save is visible without its load");
    for _ in 0..3 {
        let refused = engine.load(Keys::from_slices(&kept), pages(&target, 20));
        assert!(
            matches!(&refused, Err(Error::Transfer { cause, .. }) if matches!(**cause, MemError::DeviceLost { .. })),
            "{refused:?}"
        );
        assert_eq!(load(&engine, &kept).blocks, 20, "the host's own pages need no device");
    }
    assert!(engine.shutdown(Duration::from_secs(60)));
}

#[test]
fn memory_that_may_not_be_page_locked_is_used_as_it_is() {
    let sim = Sim::new(3);
    let device: Arc<dyn Device> = sim.clone();
    let world = DeviceWorld::new(&device);
    sim.fail_next("register", 1);
    let engine = Engine::with_device(config(50), device).unwrap();
    assert!(!engine.stats().pinned);
    save(&engine, &keys(0..10));
    assert_eq!(load(&engine, &keys(0..10)).blocks, 10);
    drop((engine, world));
    assert_eq!(sim.violations(), Vec::<String>::new());
}
