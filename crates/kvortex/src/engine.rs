//! Planner and mover in one process.

use std::ptr::NonNull;
use std::time::{Duration, Instant};

use kvortex_mem::arena::Arena;
use kvortex_mem::copy::{CopyEngine, check_targets};
use kvortex_mem::device::{Device, RawStream};
use kvortex_mem::error::MemError;
use kvortex_mem::map::HostMemory;
use kvortex_mem::span::{Pages, Place};
use parking_lot::RwLock;

use crate::config::EngineConfig;
use crate::copies;
use crate::error::{Error, Result};
use crate::eviction::Watermarks;
use crate::flight::{self, Flight};
use crate::fork::Owner;
use crate::key::{Keys, MAX_TOKENS};
use crate::layout::Layout;
use crate::lease::Lease;
use crate::lower::{self, Lower, Reach};
use crate::mask::BlockMask;
use crate::metrics::Metrics;
use crate::mover::Mover;
use crate::namespace::Namespace;
use crate::plan::{Kind, Report};
use crate::planner::Planner;
use crate::stats::Stats;
use crate::sync::{Arc, Ordering};
use crate::ticket::Ticket;
use crate::tier::host::Host;

/// Keeps blocks of one layout and one namespace in host memory. Shared by any number of threads.
pub struct Engine {
    /// Leaked, not dropped, in a forked child.
    inner: Arc<Inner>,
}

struct Inner {
    config: EngineConfig,
    owner: Owner,
    state: RwLock<State>,
    copies: Arc<dyn CopyEngine>,
    device: Option<Arc<dyn Device>>,
    metrics: Arc<Metrics>,
}

enum State {
    /// The memory is there, the size of a block is not known yet.
    Unbound(HostMemory),
    Bound(Arc<Bound>),
    Closed,
}

/// An engine that knows its blocks.
pub(crate) struct Bound {
    pub(crate) layout: Layout,
    pub(crate) namespace: Namespace,
    pub(crate) planner: Arc<Planner>,
    pub(crate) mover: Mover,
    pub(crate) metrics: Arc<Metrics>,
    /// Dropped last but for the arena: what it reads goes there.
    pub(crate) lower: Option<Lower>,
}

/// Blocks that stay where they are while this lives, with their addresses.
#[must_use = "dropping this ends the lease"]
pub struct LeasedBlocks {
    lease: Lease,
    host: Option<Host>,
    block_bytes: usize,
}

impl LeasedBlocks {
    /// Number of blocks held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lease.len()
    }

    /// Whether no block is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lease.is_empty()
    }

    /// Where block `i` begins: [`block_bytes`](Self::block_bytes) bytes that nobody writes while this lives.
    #[must_use]
    pub fn addr(&self, i: usize) -> Option<NonNull<u8>> {
        self.host.as_ref()?.addr(*self.lease.slots().get(i)?)
    }

    /// Bytes of one block.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        self.block_bytes
    }
}

impl Engine {
    /// Maps the arena, page-locked if the configuration names a GPU. Starts no thread that lasts.
    ///
    /// # Errors
    /// [`Error::Config`] for a knob that cannot work, [`Error::Mem`] when the memory or the GPU is not to be had.
    pub fn create(config: EngineConfig) -> Result<Self> {
        config.validate()?;
        let device = copies::open(config.gpu.device)?;
        Self::build(config, device)
    }

