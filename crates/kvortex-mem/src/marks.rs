//! Events that are used again: making one takes the driver longer than recording it.

use crate::device::{Device, Event, RawStream};
use crate::error::MemError;
use crate::sync::{Arc, Mutex, Weak};

/// Where marks get their events from.
#[derive(Debug)]
pub struct Marks {
    device: Arc<dyn Device>,
    free: Arc<Mutex<Vec<Event>>>,
}

/// What a stream was given up to some moment. Its event goes back when this is dropped; who waits for it still does.
#[derive(Debug)]
pub struct Mark {
    event: Option<Event>,
    home: Weak<Mutex<Vec<Event>>>,
}

impl Marks {
    /// Marks of streams of `device`.
    pub fn new(device: &Arc<dyn Device>) -> Marks {
        Marks { device: Arc::clone(device), free: Arc::default() }
    }

    /// Marks what `stream` was given so far.
    pub fn mark(&self, stream: RawStream) -> Result<Arc<Mark>, MemError> {
        let kept = self.free.lock().pop();
        let event = kept.map_or_else(|| Event::new(&self.device), Ok)?;
        let mark = Mark { event: Some(event), home: Arc::downgrade(&self.free) };
        mark.event().record(stream)?;
        Ok(Arc::new(mark))
    }
}

impl Mark {
    fn event(&self) -> &Event {
        self.event.as_ref().expect("taken only by drop")
    }

    /// Makes what `stream` is given from now on wait for it.
    pub fn hold(&self, stream: RawStream) -> Result<(), MemError> {
        self.event().hold(stream)
    }

    /// Whether all of it is done.
    pub fn is_passed(&self) -> Result<bool, MemError> {
        self.event().is_passed()
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let (Some(event), Some(home)) = (self.event.take(), self.home.upgrade()) {
            home.lock().push(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use crate::device::{Priority, Stream};
    use crate::sim::Sim;

    use super::*;

    #[test]
    fn an_event_is_used_again_and_still_waited_for() {
        let sim = Sim::new(1);
        let device: Arc<dyn Device> = sim.clone();
        let marks = Marks::new(&device);
        let (first, second) =
            (Stream::new(&device, Priority::Low).unwrap(), Stream::new(&device, Priority::Low).unwrap());
        let (sender, receiver) = mpsc::channel();
        for round in 0..50 {
            let (one, other) = (sender.clone(), sender.clone());
            sim.compute(first.raw(), move || one.send((round, 1)).unwrap());
            let mark = marks.mark(first.raw()).unwrap();
            mark.hold(second.raw()).unwrap();
            drop(mark);
            // The same event stands for something later now.
            sim.compute(first.raw(), || ());
            marks.mark(first.raw()).unwrap();
            sim.compute(second.raw(), move || other.send((round, 2)).unwrap());
        }
        sim.idle();
        let order: Vec<_> = receiver.try_iter().collect();
        for round in 0..50 {
            let place = |what| order.iter().position(|&seen| seen == (round, what)).unwrap();
            assert!(place(1) < place(2), "round {round}");
        }
        assert_eq!(marks.free.lock().len(), 1, "one event is enough for marks that follow each other");
    }
}
