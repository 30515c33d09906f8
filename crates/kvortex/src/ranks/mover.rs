//! One rank: its row of slots, its copies, and what it tells the planner.

use std::collections::BTreeMap;
use std::time::Duration;

use kvortex_mem::arena::Arena;
use kvortex_mem::board::LaneBoard;
use kvortex_mem::copy::gpu::Lane;
use kvortex_mem::copy::{CopyEngine, Direction, Transfer};
use kvortex_mem::device::{Device, RawStream};
use kvortex_mem::error::MemError;
use kvortex_mem::map::{HostMemory, Pinned};
use kvortex_mem::span::{Pages, Place};

use super::board::{RankBoard, Seat};
use super::rows;
use super::ticket::{Ended, RankTicket};
use crate::config::EngineConfig;
use crate::copies;
use crate::error::{Error, Result};
use crate::fork::Owner;
use crate::sync::{Arc, AtomicBool, Mutex, Ordering};
use crate::tier::host::{SlotId, Step};

/// Makes the copies of one rank. The plans of a lane must come in order.
pub struct RankMover {
    arena: Arc<Arena>,
    copies: Arc<dyn CopyEngine>,
    device: Option<Arc<dyn Device>>,
    /// False for a rank whose bytes another one stores.
    stores: bool,
    lanes: [Arc<LaneLog>; 3],
    owner: Owner,
}

/// Publishes the ends of a lane's tickets in their order, whatever order they come in.
struct LaneLog {
    board: LaneBoard,
    lane: Lane,
    book: Mutex<LaneBook>,
}

#[derive(Default)]
struct LaneBook {
    /// Accepted and not yet published; whether it went well, once that is known.
    open: BTreeMap<u64, Option<bool>>,
    last: u64,
    /// Published, and not yet asked for.
    news: Vec<Ended>,
}

impl RankMover {
    /// Maps the slots of `seat`, page-locked if `config` names a GPU, and takes the place of `rank` on the board.
    ///
    /// # Errors
    /// As [`Engine::create`](crate::Engine::create); [`Error::InvalidArgument`] when the rank is taken.
    pub fn create(config: &EngineConfig, place: (&RankBoard, usize), seat: &Seat) -> Result<Self> {
        config.validate()?;
        let device = copies::open(config.gpu.device)?;
        Self::with_device(config, place, seat, device)
    }

