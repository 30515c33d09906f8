//! What every copy engine must do, as one suite: `conforms(|| Arc::new(MyEngine::new()))`.
//!
//! Every byte is derived from its place, memory is poisoned before each copy, and the bytes between the fragments and behind
//! the payload are checked too. A violation panics with what was violated.

mod bytes;
mod layouts;
mod life;
mod world;

use std::sync::mpsc;
use std::time::Duration;

use super::{CopyEngine, Transfer};
use crate::error::MemError;
use crate::sync::Arc;

#[cfg(test)]
pub(super) use life::{load, load_into};

#[cfg(not(shuttle))]
pub use world::DeviceWorld;
pub use world::{HostWorld, World};

type Engine = Arc<dyn CopyEngine>;

/// No copy of this suite takes nearly as long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Panics unless the engines that `make` returns keep the contract of [`CopyEngine`] on host memory. Takes some seconds.
pub fn conforms(make: impl Fn() -> Engine) {
    conforms_in(&HostWorld, make);
}

/// As [`conforms`], for pages in the memory of `world`.
pub fn conforms_in(world: &dyn World, make: impl Fn() -> Engine) {
    for layout in layouts::all() {
        bytes::round_trip(&make(), world, &layout);
    }
    bytes::only_named_steps_are_copied(&make(), world);
    life::empty_transfers_end(&make(), world);
    life::memory_is_let_go_before_the_end_is_told(&make(), world);
    life::done_is_called_once_each(&make(), world);
    life::a_panic_in_done_harms_nobody(&make(), world);
    life::several_threads_share_an_engine(&make(), world);
    life::stop_waits_for_done_to_return(&make(), world);
    life::stop_waits_and_then_refuses(&make(), world);
    life::dropping_an_engine_ends_what_it_accepted(make(), world);
    life::an_engine_may_be_dropped_by_its_own_done(make(), world);
}

/// How a transfer is executed.
#[derive(Debug, Clone, Copy)]
enum Way {
    Run,
    Submit,
}

const WAYS: [Way; 2] = [Way::Run, Way::Submit];

fn execute(engine: &Engine, transfer: Transfer, way: Way) -> Result<(), MemError> {
    match way {
        Way::Run => engine.run(transfer),
        Way::Submit => {
            let (sender, receiver) = mpsc::channel();
            engine.submit(transfer, Box::new(move |result| sender.send(result).unwrap_or(())))?;
            receiver.recv_timeout(PATIENCE).expect("`done` was not called")
        }
    }
}
