//! Decides for all ranks, and learns from their board what came of it.

use std::collections::{BTreeMap, HashSet};
use std::sync::OnceLock;
use std::time::Duration;

use kvortex_mem::arena::Arena;
use kvortex_mem::board::{Failed, LaneBoard, Seen};
use kvortex_mem::copy::gpu::Lane;

use super::below::Below;
use super::board::{RankBoard, Seat};
use super::counts::{Counters, Counts};
use super::groups::Groups;
use super::hybrid;
use super::rows::{OpenRows, Rows};
use super::ticket::{Ended, RankTicket};
use crate::error::{Error, Result};
use crate::eviction::Watermarks;
use crate::fork::Owner;
use crate::index::{Changed, IndexStats};
use crate::key::{KEY_BYTES, Keys};
use crate::lease::Lease;
use crate::lower::{Lower, LowerStats, Promotion, Reach};
use crate::namespace::{Namespace, Value};
use crate::plan::{Plan, TicketId};
use crate::planner::Planner;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering};
use crate::terms::{FOREVER, Terms, Tick};
use crate::tier::disk::DiskConfig;
use crate::tier::host::{SlotId, SlotPool};

/// Plans for the movers of all ranks. Its plans must reach each of them once, in the order of their tickets.
pub struct RankPlanner {
    planner: Arc<Planner>,
    slots: SlotPool,
    board: RankBoard,
    seat: Seat,
    /// Opened when all ranks are there, if the planner may reach them.
    rows: OnceLock<Result<OpenRows>>,
    below: Below,
    book: Mutex<Book>,
    evicted: Arc<AtomicU64>,
    counters: Counters,
    owner: Owner,
}

/// Keys, taken along.
type Packed = Vec<[u8; KEY_BYTES]>;

/// A plan to store.
#[derive(Debug)]
pub struct Stored {
    /// Its number; `None` if nothing is to be copied.
    pub ticket: Option<RankTicket>,
    /// Positions of the keys to be stored, ascending.
    pub positions: Vec<u32>,
    /// The slot of each.
    pub slots: Vec<SlotId>,
    /// How many blocks found no room.
    pub refused: usize,
}

/// What is under way.
struct Book {
    lanes: [LaneBook; 3],
    /// Loads that failed: nothing that rests on one is ever stored.
    failed_loads: HashSet<RankTicket>,
    /// A load inside a step failed: what the engine computed since then rests on bytes that never came.
    broken: bool,
    /// Stores that have ended, if somebody watches.
    ended_stores: Option<Vec<Ended>>,
}

/// What has changed in the index, and the stores that have ended since.
#[derive(Debug, Default)]
pub struct Watched {
    /// Blocks that have become visible, and blocks forgotten.
    pub changed: Changed,
    /// Stores of which nothing more will become visible.
    pub stores: Vec<Ended>,
}

/// The plans of one lane, by their numbers.
struct LaneBook {
    lane: Lane,
    /// One for each rank that takes part.
    readers: Vec<Reader>,
    last: u64,
    open: BTreeMap<u64, Open>,
}

struct Reader {
    board: LaneBoard,
    seen: Seen,
    failed: HashSet<u64>,
}

struct Open {
    plan: TicketId,
    /// Of a store, to be offered to the tier below once it has ended well.
    keys: Packed,
    failed: bool,
    copied: bool,
    /// Loads that this store's blocks were computed from and that have not ended.
    rests_on: Vec<RankTicket>,
}

impl RankPlanner {
    /// A planner for the ranks of `board`, which all must have `seat`. Only the first `storing` ranks are told to store:
    /// one where all would store the same bytes, as they do in one row.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) when the board has a planner.
    pub fn new(board: RankBoard, seat: Seat, storing: usize, (watermark, ratio): (f64, f64)) -> Result<Self> {
        board.sit_down(None)?;
        let storing = if seat.rows == Rows::One { 1 } else { storing };
        let slots = SlotPool::new(seat.slots);
        let (marks, evicted) = (Watermarks::new(slots.total(), watermark, ratio), Arc::<AtomicU64>::default());
        let lanes = Lane::ALL.map(|lane| {
            let ranks = if lane == Lane::Store { storing.clamp(1, board.ranks()) } else { board.ranks() };
            let readers = (0..ranks).map(|rank| Reader::of(board.lane(rank, lane))).collect();
            LaneBook { lane, readers, last: 0, open: BTreeMap::new() }
        });
        let book = Book { lanes, failed_loads: HashSet::new(), broken: false, ended_stores: None };
        Ok(Self {
            planner: Arc::new(Planner::new(slots.clone(), marks, Arc::clone(&evicted))),
            below: Below::default(),
            book: Mutex::new(book),
            owner: Owner::this_process(),
            rows: OnceLock::new(),
            slots,
            board,
            seat,
            evicted,
            counters: Counters::default(),
        })
    }

