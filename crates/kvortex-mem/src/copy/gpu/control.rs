//! Who goes next: the state of an engine, all of it under one lock.

use std::collections::BTreeMap;

use super::flight::{FLIGHT_REQUESTS, Failure, Flight, Lane, Load, Queue, Request};
use super::pilot::{Pilot, Started};
use crate::board::LaneBoard;
use crate::copy::job::guarded;
use crate::copy::scoreboard::{Access, Scoreboard, Use};
use crate::copy::{Done, Transfer};
use crate::device::RawStream;
use crate::error::MemError;
use crate::span::Pages;
use crate::sync::Arc;
use crate::sync::thread::JoinHandle;

pub(super) struct Control {
    pilot: Pilot,
    queues: [Queue; 3],
    requests: BTreeMap<u64, Request>,
    scoreboard: Scoreboard,
    next: u64,
    /// Requests that have ended and are not yet reported.
    landed: Vec<Landed>,
    lost: Option<String>,
    /// Requests whose `done` has not returned.
    pub(super) accepted: usize,
    pub(super) stopped: bool,
    pub(super) closing: bool,
    pub(super) poller: Option<JoinHandle<()>>,
}

/// A request that has ended: nothing refers to its memory any more but this.
pub(super) struct Landed {
    id: u64,
    lane: Lane,
    transfer: Transfer,
    done: Done,
    result: Result<(), MemError>,
}

impl Landed {
    /// Lets go of the memory, publishes the end, reports it.
    pub(super) fn tell(self, boards: &[LaneBoard; 3]) {
        let Landed { id, lane, transfer, done, result } = self;
        if let Err(reason) = guarded(|| drop(transfer)) {
            log::error!("the owner of copied memory panicked when it was let go: {reason}");
        }
        boards[lane as usize].publish(id, result.is_ok());
        if let Err(reason) = guarded(|| done(result)) {
            log::error!("the receiver of a copy's result panicked: {reason}");
        }
    }
}

impl Control {
    pub(super) fn new(pilot: Pilot) -> Control {
        Control {
            pilot,
            queues: Default::default(),
            requests: BTreeMap::new(),
            scoreboard: Scoreboard::new(),
            next: 1,
            landed: Vec::new(),
            lost: None,
            accepted: 0,
            stopped: false,
            closing: false,
            poller: None,
        }
    }

    pub(super) fn take_landed(&mut self) -> Vec<Landed> {
        std::mem::take(&mut self.landed)
    }

    /// True while the poller has something to look at.
    pub(super) fn is_busy(&self) -> bool {
        self.queues.iter().any(|queue| !queue.flying.is_empty()) || !self.landed.is_empty()
    }

    /// Takes a transfer in; starts it if its lane has room or its owner's stream has to wait for it.
    pub(super) fn accept(&mut self, mut transfer: Transfer, done: Done) -> Result<u64, MemError> {
        if self.stopped {
            return Err(MemError::Stopped);
        }
        transfer.sort_by_slot();
        let lane = Lane::of(&transfer);
        let order = transfer.pages().order();
        let awaited = order.stream.filter(|_| lane == Lane::Load && order.parts.is_none());
        let at_once = awaited.is_some() || order.parts.is_some();
        let after = order.stream.map(|stream| self.pilot.marks.mark(stream)).transpose()?;
        let access = Access::of(transfer.pages(), transfer.steps().iter().map(|step| step.page as usize));
        let how = if lane == Lane::Store { Use::Reads } else { Use::Writes };
        let (id, earlier) = (self.next, self.scoreboard.before(&access, how));
        self.next += 1;
        self.accepted += 1;
        self.scoreboard.enter(id, Arc::new(access), how);
        let after = after.into_iter().collect();
        let (started, ends, failure) = (0, Vec::new(), None);
        self.requests.insert(id, Request { lane, transfer, done, earlier, after, started, ends, failure });
        self.queues[lane as usize].waiting.push_back(id);
        if at_once {
            self.start_through(id);
        } else if self.queues[lane as usize].flying.len() < lane.flights() && self.lost.is_none() {
            // A short flight at most: the poller sees to the rest while the device has enough to do.
            self.start_next(lane, self.pilot.options.first_bytes.min(lane.flight_bytes(&self.pilot.options)));
        }
        match awaited.map_or(Ok(()), |stream| self.hold(stream, id)) {
            Ok(()) => Ok(id),
            Err(error) => {
                // Nobody may take the bytes for loaded: the stream does not wait for them.
                self.fail(id, Arc::new(error));
                Ok(id)
            }
        }
    }

    /// Makes `stream` wait for every unfinished copy that reads or writes `pages`.
    pub(super) fn fence(&mut self, stream: RawStream, pages: &Pages) -> Result<(), MemError> {
        if self.scoreboard.is_empty() {
            return Ok(());
        }
        let access = Access::of(pages, 0..pages.count());
        for id in self.scoreboard.before(&access, Use::Writes) {
            self.start_through(id);
            self.hold(stream, id)?;
        }
        Ok(())
    }

    fn hold(&self, stream: RawStream, id: u64) -> Result<(), MemError> {
        let ends = self.requests.get(&id).map_or(&[][..], |request| &request.ends);
        ends.iter().try_for_each(|event| event.hold(stream))
    }

