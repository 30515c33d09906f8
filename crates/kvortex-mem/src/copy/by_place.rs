//! Host memory by the CPU, device memory by the device.

use std::time::{Duration, Instant};

use super::{CopyEngine, Done, Transfer};
use crate::device::RawStream;
use crate::error::MemError;
use crate::span::{Pages, Place};
use crate::sync::Arc;

/// Two engines, of which each transfer is given to the one that reaches its pages.
pub struct ByPlace {
    host: Arc<dyn CopyEngine>,
    device: Arc<dyn CopyEngine>,
}

impl ByPlace {
    /// Gives pages in host memory to `host` and all others to `device`.
    pub fn new(host: Arc<dyn CopyEngine>, device: Arc<dyn CopyEngine>) -> ByPlace {
        ByPlace { host, device }
    }

    fn of(&self, place: Place) -> &dyn CopyEngine {
        match place {
            Place::Host => &*self.host,
            Place::Device(_) => &*self.device,
        }
    }
}

impl CopyEngine for ByPlace {
    fn run(&self, transfer: Transfer) -> Result<(), MemError> {
        self.of(transfer.pages().place()).run(transfer)
    }

    fn submit(&self, transfer: Transfer, done: Done) -> Result<(), MemError> {
        self.of(transfer.pages().place()).submit(transfer, done)
    }

    fn reaches(&self, place: Place) -> Result<(), MemError> {
        self.of(place).reaches(place)
    }

    fn fence(&self, stream: RawStream, pages: &Pages) -> Result<(), MemError> {
        self.of(pages.place()).fence(stream, pages)
    }

    fn stop(&self, deadline: Duration) -> bool {
        let start = Instant::now();
        let device = self.device.stop(deadline);
        self.host.stop(deadline.saturating_sub(start.elapsed())) && device
    }

    fn name(&self) -> &'static str {
        "host and gpu"
    }
}