    /// The same with a tier below, which is opened when all ranks are there. Lookups do not wait for it: see
    /// [`find_below`](Self::find_below).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) when the rows are private.
    pub fn with_disk(mut self, disk: DiskConfig, deadline: Duration) -> Result<Self> {
        if self.seat.rows == Rows::Private {
            return Err(Error::invalid("a tier below needs rows that the planner reaches: make them open, or one"));
        }
        self.below = Below::configured(disk, deadline);
        Ok(self)
    }

    /// Whether every rank is there and has what this planner counts on. Nothing must be promised before. The first time that it
    /// is so the tier below is opened, which takes a moment; one that cannot be is a warning.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) when a rank has something else.
    pub fn is_ready(&self) -> Result<bool> {
        let ready = self.board.agrees(&self.seat)?;
        if ready && self.seat.rows != Rows::Private {
            self.rows.get_or_init(|| OpenRows::of(&self.board, &self.seat));
            self.below.open_once(|| Ok((self.map_rows()?, self.identity()?)), &self.planner);
        }
        Ok(ready)
    }

    /// Whose blocks these are, beyond this process: the seat's namespace, and how the KV of each rank was seen to lie.
    fn identity(&self) -> Result<Namespace> {
        let seen: Vec<[u8; 32]> = (0..self.board.ranks()).map(|rank| self.board.seen(rank)).collect();
        if seen.contains(&[0; 32]) {
            return Err(Error::invalid("a rank did not tell how its KV lies: describe it before its mover is made"));
        }
        let seen = seen.into_iter().map(|seen| Value::Bytes(seen.to_vec())).collect();
        let seat = Value::Bytes(self.seat.namespace.digest().to_vec());
        Ok(Namespace::builder().field("seat", seat).field("ranks", Value::List(seen)).finish())
    }

    fn map_rows(&self) -> Result<Vec<Arc<Arena>>> {
        let rows = self.rows.get_or_init(|| OpenRows::of(&self.board, &self.seat));
        rows.as_ref().map_err(Clone::clone)?.map(&self.seat)
    }

    /// Maps the rows into this process, in the order of ranks; the one row of all ranks is the only one. Who holds a lease
    /// on a block reads its slot there, and who holds the claim writes it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) while ranks are missing, and where the rows are private;
    /// [`Error::Mem`](crate::Error::Mem) when they cannot be opened or mapped.
    pub fn attach_rows(&self) -> Result<Vec<Arc<Arena>>> {
        self.owner.check()?;
        if self.seat.rows == Rows::Private {
            return Err(Error::invalid(
                "each rank's row is private: only rows that are open, or one, can be mapped here",
            ));
        }
        if !self.is_ready()? {
            return Err(Error::invalid("not every rank is there yet: wait until the planner is ready"));
        }
        self.map_rows()
    }