    /// As [`create`](Self::create), with pages in host memory or on `device`.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn with_device(
        config: &EngineConfig,
        (board, rank): (&RankBoard, usize),
        seat: &Seat,
        device: Option<Arc<dyn Device>>,
    ) -> Result<Self> {
        let mut memory = rows::map(config, (board, rank), seat.rows, device.as_ref())?;
        let copies = copies::serve(config, device.as_ref(), &mut memory)?;
        let mut mover = Self::assemble((board, rank), seat, memory, copies)?;
        mover.device = device;
        Ok(mover)
    }

    /// As [`create`](Self::create), with copies made by `copies`.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn with_copies(
        config: &EngineConfig,
        place: (&RankBoard, usize),
        seat: &Seat,
        copies: Arc<dyn CopyEngine>,
    ) -> Result<Self> {
        Self::assemble(place, seat, rows::map(config, place, seat.rows, None)?, copies)
    }

    fn assemble(
        (board, rank): (&RankBoard, usize),
        seat: &Seat,
        memory: HostMemory,
        copies: Arc<dyn CopyEngine>,
    ) -> Result<Self> {
        let arena = Arc::new(Arena::cut(memory, seat.block_bytes)?);
        if arena.slots().total() < seat.slots as usize {
            return Err(Error::Config {
                knob: "cpu_pool_size_bytes",
                value: arena.memory().len().to_string(),
                remedy: format!("{} slots of {} bytes do not fit", seat.slots, seat.block_bytes),
            });
        }
        board.sit_down(Some(rank))?;
        let lanes =
            Lane::ALL.map(|lane| Arc::new(LaneLog { lane, board: board.lane(rank, lane), book: Mutex::default() }));
        board.publish(rank, seat, arena.memory().place());
        let stores = seat.rows.stores(rank);
        Ok(Self { arena, copies, device: None, stores, lanes, owner: Owner::this_process() })
    }

    /// The GPU that pages may lie on.
    #[must_use]
    pub fn device(&self) -> Option<&Arc<dyn Device>> {
        self.device.as_ref()
    }

    /// Whether the slots are page-locked.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        matches!(self.arena.memory().pinned(), Pinned::Yes { .. })
    }

    /// Bytes of the row.
    #[must_use]
    pub fn arena_bytes(&self) -> usize {
        self.arena.memory().len()
    }

    /// Starts the copies of `ticket`, between page `i` and slot `i` of the list. Whatever happens, its end is published. A
    /// plan to store what another rank stores for all has ended well at once.
    ///
    /// # Errors
    /// What keeps the copies from starting; the ticket has then failed.
    pub fn submit(&self, ticket: RankTicket, slots: &[SlotId], pages: Pages) -> Result<()> {
        if ticket.lane() == Lane::Store && !self.stores {
            return self.pass_over(ticket);
        }
        let (log, transfer) = self.begin(ticket, slots, pages)?;
        let end = PublishOnDrop { log, ticket, ok: AtomicBool::new(false) };
        Ok(self.copies.submit(transfer, Box::new(move |outcome| end.take(&outcome)))?)
    }

    /// As [`submit`](Self::submit), and what the pages' owner does next comes after it: in its stream, or, for pages in host
    /// memory, when this returns. What fails at once is tried once more.
    ///
    /// # Errors
    /// What the second attempt failed with.
    pub fn load(&self, ticket: RankTicket, slots: &[SlotId], pages: Pages) -> Result<()> {
        let (log, transfer) = self.begin(ticket, slots, pages.clone())?;
        let end = Arc::new(PublishOnDrop { log, ticket, ok: AtomicBool::new(false) });
        let outcome = self.attempt(transfer, &end).or_else(|error| {
            log::warn!("the copies of ticket {ticket} are tried once more: {error}");
            self.attempt(self.transfer(ticket.lane(), slots, pages)?, &end)
        });
        Ok(outcome?)
    }

    fn pass_over(&self, ticket: RankTicket) -> Result<()> {
        self.owner.check()?;
        let log = &self.lanes[ticket.lane() as usize];
        log.accept(ticket)?;
        log.publish(ticket.number(), true);
        Ok(())
    }

    fn attempt(&self, transfer: Transfer, end: &Arc<PublishOnDrop>) -> Result<(), MemError> {
        if transfer.pages().place() == Place::Host {
            return self.copies.run(transfer).inspect(|()| end.succeed());
        }
        let end = Arc::clone(end);
        self.copies.submit(transfer, Box::new(move |outcome| end.take(&outcome)))
    }

    /// Puts all unfinished copies that read or write `pages`, which are about to be written, before what `stream` is given from
    /// now on; for pages in host memory, waits for them.
    ///
    /// # Errors
    /// [`Error::Mem`] for pages that this rank does not reach.
    pub fn fence(&self, stream: RawStream, pages: &Pages) -> Result<()> {
        self.owner.check()?;
        Ok(self.copies.fence(stream, pages)?)
    }

    /// Whether this rank stores: not where another one stores the same bytes for all.
    #[must_use]
    pub const fn stores(&self) -> bool {
        self.stores
    }

    /// Which plans of a lane have ended since the last call.
    #[must_use]
    pub fn take_ended(&self, lane: Lane) -> Vec<Ended> {
        std::mem::take(&mut self.lanes[lane as usize].book.lock().news)
    }

    /// Refuses new copies and waits for those under way, up to `timeout`; whether all have ended.
    #[must_use]
    pub fn shutdown(&self, timeout: Duration) -> bool {
        self.owner.is_elsewhere() || self.copies.stop(timeout)
    }

    fn begin(&self, ticket: RankTicket, slots: &[SlotId], pages: Pages) -> Result<(Arc<LaneLog>, Transfer)> {
        self.owner.check()?;
        let log = Arc::clone(&self.lanes[ticket.lane() as usize]);
        log.accept(ticket)?;
        match self.transfer(ticket.lane(), slots, pages) {
            Ok(transfer) => Ok((log, transfer)),
            Err(error) => {
                log.publish(ticket.number(), false);
                Err(error.into())
            }
        }
    }

    fn transfer(&self, lane: Lane, slots: &[SlotId], pages: Pages) -> Result<Transfer, MemError> {
        let direction = if lane == Lane::Store { Direction::Store } else { Direction::Load };
        if slots.len() != pages.count() {
            let (expected, actual) = (slots.len(), pages.count());
            return Err(MemError::PagesMismatch { what: "blocks of a plan", expected, actual });
        }
        self.copies.reaches(pages.place())?;
        // The engine waits for loads inside its steps, and for nothing else.
        let pages = if lane == Lane::Load { pages } else { pages.in_background() };
        let steps = (0..).zip(slots).map(|(page, &slot)| Step { slot, page }).collect();
        Transfer::new(direction, Arc::clone(&self.arena), steps, pages)
    }
}

