//! Copies between the pages of a GPU and slots, ordered by streams and events; the host never waits for the device.
//!
//! A transfer becomes a request in one of three lanes, at the submitting thread and under one lock: what it must come
//! after is looked up on the scoreboard, and an event marks its owner's stream. While a lane has room in the air, requests
//! become flights: a program of copies and launches that the pilot gives to the device's streams. A
//! poller thread sees flights land, lets their memory go, publishes the lane's watermark and calls `done`.

mod calibrate;
mod control;
mod flight;
mod method;
mod pilot;
mod poller;
mod program;
mod stock;
mod streams;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

pub use self::flight::Lane;
pub use self::method::{Method, Profile, Rates, Shape};
pub use self::streams::MAX_STREAMS;

use self::control::{Control, Landed};
use self::pilot::Pilot;
use super::host::Outcome;
use super::{CopyEngine, Done, Transfer};
use crate::board::LaneBoard;
use crate::device::{Device, RawStream};
use crate::error::MemError;
use crate::span::{Pages, Place};
use crate::sync::{Arc, Condvar, Mutex};

/// How to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuOptions {
    /// Streams, 1 to [`MAX_STREAMS`]; more are taken as that many. 2 separate stores from loads, 3 also staging from both, 4 the
    /// staging of each.
    pub streams: usize,
    /// The way to copy; `None` chooses for each transfer.
    pub method: Option<Method>,
    /// Bytes of one staging buffer; there are two for each direction, made when first used.
    pub staging_bytes: usize,
    /// Thread blocks of a kernel that reads or writes pinned memory.
    pub blocks: u32,
    /// The most bytes that the device is given of stores, or of loads, in one go; the poller gives it the next.
    pub flight_bytes: usize,
    /// The most of the first go, which the submitting thread sees to by itself.
    pub first_bytes: usize,
    /// The most of one go of loads in the background, which others overtake between two goes, and after how many bytes in the
    /// background, stores too, the copy engine is left to others for a moment.
    pub background_bytes: usize,
}

impl Default for GpuOptions {
    fn default() -> GpuOptions {
        GpuOptions {
            streams: 4,
            method: None,
            staging_bytes: 32 << 20,
            blocks: 16,
            flight_bytes: 128 << 20,
            first_bytes: 32 << 20,
            background_bytes: 16 << 20,
        }
    }
}

/// Copies between one GPU and pinned slots. See the [module](self).
pub struct GpuCopy {
    inner: Arc<Inner>,
}

struct Inner {
    device: Arc<dyn Device>,
    options: GpuOptions,
    control: Mutex<Control>,
    /// Signalled when the poller has something to see.
    work: Condvar,
    /// Signalled when accepted work has ended.
    ended: Condvar,
    boards: [LaneBoard; 3],
}

impl GpuCopy {
    /// An engine on `device` that chooses by `profile`. Starts no thread before the first transfer.
    pub fn new(device: Arc<dyn Device>, options: GpuOptions, profile: Profile) -> Result<GpuCopy, MemError> {
        device.check()?;
        let pilot = Pilot::new(Arc::clone(&device), options.clone(), profile)?;
        let control = Mutex::new(Control::new(pilot));
        let (work, ended) = (Condvar::default(), Condvar::default());
        let inner = Inner { device, options, control, work, ended, boards: Default::default() };
        Ok(GpuCopy { inner: Arc::new(inner) })
    }

    /// Measures the link of `device` in about 100 ms.
    pub fn calibrate(device: &Arc<dyn Device>) -> Result<Profile, MemError> {
        calibrate::measure(device)
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.inner.device
    }

    /// How it copies.
    pub fn options(&self) -> &GpuOptions {
        &self.inner.options
    }

    /// What has ended in `lane`. Reading it takes no lock.
    pub fn board(&self, lane: Lane) -> &LaneBoard {
        &self.inner.boards[lane as usize]
    }

    /// As [`CopyEngine::submit`]; returns the ticket, greater than any before.
    pub fn submit_ticket(&self, transfer: Transfer, done: Done) -> Result<u64, MemError> {
        self.check(&transfer)?;
        let mut control = self.inner.control.lock();
        poller::ensure(&self.inner, &mut control)?;
        let ticket = control.accept(transfer, done)?;
        let lost = control.take_landed();
        drop(control);
        self.inner.work.notify_one();
        self.inner.report(lost);
        Ok(ticket)
    }

    fn check(&self, transfer: &Transfer) -> Result<(), MemError> {
        self.inner.device.check()?;
        if transfer.steps().is_empty() { Ok(()) } else { self.reaches(transfer.pages().place()) }
    }
}

impl Inner {
    /// Lets go of what `landed` keeps alive, then tells.
    fn report(&self, landed: Vec<Landed>) {
        let count = landed.len();
        for landed in landed {
            landed.tell(&self.boards);
        }
        if count > 0 {
            let mut control = self.control.lock();
            control.accepted -= count;
            if control.accepted == 0 {
                self.ended.notify_all();
            }
        }
    }
}

impl CopyEngine for GpuCopy {
    fn run(&self, transfer: Transfer) -> Result<(), MemError> {
        let outcome = Arc::new(Outcome::default());
        let signal = Arc::clone(&outcome);
        self.submit_ticket(transfer, Box::new(move |result| signal.set(result)))?;
        outcome.wait()
    }

    fn submit(&self, transfer: Transfer, done: Done) -> Result<(), MemError> {
        self.submit_ticket(transfer, done).map(drop)
    }

    fn reaches(&self, place: Place) -> Result<(), MemError> {
        let own = Place::Device(self.inner.device.info().ordinal);
        if place == own {
            return Ok(());
        }
        let remedy = "pass memory of that device";
        Err(MemError::WrongPlace { found: place.to_string(), expected: own.to_string(), remedy })
    }

    fn fence(&self, stream: RawStream, pages: &Pages) -> Result<(), MemError> {
        self.inner.device.check()?;
        let mut control = self.inner.control.lock();
        let outcome = control.fence(stream, pages);
        let lost = control.take_landed();
        drop(control);
        self.inner.work.notify_one();
        self.inner.report(lost);
        outcome
    }

    fn stop(&self, deadline: Duration) -> bool {
        if matches!(self.inner.device.check(), Err(MemError::Forked { .. })) {
            return true;
        }
        let until = Instant::now().checked_add(deadline);
        let mut control = self.inner.control.lock();
        control.stopped = true;
        while control.accepted > 0 {
            match until {
                None => self.inner.ended.wait(&mut control),
                Some(until) if self.inner.ended.wait_until(&mut control, until).timed_out() => {
                    return control.accepted == 0;
                }
                Some(_) => {}
            }
        }
        true
    }

    fn name(&self) -> &'static str {
        "gpu"
    }
}

impl Drop for GpuCopy {
    fn drop(&mut self) {
        if !matches!(self.inner.device.check(), Err(MemError::Forked { .. })) {
            poller::close(&self.inner);
        }
    }
}