    /// Leases the longest prefix of `keys` that is there.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn lease_prefix(&self, keys: Keys<'_>) -> Result<Lease> {
        self.owner.check()?;
        Ok(self.planner.index().lease_prefix(keys))
    }

    /// As `lease_prefix`, of several groups: the blocks of the longest hit, 0 for none, and a lease on what it needs beyond the
    /// `first` blocks that the engine has, block after block, of each the groups in order. `hashes` name the blocks from `first`
    /// on; the hit has at most `most`.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn lease_groups(&self, groups: &Groups, hashes: Keys<'_>, first: usize, most: usize) -> Result<(usize, Lease)> {
        self.owner.check()?;
        Ok(hybrid::lease(self.planner.index(), groups, hashes, first, most))
    }

    /// Plans to load the blocks of `lease`, which is held until every rank has them, inside a step or in the background.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn plan_load(&self, lease: Lease, background: bool) -> Result<(RankTicket, Vec<SlotId>)> {
        self.owner.check()?;
        let slots = lease.slots().to_vec();
        let lane = if background { Lane::Background } else { Lane::Load };
        let mut book = self.book.lock();
        let plan = self.planner.plan_leased(lease);
        Ok((book.lane(lane).enter(plan, Packed::new(), Vec::new()), slots))
    }

    /// Plans to store the blocks that are not there. They become visible once every storing rank has them and every load that
    /// they were computed from has succeeded: those of `rests_on`, and all inside steps that have not ended.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn plan_store(&self, keys: Keys<'_>, rests_on: &[RankTicket]) -> Result<Stored> {
        self.plan_store_on(keys, &[], rests_on)
    }

    /// As [`plan_store`](Self::plan_store), on terms for each key; without, on the usual ones. They hold for blocks that are
    /// there as well.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn plan_store_on(&self, keys: Keys<'_>, terms: &[Terms], rests_on: &[RankTicket]) -> Result<Stored> {
        self.owner.check()?;
        let mut book = self.book.lock();
        if book.broken || rests_on.iter().any(|ticket| book.failed_loads.contains(ticket)) {
            self.counters.refuse(keys.len());
            return Ok(Stored { ticket: None, positions: Vec::new(), slots: Vec::new(), refused: keys.len() });
        }
        let planned = self.planner.plan_store_on(keys, terms);
        self.counters.refuse(planned.refused);
        let Plan { ticket: plan, steps, .. } = planned.plan;
        let (positions, slots): (Vec<u32>, Vec<SlotId>) = steps.iter().map(|step| (step.page, step.slot)).unzip();
        if steps.is_empty() {
            self.planner.settle(plan, true);
            self.below.with(|lower| lower.offer(Keys::from_slices(&lasting(keys, terms))));
            return Ok(Stored { ticket: None, positions, slots, refused: planned.refused });
        }
        let rests_on = book.unfinished(rests_on);
        // All of them: one that is there may not be below any more.
        let offered = self.below.with(|_| lasting(keys, terms));
        let ticket = Some(book.lane(Lane::Store).enter(plan, offered.unwrap_or_default(), rests_on));
        Ok(Stored { ticket, positions, slots, refused: planned.refused })
    }

    /// Looks at the board, makes visible what may be, and tells which loads have ended. Costs a few reads when nothing has.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn poll(&self) -> Result<Vec<Ended>> {
        self.owner.check()?;
        let mut book = self.book.lock();
        book.lanes.iter_mut().filter(|lane| !lane.open.is_empty()).for_each(LaneBook::look);
        let mut ended = Vec::new();
        for lane in [Lane::Load, Lane::Background] {
            while let Some((ticket, open)) = book.lane(lane).take_ended() {
                let ok = !open.failed;
                self.planner.settle(open.plan, ok);
                book.load_ended(ticket, ok);
                ended.push(Ended { ticket, ok });
            }
        }
        while let Some((ticket, open)) = book.lane(Lane::Store).take_ended() {
            let ok = !open.failed;
            self.counters.stored(self.planner.settle(open.plan, ok), ok);
            book.ended_stores.iter_mut().for_each(|stores| stores.push(Ended { ticket, ok }));
            if ok && !open.keys.is_empty() {
                self.below.with(|lower| lower.offer(Keys::from_slices(&open.keys)));
            }
        }
        Ok(ended)
    }

    /// Looks below for blocks of a prefix that are not in memory; `None` if that would not make it longer. Does no I/O: the
    /// blocks come once [`promote`](Self::promote) was called.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn find_below(&self, keys: Keys<'_>) -> Result<Option<Promotion>> {
        self.owner.check()?;
        Ok(self.below.with(|lower| lower.find(keys, Reach::Prefix)).flatten())
    }

    /// The longest hit of several groups, as in [`lease_groups`](Self::lease_groups), that could be made of what is in memory and
    /// below, and the keys of what it needs, for [`find_below`](Self::find_below). `None` if nothing is below.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn reach_groups(
        &self,
        groups: &Groups,
        hashes: Keys<'_>,
        range: (usize, usize),
    ) -> Result<Option<(usize, Packed)>> {
        self.owner.check()?;
        let index = self.planner.index();
        Ok(self.below.with(|lower| hybrid::reach(&hybrid::Somewhere { index, lower }, groups, hashes, range)))
    }

    /// Starts to bring blocks up, and returns at once.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn promote(&self, promotion: &Promotion) -> Result<()> {
        self.owner.check()?;
        self.below.with(|lower| lower.start(promotion));
        Ok(())
    }

    /// Forgets the blocks whose life is over at `now` of the caller's clock, and returns how many those are.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn expire(&self, now: Tick) -> Result<usize> {
        self.owner.check()?;
        let expired = self.planner.index().expire(now);
        self.counters.expire(expired);
        Ok(expired)
    }

    /// Begins to note what [`take_watched`](Self::take_watched) tells.
    pub fn watch(&self) {
        self.book.lock().ended_stores.get_or_insert_default();
        self.planner.index().watch();
    }

    /// What has changed since [`watch`](Self::watch) or the last call. What became visible by a store is told with the store's
    /// end or before.
    pub fn take_watched(&self) -> Watched {
        let mut book = self.book.lock();
        let changed = self.planner.index().take_changes();
        let stores = book.ended_stores.as_mut().map(std::mem::take).unwrap_or_default();
        Watched { changed, stores }
    }

    /// What has been counted so far. Costs a few reads.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counters.read(&self.slots, self.evicted.load(Ordering::Relaxed))
    }

    /// Forgets every block, also below, and returns how many were visible; what is being stored never becomes visible.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn reset(&self) -> Result<usize> {
        self.owner.check()?;
        Ok(self.below.with(|lower| lower.reset().0).unwrap_or_else(|| self.planner.index().clear()))
    }

    /// Leaves the tier below, for good: nothing goes there or comes from there any more. True if what was under way has ended in
    /// time.
    pub fn leave_below(&self, patience: Duration) -> bool {
        self.owner.is_elsewhere() || self.below.leave(patience)
    }

    /// Waits until what became visible so far is kept below or given up. True if that was in time, or nothing is below.
    ///
    /// # Errors
    /// [`Error::Forked`](crate::Error::Forked) in a forked child.
    pub fn flush(&self, patience: Duration) -> Result<bool> {
        self.owner.check()?;
        Ok(self.below.with(|lower| lower.flush(patience)).unwrap_or(true))
    }

    /// Numbers of the tier below, while there is one.
    #[must_use]
    pub fn lower_stats(&self) -> Option<LowerStats> {
        self.below.with(Lower::stats)
    }

    /// Plans that have not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.book.lock().lanes.iter().map(|lane| lane.open.len()).sum()
    }

    /// Blocks that fit, blocks that have a slot, and blocks evicted so far.
    #[must_use]
    pub fn room(&self) -> (usize, usize, u64) {
        let total = self.slots.total();
        (total, total - self.slots.free(), self.evicted.load(Ordering::Relaxed))
    }

    /// Numbers of the index at this moment.
    #[must_use]
    pub fn index_stats(&self) -> IndexStats {
        self.planner.index_stats()
    }
}