    /// As [`create`](Self::create), with pages in host memory or on `device`, whatever the configuration names.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn with_device(config: EngineConfig, device: Arc<dyn Device>) -> Result<Self> {
        config.validate()?;
        Self::build(config, Some(device))
    }

    /// As [`create`](Self::create), with copies made by `copies`, which the engine stops when it is shut down.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn with_copies(config: EngineConfig, copies: Arc<dyn CopyEngine>) -> Result<Self> {
        config.validate()?;
        let memory = copies::map(&config, None)?;
        Self::assemble(config, memory, copies, None)
    }

    fn build(config: EngineConfig, device: Option<Arc<dyn Device>>) -> Result<Self> {
        let mut memory = copies::map(&config, device.as_ref())?;
        let copies = copies::serve(&config, device.as_ref(), &mut memory)?;
        Self::assemble(config, memory, copies, device)
    }

    fn assemble(
        config: EngineConfig,
        memory: HostMemory,
        copies: Arc<dyn CopyEngine>,
        device: Option<Arc<dyn Device>>,
    ) -> Result<Self> {
        let (block_bytes, namespace) = (config.block_bytes, config.namespace);
        let engine = Self {
            inner: Arc::new(Inner {
                copies,
                device,
                config,
                owner: Owner::this_process(),
                state: RwLock::new(State::Unbound(memory)),
                metrics: Arc::default(),
            }),
        };
        if let Some(block_bytes) = block_bytes {
            engine.bind(block_bytes, namespace)?;
        }
        Ok(engine)
    }

    /// The GPU that pages may lie on.
    #[must_use]
    pub fn device(&self) -> Option<&Arc<dyn Device>> {
        self.inner.device.as_ref()
    }

    /// Makes what `stream` of the GPU is given from now on wait for every unfinished copy that reads or writes `pages`, which
    /// are about to be written. The host does not wait.
    ///
    /// # Errors
    /// [`Error::Mem`] when the pages are not on the engine's GPU or the GPU is lost.
    pub fn fence(&self, stream: RawStream, pages: &Pages) -> Result<()> {
        self.inner.owner.check()?;
        if let Some(bound) = self.bound()?.filter(|_| pages.place() == Place::Host)
            && let Some(lower) = &bound.lower
        {
            // Loads that have not been given to the copies yet; each goes on when its time is over.
            lower.settle(Instant::now() + 2 * self.inner.config.disk_read_deadline, false);
        }
        Ok(self.inner.copies.fence(stream, pages)?)
    }

    /// Fixes the size of a block and the namespace. Saying the same again changes nothing.
    ///
    /// # Errors
    /// [`Error::Layout`] or [`Error::Namespace`] when the engine is bound to another, [`Error::Config`] when the arena
    /// has no room for one block.
    pub fn bind(&self, block_bytes: usize, namespace: Namespace) -> Result<()> {
        let bound = self.bound_for(block_bytes, namespace)?;
        bound.layout.check(block_bytes)?;
        if bound.namespace != namespace {
            let (expected, found) = (bound.namespace.to_string(), namespace.to_string());
            return Err(Error::Namespace { expected, found });
        }
        Ok(())
    }

    /// Stores the blocks that are not there yet, page `i` under key `i`, and returns when they are visible. An engine
    /// that is not bound takes the size of a page for that of its blocks.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] or [`Error::Layout`] for pages that do not fit, with nothing changed;
    /// [`Error::Transfer`] when a copy failed.
    pub fn save(&self, keys: Keys<'_>, pages: Pages) -> Result<Report> {
        match self.start_save(keys, &pages)? {
            Some(flight) => flight.run(pages),
            None => Ok(Report::empty(Kind::Save, 0)),
        }
    }

    /// Copies the blocks that are there into their pages and returns when every byte is in place. Pages of missing blocks
    /// are left as they are.
    ///
    /// # Errors
    /// As [`save`](Self::save); also for pages that are read-only or overlap.
    pub fn load(&self, keys: Keys<'_>, pages: Pages) -> Result<Report> {
        self.promote(keys, Reach::Each)?;
        match self.start_load(keys, &pages)? {
            Some(flight) => flight.run(pages),
            None => Ok(self.all_missing(keys.len())),
        }
    }

    /// As [`save`](Self::save), but returns at once. The pages must not change until the ticket is done.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_async(&self, keys: Keys<'_>, pages: Pages) -> Result<Ticket> {
        self.save_after(keys, pages, &[])
    }

    /// As [`save_async`](Self::save_async), of blocks that were computed from what `loads` brought: they become visible only
    /// once all of those have succeeded, and never if one has failed.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_after(&self, keys: Keys<'_>, pages: Pages, loads: &[Ticket]) -> Result<Ticket> {
        match self.start_save(keys, &pages)? {
            Some(flight) => flight.submit(pages, loads),
            None => Ok(flight::landed(Report::empty(Kind::Save, 0))),
        }
    }

    /// As [`load`](Self::load), but returns at once. The pages are the engine's until the ticket is done.
    ///
    /// Blocks that are only in the tier below are brought up, too. A load into host memory waits for them, as long as a caller of
    /// [`load`](Self::load) would; one into a device's memory, which streams may wait for, is given what is there, and the next one
    /// finds the others.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_async(&self, keys: Keys<'_>, pages: Pages) -> Result<Ticket> {
        let Some(bound) = self.target(keys, &pages)? else { return Ok(flight::landed(self.all_missing(keys.len()))) };
        if let Some(lower) = &bound.lower
            && let Some(promotion) = lower.find(keys, Reach::Each)
        {
            if pages.place() == Place::Host {
                let (ticket, go) = Flight::load_later(&bound, keys, pages);
                lower.after(promotion, go);
                return Ok(ticket);
            }
            lower.start(&promotion);
        }
        Flight::load(bound, keys).submit(pages, &[])
    }

    /// Waits for a ticket; for ever without a timeout.
    ///
    /// # Errors
    /// What the save or load failed with; [`Error::Timeout`] when it goes on.
    pub fn wait(&self, ticket: &Ticket, timeout: Option<Duration>) -> Result<Report> {
        self.inner.owner.check()?;
        ticket.wait(timeout)
    }

    /// Which blocks are there, or seem to be in the tier below. Takes no lease and changes no order.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Forked`], or too many keys.
    pub fn check(&self, keys: Keys<'_>) -> Result<BlockMask> {
        let bound = self.bound_if(keys)?;
        let Some(bound) = bound else { return Ok(BlockMask::new(keys.len())) };
        let mut mask = bound.planner.index().ready_mask(keys);
        if let Some(lower) = &bound.lower {
            mask.include(&lower.contains(keys));
        }
        Ok(mask)
    }

    /// Length of the longest prefix that is there, in blocks, once what a tier below has of it was brought up. Takes no lease.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn match_prefix(&self, keys: Keys<'_>) -> Result<usize> {
        self.promote(keys, Reach::Prefix)?;
        Ok(self.bound_if(keys)?.map_or(0, |bound| bound.planner.index().prefix_len(keys)))
    }

    /// Leases the longest prefix that is there. Blocks not found count as misses; those found count as hits when they are
    /// loaded.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn lease_prefix(&self, keys: Keys<'_>) -> Result<LeasedBlocks> {
        self.promote(keys, Reach::Prefix)?;
        let bound = self.bound_if(keys)?;
        let leased = leased(bound.as_deref(), |bound| bound.planner.index().lease_prefix(keys));
        self.inner.metrics.misses.fetch_add((keys.len() - leased.len()) as u64, Ordering::Relaxed);
        Ok(leased)
    }

    /// Leases every block that is there, to be read in place: block `j` of the lease is the `j`-th one of the mask.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn lease_each(&self, keys: Keys<'_>) -> Result<(LeasedBlocks, BlockMask)> {
        self.promote(keys, Reach::Each)?;
        let bound = self.bound_if(keys)?;
        let mut mask = BlockMask::new(keys.len());
        let leased = leased(bound.as_deref(), |bound| {
            let (lease, found) = bound.planner.index().lease_each(keys);
            mask = found;
            lease
        });
        self.inner.metrics.hits.fetch_add(leased.len() as u64, Ordering::Relaxed);
        self.inner.metrics.misses.fetch_add((keys.len() - leased.len()) as u64, Ordering::Relaxed);
        Ok((leased, mask))
    }

    /// Forgets every block and returns how many there were. Leased blocks and blocks being copied keep their bytes until
    /// that ends, but nobody finds them any more.
    ///
    /// # Errors
    /// [`Error::Closed`] or [`Error::Forked`].
    pub fn reset(&self) -> Result<usize> {
        let Some(bound) = self.bound()? else { return Ok(0) };
        Ok(match &bound.lower {
            Some(lower) => lower.reset().0,
            None => bound.planner.index().clear(),
        })
    }

    /// Refuses new work, waits for copies in flight up to `timeout`, and lets go of the memory once no lease and no copy
    /// uses it. Returns whether all copies ended in time. A second call waits again.
    pub fn shutdown(&self, timeout: Duration) -> bool {
        if self.inner.owner.is_elsewhere() {
            return true;
        }
        let state = std::mem::replace(&mut *self.inner.state.write(), State::Closed);
        let end = Instant::now() + timeout;
        // What waits for the tier below goes on with what is there.
        let mut ended = lower_of(&state).is_none_or(|lower| lower.settle(end, true));
        ended &= self.inner.copies.stop(end.saturating_duration_since(Instant::now()));
        if !ended {
            log::warn!(
                "shut down with copies in flight after {} ms; their memory stays until they end",
                timeout.as_millis()
            );
        }
        ended &= lower_of(&state).is_none_or(|lower| lower.stop(end.saturating_duration_since(Instant::now())));
        if !ended {
            lower::drop_elsewhere(state);
        }
        ended
    }

    /// Waits until the tier below has kept, or given up, what was saved so far. True if that was in time, or there is none.
    ///
    /// # Errors
    /// [`Error::Closed`] or [`Error::Forked`].
    pub fn flush(&self, patience: Duration) -> Result<bool> {
        let bound = self.bound()?;
        Ok(bound.and_then(|bound| bound.lower.as_ref().map(|lower| lower.flush(patience))).unwrap_or(true))
    }

    /// Numbers at this moment.
    pub fn stats(&self) -> Stats {
        let forked = self.inner.owner.is_elsewhere();
        let bound = if forked { None } else { self.bound().ok().flatten() };
        Stats::collect(&self.inner.config, &self.inner.metrics, bound.as_deref())
    }

    /// Bytes of one block, once the engine is bound.
    #[must_use]
    pub fn block_bytes(&self) -> Option<usize> {
        Some(self.bound().ok()??.layout.block_bytes())
    }

    /// Blocks that fit, once the engine is bound.
    #[must_use]
    pub fn capacity_blocks(&self) -> Option<usize> {
        Some(self.bound().ok()??.mover.host().slots().total())
    }

    /// Whether the engine was shut down.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self.bound(), Err(Error::Closed))
    }

    /// The bound engine; `None` while the size of a block is not known.
    fn bound(&self) -> Result<Option<Arc<Bound>>> {
        self.inner.owner.check()?;
        match &*self.inner.state.read() {
            State::Unbound(_) => Ok(None),
            State::Bound(bound) => Ok(Some(Arc::clone(bound))),
            State::Closed => Err(Error::Closed),
        }
    }

    fn bound_if(&self, keys: Keys<'_>) -> Result<Option<Arc<Bound>>> {
        check_count(keys.len())?;
        self.bound()
    }

    /// Brings up what is wanted from the tier below.
    fn promote(&self, keys: Keys<'_>, reach: Reach) -> Result<()> {
        if let Some(bound) = self.bound_if(keys)?
            && let Some(lower) = &bound.lower
        {
            lower.promote(keys, reach);
        }
        Ok(())
    }

    /// The bound engine, bound now if it was not.
    fn bound_for(&self, block_bytes: usize, namespace: Namespace) -> Result<Arc<Bound>> {
        if let Some(bound) = self.bound()? {
            return Ok(bound);
        }
        let layout = Layout::new(block_bytes)?;
        let mut state = self.inner.state.write();
        match std::mem::replace(&mut *state, State::Closed) {
            State::Unbound(memory) => match Arena::fit(memory.len(), block_bytes) {
                Ok(_) => {
                    let bound = Arc::new(self.inner.cut(memory, layout, namespace)?);
                    *state = State::Bound(Arc::clone(&bound));
                    Ok(bound)
                }
                Err(error) => {
                    *state = State::Unbound(memory);
                    Err(too_small(self.inner.config.pool_bytes, &error))
                }
            },
            State::Bound(bound) => {
                *state = State::Bound(Arc::clone(&bound));
                Ok(bound)
            }
            State::Closed => Err(Error::Closed),
        }
    }

    fn check_pages(&self, keys: Keys<'_>, pages: &Pages) -> Result<()> {
        check_count(keys.len())?;
        if keys.len() != pages.count() {
            let (keys, pages) = (keys.len(), pages.count());
            return Err(Error::invalid(format!(
                "{keys} keys do not go with {pages} blocks of data: give one block for each key"
            )));
        }
        Ok(self.inner.copies.reaches(pages.place())?)
    }

    fn start_save(&self, keys: Keys<'_>, pages: &Pages) -> Result<Option<Flight>> {
        self.check_pages(keys, pages)?;
        if keys.is_empty() {
            return self.bound().map(|_| None);
        }
        let bound = self.bound_for(pages.page_bytes(), self.inner.config.namespace)?;
        bound.layout.check(pages.page_bytes())?;
        Ok(Some(Flight::save(bound, keys)))
    }

    fn start_load(&self, keys: Keys<'_>, pages: &Pages) -> Result<Option<Flight>> {
        Ok(self.target(keys, pages)?.map(|bound| Flight::load(bound, keys)))
    }

    /// The bound engine, if it may have some of `keys` and the pages can be loaded into.
    fn target(&self, keys: Keys<'_>, pages: &Pages) -> Result<Option<Arc<Bound>>> {
        self.check_pages(keys, pages)?;
        if !pages.is_writable() {
            return Err(bad_target(&MemError::ReadOnly));
        }
        let Some(bound) = self.bound()?.filter(|_| !keys.is_empty()) else { return Ok(None) };
        bound.layout.check(pages.page_bytes())?;
        check_targets(pages, bound.mover.host().arena()).map_err(|error| bad_target(&error))?;
        Ok(Some(bound))
    }

    fn all_missing(&self, len: usize) -> Report {
        let report = Report::empty(Kind::Load, len);
        self.inner.metrics.count(&report);
        report
    }
}

