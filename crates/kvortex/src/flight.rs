//! One save or load from its plan to its report. Whatever happens on the way, the plan is settled once: an error, a panic or
//! a copy engine that drops its callback all settle it as failed, and nothing of it becomes visible.

use std::time::{Duration, Instant};

use kvortex_mem::error::MemError;
use kvortex_mem::span::Pages;

use crate::engine::Bound;
use crate::error::{Error, Result};
use crate::key::{KEY_BYTES, Keys};
use crate::mask::BlockMask;
use crate::plan::{Kind, Plan, Report, TicketId};
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering};
use crate::ticket::Ticket;

/// A plan that is open.
pub(crate) struct Flight {
    plan: Plan,
    open: OpenPlan,
}

/// Settles its plan when dropped, as failed unless [`OpenPlan::settle`] was told otherwise.
struct OpenPlan {
    bound: Arc<Bound>,
    kind: Kind,
    ticket: TicketId,
    /// The report so far: what was decided when the plan was made.
    report: Report,
    /// Positions of the blocks that are copied.
    copied: BlockMask,
    /// Of a save, if there is a tier below to offer them to.
    keys: Vec<[u8; KEY_BYTES]>,
    copies: usize,
    start: Instant,
    handle: Option<Ticket>,
}

impl Flight {
    pub(crate) fn save(bound: Arc<Bound>, keys: Keys<'_>) -> Self {
        let start = Instant::now();
        let planned = bound.planner.plan_store(keys);
        let mut report = Report::empty(Kind::Save, keys.len());
        report.present = planned.ready.count() + planned.pending;
        report.refused = planned.refused;
        report.mask = planned.ready;
        let mut flight = Self::new(bound, planned.plan, report, start);
        if flight.open.bound.lower.is_some() {
            flight.open.keys = keys.iter().map(|key| *key.as_bytes()).collect();
        }
        flight
    }

    pub(crate) fn load(bound: Arc<Bound>, keys: Keys<'_>) -> Self {
        let start = Instant::now();
        let (plan, mask) = bound.planner.plan_load(keys);
        let mut report = Report::empty(Kind::Load, keys.len());
        report.missing = keys.len() - mask.count();
        Self::new(bound, plan, report, start)
    }

    /// A load that is planned only when what this returns is called, and the ticket that it will land. Never called, it has failed.
    pub(crate) fn load_later(
        bound: &Arc<Bound>,
        keys: Keys<'_>,
        pages: Pages,
    ) -> (Ticket, impl FnOnce() + Send + 'static) {
        let ticket = Ticket::new(bound.planner.ticket());
        let (bound, packed) = (Arc::clone(bound), keys.iter().map(|key| *key.as_bytes()).collect::<Vec<_>>());
        let promise = Promise { ticket: Some(ticket.clone()), blocks: packed.len() };
        let go = move || match Self::load(bound, Keys::from_slices(&packed)).submit(pages, &[]) {
            Ok(load) => {
                let ended = load.clone();
                load.follow(move |_| promise.land(ended.wait(Some(Duration::ZERO))));
            }
            Err(error) => promise.land(Err(error)),
        };
        (ticket, go)
    }

    fn new(bound: Arc<Bound>, plan: Plan, report: Report, start: Instant) -> Self {
        let mut copied = BlockMask::new(report.mask.len());
        plan.steps.iter().for_each(|step| copied.set(step.page as usize));
        let (kind, ticket, copies) = (plan.kind, plan.ticket, plan.steps.len());
        Self {
            plan,
            open: OpenPlan { bound, kind, ticket, report, copied, keys: Vec::new(), copies, start, handle: None },
        }
    }

    /// Makes the copies and returns when they are done.
    pub(crate) fn run(self, pages: Pages) -> Result<Report> {
        let Self { plan, open } = self;
        let outcome = open.bound.mover.run(&plan, pages);
        open.finish(outcome)
    }

    /// Starts the copies. What they bring becomes visible once they and all of `after` have succeeded.
    pub(crate) fn submit(self, pages: Pages, after: &[Ticket]) -> Result<Ticket> {
        let Self { plan, mut open } = self;
        let ticket = Ticket::new(plan.ticket);
        open.handle = Some(ticket.clone());
        let bound = Arc::clone(&open.bound);
        let (kind, blocks) = (open.kind, open.copies);
        let landing = Landing::new(open, after.len());
        after.iter().for_each(|ticket| Landing::follow(&landing, ticket));
        let own = OwnCopies(Some(landing));
        let done = Box::new(move |outcome| own.end(outcome));
        let started = bound.mover.submit(&plan, pages, done);
        started.map(|()| ticket).map_err(|cause| failed(kind, blocks, cause))
    }
}

