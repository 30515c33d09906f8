//! What the link does, measured by the copies themselves.

use std::time::{Duration, Instant};

use super::method::{Method, Profile, Rates};
use super::{GpuCopy, GpuOptions};
use crate::arena::Arena;
use crate::copy::{CopyEngine, Direction, Step, Transfer};
use crate::device::{Device, DeviceMemory};
use crate::error::MemError;
use crate::map::{HostMemory, MapOptions};
use crate::slots::SlotId;
use crate::span::{Pages, Pattern, Place, Region, Segment};
use crate::sync::Arc;

/// Long enough that a launch does not show, short enough for the start of an engine.
const BYTES: usize = 64 << 20;
const FRAGMENT: usize = 64 << 10;
const SLOT: usize = 1 << 20;

/// Measurements end when this has passed; what was not measured is assumed.
const BUDGET: Duration = Duration::from_millis(120);

/// Measures both directions of `device`'s link.
pub(super) fn measure(device: &Arc<dyn Device>) -> Result<Profile, MemError> {
    let until = Instant::now() + BUDGET;
    let bench = Bench::new(device)?;
    Ok(Profile {
        store: bench.rates(Direction::Store, Profile::ASSUMED.store, until)?,
        load: bench.rates(Direction::Load, Profile::ASSUMED.load, until)?,
    })
}

struct Bench {
    device: Arc<dyn Device>,
    arena: Arc<Arena>,
    region: Region,
}

impl Bench {
    fn new(device: &Arc<dyn Device>) -> Result<Bench, MemError> {
        let numa_node = device.info().numa_node;
        let options = MapOptions { bytes: BYTES, huge_pages: true, numa_node, touch_threads: 4 };
        let mut memory = HostMemory::map(&options)?;
        memory.pin(device)?;
        let memory_there = DeviceMemory::new(device, BYTES)?;
        let place = Place::Device(device.info().ordinal);
        let addr = memory_there.addr();
        // SAFETY: the device's memory lives as long as its owner, and only the device follows the address.
        let region = unsafe { Region::from_raw(addr, BYTES, true, Box::new(memory_there)) }.at(place);
        Ok(Bench { device: Arc::clone(device), arena: Arc::new(Arena::cut(memory, SLOT)?), region })
    }

    fn rates(&self, direction: Direction, assumed: Rates, until: Instant) -> Result<Rates, MemError> {
        let mut rates = assumed;
        if let Some(us) = self.best(Method::Dma, direction, BYTES, until)? {
            rates.link = BYTES as f64 / us;
        }
        if let Some(us) = self.best(Method::Dma, direction, FRAGMENT, until)? {
            let each = (us - BYTES as f64 / rates.link) / (BYTES / FRAGMENT) as f64;
            rates.copy_us = each.max(0.1);
        }
        if let Some(us) = self.best(Method::Kernel, direction, FRAGMENT, until)? {
            rates.kernel = BYTES as f64 / us;
        }
        if let Some(us) = self.best(Method::Staged, direction, FRAGMENT, until)? {
            // The slots continue each other, so there is one copy for each buffer.
            let copies = BYTES.div_ceil(GpuOptions::default().staging_bytes) as f64;
            rates.staged_us = (us - BYTES as f64 / rates.link - rates.copy_us * copies).max(1.0);
        }
        Ok(rates)
    }

    /// Microseconds of the best of three runs, the first of which only warms up; `None` once the time is over.
    fn best(
        &self,
        method: Method,
        direction: Direction,
        fragment: usize,
        until: Instant,
    ) -> Result<Option<f64>, MemError> {
        if Instant::now() > until || (method == Method::Kernel && !self.device.info().maps_host) {
            return Ok(None);
        }
        let options = GpuOptions { method: Some(method), ..GpuOptions::default() };
        let engine = GpuCopy::new(Arc::clone(&self.device), options, Profile::ASSUMED)?;
        let mut best = f64::INFINITY;
        for run in 0..4 {
            let transfer = self.transfer(direction, fragment)?;
            let start = Instant::now();
            engine.run(transfer)?;
            if run > 0 {
                best = best.min(start.elapsed().as_secs_f64() * 1e6);
            }
        }
        Ok(Some(best))
    }

    /// Pages of fragments that lie apart, or all in one piece.
    fn transfer(&self, direction: Direction, fragment: usize) -> Result<Transfer, MemError> {
        let pattern = match fragment {
            BYTES => Pattern::contiguous(SLOT),
            _ => {
                let (count, apart) = (SLOT / fragment, BYTES / SLOT * fragment);
                Pattern::strided(1, &[count, fragment], &[apart as isize, 1])?
            }
        };
        let stride = if fragment == BYTES { SLOT } else { fragment } as isize;
        let count = BYTES / SLOT;
        let table = Segment::Table { region: self.region.clone(), pattern: Arc::new(pattern), first: 0, stride, count };
        let steps = (0..count as u32).map(|page| Step { slot: SlotId(page), page }).collect();
        Transfer::new(direction, Arc::clone(&self.arena), steps, Pages::new(vec![table])?)
    }
}