    fn fail(&mut self, id: u64, failure: Failure) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.failure.get_or_insert(failure);
        }
    }

    /// Starts waiting requests of `lane` while there is room in the air.
    fn fill(&mut self, lane: Lane) {
        while !self.queues[lane as usize].waiting.is_empty()
            && self.queues[lane as usize].flying.len() < lane.flights()
            && self.lost.is_none()
        {
            self.start_next(lane, lane.flight_bytes(&self.pilot.options));
        }
    }

    /// Starts everything of the lane of request `id` up to it.
    fn start_through(&mut self, id: u64) {
        while let Some(request) = self.requests.get(&id).filter(|request| !request.is_started()) {
            let lane = request.lane;
            if self.lost.is_some() {
                return;
            }
            self.start_next(lane, lane.flight_bytes(&self.pilot.options));
        }
    }

    /// Starts the next flight of a lane that has something waiting, of at most `most` bytes unless its first page has more,
    /// after what it must come after: only requests with smaller numbers, so that this ends.
    fn start_next(&mut self, lane: Lane, most: usize) {
        let first = self.queues[lane as usize].waiting[0];
        let earlier = self.requests[&first].earlier.clone();
        earlier.into_iter().for_each(|id| self.start_through(id));
        if self.lost.is_some() {
            return;
        }
        let ids = self.next_flight(lane, most);
        self.gather_events(&ids);
        let loads: Vec<Load<'_>> = ids
            .iter()
            .map(|id| &self.requests[id])
            .map(|request| Load { transfer: &request.transfer, steps: request.next_steps(most), after: &request.after })
            .collect();
        let steps: Vec<usize> = loads.iter().map(|load| load.steps.end).collect();
        let started = self.pilot.start(&loads);
        drop(loads);
        self.take_off(lane, &ids, &steps, started);
    }

    /// The requests that go together: as many as fit, as long as none waits for another that has not started.
    fn next_flight(&self, lane: Lane, most: usize) -> Vec<u64> {
        let waiting = &self.queues[lane as usize].waiting;
        let mut ids = vec![waiting[0]];
        let mut bytes = self.requests[&waiting[0]].transfer.bytes();
        if lane == Lane::Background {
            return ids;
        }
        for id in waiting.iter().skip(1).take(FLIGHT_REQUESTS - 1) {
            let request = &self.requests[id];
            bytes = bytes.saturating_add(request.transfer.bytes());
            let waits = |earlier: &u64| self.requests.get(earlier).is_some_and(|request| !request.is_started());
            if bytes > most || request.earlier.iter().any(waits) {
                break;
            }
            ids.push(*id);
        }
        ids
    }

    /// Adds the ends of what each request must come after, which has started by now or is over.
    fn gather_events(&mut self, ids: &[u64]) {
        for id in ids {
            let earlier = std::mem::take(&mut self.requests.get_mut(id).expect("a waiting request").earlier);
            let ends: Vec<_> =
                earlier.iter().filter_map(|id| self.requests.get(id)).flat_map(|other| other.ends.clone()).collect();
            self.requests.get_mut(id).expect("a waiting request").after.extend(ends);
        }
    }

    fn take_off(&mut self, lane: Lane, ids: &[u64], steps: &[usize], started: Started) {
        let failure =
            started.failure.as_ref().map(|error| (matches!(error, MemError::DeviceLost { .. }), error.to_string()));
        let mut started = started;
        let shared: Option<Failure> = started.failure.take().map(Arc::new);
        let mut last_of = Vec::new();
        for (id, &end) in ids.iter().zip(steps) {
            let request = self.requests.get_mut(id).expect("a request that has just started");
            request.started = end;
            request.failure = request.failure.take().or_else(|| shared.clone());
            // Of every flight: a later one may have gone another way, on other streams.
            request.ends.extend(started.ends.iter().cloned());
            if request.is_started() {
                last_of.push(*id);
            }
        }
        let queue = &mut self.queues[lane as usize];
        queue.waiting.drain(..last_of.len());
        queue.flying.push_back(Flight::new(started, last_of));
        if let Some((true, cause)) = failure {
            self.lose(&cause);
        }
    }

    /// Looks at what is in the air; true if something has landed.
    pub(super) fn poll(&mut self) -> bool {
        for lane in Lane::ALL {
            loop {
                match self.head_has_landed(lane) {
                    Ok(true) => self.land(lane),
                    Ok(false) => break,
                    Err(error) => {
                        self.lose(&error.to_string());
                        return true;
                    }
                }
            }
            self.fill(lane);
        }
        !self.landed.is_empty()
    }

    fn head_has_landed(&self, lane: Lane) -> Result<bool, MemError> {
        let Some(flight) = self.queues[lane as usize].flying.front() else { return Ok(false) };
        for event in &flight.ends {
            if !event.is_passed()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn land(&mut self, lane: Lane) {
        let Some(flight) = self.queues[lane as usize].flying.pop_front() else { return };
        self.pilot.land(flight.tables);
        for id in flight.last_of {
            self.end(id, None);
        }
    }

    fn end(&mut self, id: u64, lost: Option<&str>) {
        let Some(request) = self.requests.remove(&id) else { return };
        self.scoreboard.leave(id);
        let result = match (lost, request.failure) {
            (Some(cause), _) => Err(MemError::DeviceLost { cause: cause.to_owned() }),
            (None, Some(failure)) => Err(MemError::CopyFailed(failure.to_string())),
            (None, None) => Ok(()),
        };
        let Request { lane, transfer, done, .. } = request;
        self.landed.push(Landed { id, lane, transfer, done, result });
    }

    /// Ends everything: nothing runs on a lost device, and nothing of what ran there is known to be right.
    fn lose(&mut self, cause: &str) {
        self.lost.get_or_insert_with(|| cause.to_owned());
        self.queues = Default::default();
        let ids: Vec<u64> = self.requests.keys().copied().collect();
        ids.into_iter().for_each(|id| self.end(id, Some(cause)));
    }
}