/// A ticket that lands for sure.
struct Promise {
    ticket: Option<Ticket>,
    blocks: usize,
}

impl Promise {
    fn land(mut self, outcome: Result<Report>) {
        if let Some(ticket) = self.ticket.take() {
            ticket.land(outcome);
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            ticket.land(Err(failed(Kind::Load, self.blocks, MemError::Stopped)));
        }
    }
}

/// A plan whose copies are under way, and what it rests on.
struct Landing {
    open: Mutex<Option<OpenPlan>>,
    /// Ends that are still to come, its own copies among them.
    awaited: AtomicUsize,
    failure: Mutex<Option<MemError>>,
}

/// The copies' own end, which is sure to come: dropped instead, it settles the plan as failed at once.
struct OwnCopies(Option<Arc<Landing>>);

impl OwnCopies {
    fn end(mut self, outcome: Result<(), MemError>) {
        if let Some(landing) = self.0.take() {
            landing.arrive(outcome);
        }
    }
}

impl Drop for OwnCopies {
    fn drop(&mut self) {
        if let Some(landing) = self.0.take() {
            drop(landing.open.lock().take());
        }
    }
}

impl Landing {
    fn new(open: OpenPlan, after: usize) -> Arc<Self> {
        let (open, awaited) = (Mutex::new(Some(open)), AtomicUsize::new(after + 1));
        Arc::new(Self { open, awaited, failure: Mutex::new(None) })
    }

    fn follow(this: &Arc<Self>, ticket: &Ticket) {
        let (this, id) = (Arc::clone(this), ticket.id());
        let broken = move || MemError::CopyFailed(format!("load {id}, which this save rests on, failed"));
        ticket.follow(move |ok| this.arrive(if ok { Ok(()) } else { Err(broken()) }));
    }

    /// One of the awaited ends; the last one settles the plan.
    fn arrive(&self, outcome: Result<(), MemError>) {
        if let Err(error) = outcome {
            self.failure.lock().get_or_insert(error);
        }
        if self.awaited.fetch_sub(1, Ordering::AcqRel) == 1 {
            let (open, failure) = (self.open.lock().take(), self.failure.lock().take());
            if let Some(open) = open {
                open.land(failure.map_or(Ok(()), Err));
            }
        }
    }
}

/// A ticket of something that is over already.
pub(crate) fn landed(report: Report) -> Ticket {
    let ticket = Ticket::new(TicketId(0));
    ticket.land(Ok(report));
    ticket
}

fn failed(kind: Kind, blocks: usize, cause: MemError) -> Error {
    match cause {
        MemError::Stopped => Error::Closed,
        cause => Error::Transfer { kind: kind.name(), blocks, cause: Arc::new(cause) },
    }
}

impl OpenPlan {
    fn land(self, outcome: Result<(), MemError>) {
        let mut this = self;
        if let Some(handle) = this.handle.take() {
            handle.land(this.finish(outcome));
        }
    }

    fn finish(mut self, outcome: Result<(), MemError>) -> Result<Report> {
        match outcome {
            Ok(()) => Ok(self.succeed()),
            Err(cause) => {
                self.bound.metrics.failed.fetch_add(1, Ordering::Relaxed);
                Err(failed(self.kind, self.copies, cause))
            }
        }
    }

    fn succeed(&mut self) -> Report {
        let visible = self.bound.planner.settle(self.ticket, true);
        let mut report = std::mem::replace(&mut self.report, Report::empty(self.kind, 0));
        report.blocks = self.copies;
        report.bytes = self.copies as u64 * self.bound.layout.block_bytes() as u64;
        // Blocks that a reset forgot while they were written are not held, though they were copied.
        if self.kind == Kind::Load || visible == self.copies {
            report.mask.include(&self.copied);
        }
        report.elapsed = self.start.elapsed();
        if let Some(lower) = self.bound.lower.as_ref().filter(|_| !self.keys.is_empty()) {
            lower.offer(Keys::from_slices(&self.keys));
        }
        self.bound.metrics.count(&report);
        report
    }
}

impl Drop for OpenPlan {
    fn drop(&mut self) {
        self.bound.planner.settle(self.ticket, false);
        if let Some(handle) = self.handle.take() {
            handle.land(Err(failed(self.kind, self.copies, MemError::Stopped)));
        }
    }
}