impl Inner {
    fn cut(&self, memory: HostMemory, layout: Layout, namespace: Namespace) -> Result<Bound> {
        let arena = Arc::new(Arena::cut(memory, layout.block_bytes())?);
        let slots = arena.slots().clone();
        let marks = Watermarks::new(slots.total(), self.config.watermark, self.config.ratio);
        let planner = Arc::new(Planner::new(slots.clone(), marks, Arc::clone(&self.metrics.evictions)));
        let lower = copies::lower(&self.config, &arena, namespace, &planner);
        log::info!(
            "bound: {} blocks of {} bytes, {} copy threads, namespace {namespace}",
            slots.total(),
            layout.block_bytes(),
            self.config.threads
        );
        Ok(Bound {
            layout,
            namespace,
            planner,
            mover: Mover::new(Host::new(arena), Arc::clone(&self.copies)),
            metrics: Arc::clone(&self.metrics),
            lower,
        })
    }
}

fn lower_of(state: &State) -> Option<&Lower> {
    match state {
        State::Bound(bound) => bound.lower.as_ref(),
        _ => None,
    }
}

fn leased(bound: Option<&Bound>, take: impl FnOnce(&Bound) -> Lease) -> LeasedBlocks {
    match bound {
        Some(bound) => LeasedBlocks {
            lease: take(bound),
            host: Some(bound.mover.host().clone()),
            block_bytes: bound.layout.block_bytes(),
        },
        None => LeasedBlocks { lease: Lease::none(), host: None, block_bytes: 0 },
    }
}

fn too_small(pool_bytes: usize, error: &MemError) -> Error {
    Error::Config { knob: "cpu_pool_size_bytes", value: pool_bytes.to_string(), remedy: error.to_string() }
}

fn check_count(keys: usize) -> Result<()> {
    if keys > MAX_TOKENS {
        return Err(Error::invalid(format!("one call may have at most {MAX_TOKENS} keys, not {keys}: split it")));
    }
    Ok(())
}

fn bad_target(error: &MemError) -> Error {
    Error::invalid(format!("out: {error}"))
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.inner.owner.is_elsewhere() {
            // Another count that nobody gives back: locks inside may be held by threads that the child does not have.
            let _ = std::mem::ManuallyDrop::new(Arc::clone(&self.inner));
            return;
        }
        self.shutdown(Duration::from_secs(5));
    }
}