/// Publishes the end of a ticket when nobody can change it any more: a failure unless it was told otherwise, for a callback that
/// is dropped, or a panic, is one.
struct PublishOnDrop {
    log: Arc<LaneLog>,
    ticket: RankTicket,
    ok: AtomicBool,
}

impl PublishOnDrop {
    fn take(&self, outcome: &Result<(), MemError>) {
        match outcome {
            Ok(()) => self.succeed(),
            Err(error) => log::warn!("the copies of ticket {} failed: {error}", self.ticket),
        }
    }

    fn succeed(&self) {
        self.ok.store(true, Ordering::Relaxed);
    }
}

impl Drop for PublishOnDrop {
    fn drop(&mut self) {
        self.log.publish(self.ticket.number(), *self.ok.get_mut());
    }
}

impl LaneLog {
    /// Takes the next plan. Those that this rank never saw have failed here.
    fn accept(&self, ticket: RankTicket) -> Result<()> {
        let mut book = self.book.lock();
        let (number, last) = (ticket.number(), book.last);
        if number <= last {
            return Err(Error::invalid(format!("ticket {ticket} was passed before: pass each plan once, in order")));
        }
        if number > last + 1 {
            log::warn!("{} plans before ticket {ticket} never came; they have failed", number - last - 1);
        }
        book.open.extend((last + 1..number).map(|missed| (missed, Some(false))));
        book.open.insert(number, None);
        book.last = number;
        self.tell(&mut book);
        Ok(())
    }

    fn publish(&self, number: u64, ok: bool) {
        let mut book = self.book.lock();
        book.open.insert(number, Some(ok));
        self.tell(&mut book);
    }

    /// Tells the planner what has ended and has nothing open before it.
    fn tell(&self, book: &mut LaneBook) {
        while let Some(entry) = book.open.first_entry()
            && let Some(ok) = *entry.get()
        {
            let number = *entry.key();
            entry.remove();
            self.board.publish(number, ok);
            book.news.push(Ended { ticket: RankTicket::new(self.lane, number), ok });
        }
    }
}

impl Drop for RankMover {
    fn drop(&mut self) {
        if self.owner.is_elsewhere() {
            // As an engine in a forked child: locks inside may be held by threads that are not here.
            let _ = std::mem::ManuallyDrop::new((Arc::clone(&self.arena), Arc::clone(&self.copies)));
        } else if !self.shutdown(Duration::from_secs(5)) {
            log::warn!("copies were still in flight when their rank ended");
        }
    }
}