/// The keys of blocks whose life has no end: no clock reaches what is below.
fn lasting(keys: Keys<'_>, terms: &[Terms]) -> Vec<[u8; KEY_BYTES]> {
    let ends = |i: usize| terms.get(i).is_some_and(|terms| terms.until != FOREVER);
    keys.iter().enumerate().filter(|&(i, _)| !ends(i)).map(|(_, key)| *key.as_bytes()).collect()
}

impl Reader {
    fn of(board: LaneBoard) -> Self {
        Self { board, seen: Seen::default(), failed: HashSet::new() }
    }

    /// Takes in what is new; if nobody knows which of `open` failed, all that ended did.
    fn look(&mut self, open: &BTreeMap<u64, Open>) {
        match self.board.look(&mut self.seen) {
            Failed::These(numbers) => self.failed.extend(numbers),
            Failed::Any => self.failed.extend(open.range(..=self.seen.watermark).map(|(number, _)| number)),
        }
    }
}

impl LaneBook {
    fn enter(&mut self, plan: TicketId, keys: Packed, rests_on: Vec<RankTicket>) -> RankTicket {
        self.last += 1;
        self.open.insert(self.last, Open { plan, keys, failed: false, copied: false, rests_on });
        RankTicket::new(self.lane, self.last)
    }

    fn look(&mut self) {
        self.readers.iter_mut().for_each(|reader| reader.look(&self.open));
        let watermark = self.readers.iter().map(|reader| reader.seen.watermark).min().unwrap_or(0);
        for (number, open) in self.open.range_mut(..=watermark).filter(|(_, open)| !open.copied) {
            open.copied = true;
            for reader in &mut self.readers {
                open.failed |= reader.failed.remove(number);
            }
        }
    }

    /// A plan whose copies, and all that it rests on, have ended.
    fn take_ended(&mut self) -> Option<(RankTicket, Open)> {
        let number = *self.open.iter().find(|(_, open)| open.copied && open.rests_on.is_empty())?.0;
        Some((RankTicket::new(self.lane, number), self.open.remove(&number)?))
    }
}

impl Book {
    fn lane(&mut self, lane: Lane) -> &mut LaneBook {
        &mut self.lanes[lane as usize]
    }

    fn unfinished(&mut self, named: &[RankTicket]) -> Vec<RankTicket> {
        let named = named.iter().copied().filter(|ticket| ticket.lane() != Lane::Store);
        let mut loads: Vec<_> = named.filter(|&ticket| self.is_open(ticket)).collect();
        loads.extend(self.lane(Lane::Load).open.keys().map(|&number| RankTicket::new(Lane::Load, number)));
        loads
    }

    fn is_open(&self, ticket: RankTicket) -> bool {
        self.lanes[ticket.lane() as usize].open.contains_key(&ticket.number())
    }

    fn load_ended(&mut self, load: RankTicket, ok: bool) {
        for open in self.lane(Lane::Store).open.values_mut().filter(|open| open.rests_on.contains(&load)) {
            open.rests_on.retain(|&ticket| ticket != load);
            open.failed |= !ok;
        }
        if !ok {
            self.failed_loads.insert(load);
            self.broken |= load.lane() == Lane::Load;
        }
    }
}
