//! The planner of several ranks, and the mover of one.

use std::sync::Arc;

use kvortex::ranks::{Ended, Lane, RankBoard, RankMover, RankPlanner, RankTicket, Rows, Seat};
use kvortex::terms::{Priority, Terms, tick_at};
use kvortex::{BlockKey, Keys, SlotId};
use kvortex_mem::span::Pages;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::answers::PyLease;
use crate::engine::{disk, disk_deadline, disk_dict, settings, timeout_of};
use crate::errors::{detached, entry, invalid, raise};
use crate::groups::PyGroups;
use crate::identity::namespace;
use crate::keys::PackedKeys;
use crate::logs;
use crate::number::whole;
use crate::paged::PagedBlocks;
use crate::parts::PyParts;
use crate::promotion::PyPromotion;
use crate::stream::{in_stream, stream_of};

/// Ticket, packed positions, packed slots.
type StorePlan<'py> = (u64, Bound<'py, PyBytes>, Bound<'py, PyBytes>);

/// Packed keys that became visible, packed keys forgotten, stores that have ended.
type Changes<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>, Vec<(u64, bool)>);

/// Terms of a run of keys: how many, which priority, until which millisecond of the caller's clock.
type Run = (usize, u8, Option<u64>);

/// Decides for the ranks of one engine, in this process or in others. Its plans must reach each rank's `RankMover` once and in
/// order; what came of them it learns by itself.
#[pyclass(name = "RankPlanner", frozen, module = "kvortex")]
pub(crate) struct PyRankPlanner(Option<RankPlanner>);

#[pymethods]
impl PyRankPlanner {
    /// A planner for `ranks` ranks of `cpu_pool_size_bytes` each, or with `rows="one"` in all. Only the first `storing_ranks`
    /// store, all by default. With `disk`, a KVortexConfig, blocks go where its `disk_paths` say.
    #[expect(clippy::too_many_arguments, reason = "each says one thing of the engine, by name")]
    #[new]
    #[pyo3(signature = (engine_id, ranks, *, cpu_pool_size_bytes, block_size_bytes, namespace, rows="private",
                        storing_ranks=None, eviction_watermark=0.8, eviction_ratio=0.2, disk=None))]
    fn new(
        py: Python<'_>,
        engine_id: String,
        ranks: &Bound<'_, PyAny>,
        cpu_pool_size_bytes: &Bound<'_, PyAny>,
        block_size_bytes: &Bound<'_, PyAny>,
        namespace: &Bound<'_, PyAny>,
        rows: &str,
        storing_ranks: Option<&Bound<'_, PyAny>>,
        eviction_watermark: f64,
        eviction_ratio: f64,
        disk: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        entry(py, || {
            logs::follow_level(py)?;
            let ranks = whole("ranks", ranks)?;
            let storing = storing_ranks.map_or(Ok(ranks), |storing| whole("storing_ranks", storing))?;
            let seat = seat(cpu_pool_size_bytes, block_size_bytes, namespace)?.with_rows(rows_of(rows)?);
            let marks = (eviction_watermark, eviction_ratio);
            let disk = disk.map(|config| Ok::<_, PyErr>((self::disk(config)?, disk_deadline(config)?))).transpose()?;
            detached(py, || {
                let planner = RankPlanner::new(RankBoard::join(&engine_id, ranks)?, seat, storing, marks)?;
                match disk {
                    Some((Some(disk), deadline)) => planner.with_disk(disk, deadline),
                    _ => Ok(planner),
                }
            })
            .map(|planner| Self(Some(planner)))
        })
    }

    /// Whether every rank is there and has the memory that this planner counts on.
    fn ready(&self, py: Python<'_>) -> PyResult<bool> {
        entry(py, || detached(py, || self.planner().is_ready()))
    }

    /// Leases the longest prefix that is there.
    fn lease_prefix(&self, py: Python<'_>, keys: &Bound<'_, PyAny>) -> PyResult<PyLease> {
        entry(py, || {
            let keys = PackedKeys::from_python(keys)?;
            detached(py, || self.planner().lease_prefix(keys.keys())).map(PyLease::of_ranks)
        })
    }

    /// The blocks of the longest hit of all `groups`, 0 for none, and a lease on what it needs beyond the `first` that the engine
    /// has. `hashes` name the blocks from `first` on; the hit has at most `most`.
    #[expect(clippy::too_many_arguments, reason = "each says one thing of the request, by name")]
    fn lease_groups(
        &self,
        py: Python<'_>,
        groups: &Bound<'_, PyGroups>,
        hashes: &Bound<'_, PyAny>,
        first: &Bound<'_, PyAny>,
        most: &Bound<'_, PyAny>,
    ) -> PyResult<(usize, PyLease)> {
        entry(py, || {
            let hashes = PackedKeys::from_python(hashes)?;
            let (groups, first, most) = (groups.get().groups(), whole("first", first)?, whole("most", most)?);
            let (hit, lease) = detached(py, || self.planner().lease_groups(groups, hashes.keys(), first, most))?;
            Ok((hit, PyLease::of_ranks(lease)))
        })
    }

    /// The blocks of the longest hit of all `groups`, 0 for none, that could be made of what is in memory and below, and the
    /// packed keys of what it needs; None if nothing is below. The rest as for `lease_groups`.
    #[expect(clippy::too_many_arguments, reason = "each says one thing of the request, by name")]
    fn reach_groups<'py>(
        &self,
        py: Python<'py>,
        groups: &Bound<'py, PyGroups>,
        hashes: &Bound<'py, PyAny>,
        first: &Bound<'py, PyAny>,
        most: &Bound<'py, PyAny>,
    ) -> PyResult<Option<(usize, Bound<'py, PyBytes>)>> {
        entry(py, || {
            let hashes = PackedKeys::from_python(hashes)?;
            let (groups, range) = (groups.get().groups(), (whole("first", first)?, whole("most", most)?));
            let reached = detached(py, || self.planner().reach_groups(groups, hashes.keys(), range))?;
            Ok(reached.map(|(hit, keys)| (hit, PyBytes::new(py, keys.as_flattened()))))
        })
    }

    /// Plans to load the blocks of `lease`, which is used up: (ticket, packed slots).
    #[pyo3(signature = (lease, *, background=false))]
    fn plan_load<'py>(
        &self,
        py: Python<'py>,
        lease: &Bound<'py, PyLease>,
        background: bool,
    ) -> PyResult<(u64, Bound<'py, PyBytes>)> {
        entry(py, || {
            let lease = lease.get().take_ranks()?;
            let (ticket, slots) = detached(py, || self.planner().plan_load(lease, background))?;
            Ok((ticket.id(), packed(py, slots.iter().map(|slot| slot.0))))
        })
    }

    /// Plans to store the blocks that are not there: (ticket, packed positions, packed slots), or None. They become visible
    /// once the loads `rests_on`, and all loads inside steps, have succeeded as well. `terms` are runs that cover the keys.
    #[pyo3(signature = (keys, rests_on=Vec::new(), *, terms=Vec::new()),
           text_signature = "($self, keys, rests_on=(), *, terms=())")]
    fn plan_store<'py>(
        &self,
        py: Python<'py>,
        keys: &Bound<'py, PyAny>,
        rests_on: Vec<u64>,
        terms: Vec<Run>,
    ) -> PyResult<Option<StorePlan<'py>>> {
        entry(py, || {
            let keys = PackedKeys::from_python(keys)?;
            let rests_on = rests_on.into_iter().map(ticket).collect::<PyResult<Vec<_>>>()?;
            let terms = each(&terms, keys.keys().len())?;
            let stored = detached(py, || self.planner().plan_store_on(keys.keys(), &terms, &rests_on))?;
            Ok(stored.ticket.map(|ticket| {
                let slots = packed(py, stored.slots.iter().map(|slot| slot.0));
                (ticket.id(), packed(py, stored.positions.iter().copied()), slots)
            }))
        })
    }

    /// As `plan_store`, of several groups: for each of `hashes` one block of each, packed, where 0 is none. Returns the ticket,
    /// the blocks to be stored and their slots, packed. `terms` are runs that cover the hashes.
    #[expect(clippy::too_many_arguments, reason = "each says one thing of the blocks, by name")]
    #[pyo3(signature = (groups, hashes, blocks, rests_on=Vec::new(), *, terms=Vec::new()),
           text_signature = "($self, groups, hashes, blocks, rests_on=(), *, terms=())")]
    fn plan_store_groups<'py>(
        &self,
        py: Python<'py>,
        groups: &Bound<'py, PyGroups>,
        hashes: &Bound<'py, PyAny>,
        blocks: &[u8],
        rests_on: Vec<u64>,
        terms: Vec<Run>,
    ) -> PyResult<Option<StorePlan<'py>>> {
        entry(py, || {
            let hashes = PackedKeys::from_python(hashes)?;
            let blocks = words("blocks", blocks)?;
            let rests_on = rests_on.into_iter().map(ticket).collect::<PyResult<Vec<_>>>()?;
            let terms = each(&terms, hashes.keys().len())?;
            let groups = groups.get().groups();
            let (stored, blocks) = detached(py, || {
                let terms = groups.spread(&terms, &blocks);
                let (keys, blocks) = groups.pick(hashes.keys(), &blocks)?;
                Ok((self.planner().plan_store_on(Keys::from_slices(&keys), &terms, &rests_on)?, blocks))
            })?;
            Ok(stored.ticket.map(|ticket| {
                let slots = packed(py, stored.slots.iter().map(|slot| slot.0));
                (ticket.id(), packed(py, stored.positions.iter().map(|&at| blocks[at as usize])), slots)
            }))
        })
    }

    /// Makes visible what every rank has stored, and returns the loads that have ended since: (ticket, whether it succeeded).
    fn poll(&self, py: Python<'_>) -> PyResult<Vec<(u64, bool)>> {
        entry(py, || detached(py, || self.planner().poll()).map(pairs))
    }

    /// Looks below for blocks of a prefix that are not in memory; None if that would not make it longer. Reads nothing yet.
    fn find_below(&self, py: Python<'_>, keys: &Bound<'_, PyAny>) -> PyResult<Option<PyPromotion>> {
        entry(py, || {
            let keys = PackedKeys::from_python(keys)?;
            Ok(detached(py, || self.planner().find_below(keys.keys()))?.map(PyPromotion))
        })
    }

    /// Starts to bring the blocks up, and returns at once.
    fn promote(&self, py: Python<'_>, promotion: &Bound<'_, PyPromotion>) -> PyResult<()> {
        let promotion = &promotion.get().0;
        entry(py, || detached(py, || self.planner().promote(promotion)))
    }

    /// Waits until what became visible so far is on the disk or given up. True if that was in time, or there is no disk.
    #[pyo3(signature = (timeout_ms=None), text_signature = "($self, timeout_ms=5000)")]
    fn flush(&self, py: Python<'_>, timeout_ms: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        entry(py, || {
            let timeout = timeout_of(timeout_ms)?;
            detached(py, || self.planner().flush(timeout))
        })
    }

    /// Leaves the disk for good, with what it keeps. Returns whether what was under way has ended in time.
    #[pyo3(signature = (timeout_ms=None), text_signature = "($self, timeout_ms=5000)")]
    fn leave_disk(&self, py: Python<'_>, timeout_ms: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        entry(py, || {
            let timeout = timeout_of(timeout_ms)?;
            Ok(py.detach(|| self.planner().leave_below(timeout)))
        })
    }

    /// Forgets the blocks whose life is over at this millisecond of the caller's clock, and returns how many those are.
    fn expire(&self, py: Python<'_>, now_ms: u64) -> PyResult<usize> {
        entry(py, || detached(py, || self.planner().expire(tick_at(now_ms))))
    }

    /// Begins to note what `take_changes` tells.
    fn watch(&self, py: Python<'_>) {
        py.detach(|| self.planner().watch());
    }

    /// What has changed since `watch` or the last call: packed keys of blocks that became visible, packed keys of blocks
    /// forgotten, and the stores that have ended: (ticket, whether it succeeded).
    fn take_changes<'py>(&self, py: Python<'py>) -> Changes<'py> {
        let watched = py.detach(|| self.planner().take_watched());
        let keys =
            |keys: &[BlockKey]| PyBytes::new(py, &keys.iter().flat_map(|key| *key.as_bytes()).collect::<Vec<u8>>());
        (keys(&watched.changed.stored), keys(&watched.changed.removed), pairs(watched.stores))
    }

    /// What was counted so far, cheap enough for every step: capacity_blocks, used_blocks, stored_blocks, failed_stores,
    /// refused_blocks, evicted_blocks, expired_blocks.
    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counts = self.planner().counts();
        let dict = PyDict::new(py);
        dict.set_item("capacity_blocks", counts.capacity)?;
        dict.set_item("used_blocks", counts.used)?;
        dict.set_item("stored_blocks", counts.stored)?;
        dict.set_item("failed_stores", counts.failed_stores)?;
        dict.set_item("refused_blocks", counts.refused)?;
        dict.set_item("evicted_blocks", counts.evicted)?;
        dict.set_item("expired_blocks", counts.expired)?;
        Ok(dict)
    }

    /// Forgets every block, on the disk too, and returns how many there were. What is being stored does not become visible
    /// either.
    fn reset(&self, py: Python<'_>) -> PyResult<usize> {
        entry(py, || detached(py, || self.planner().reset()))
    }

    /// Numbers now: capacity_blocks, used_blocks, blocks, leased_blocks, evictions, in_flight, index_bytes, and disk: what
    /// `KVortexEngine.get_stats` says of it.
    fn get_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        entry(py, || {
            let (total, used, evictions) = self.planner().room();
            let index = py.detach(|| self.planner().index_stats());
            let dict = PyDict::new(py);
            dict.set_item("capacity_blocks", total)?;
            dict.set_item("used_blocks", used)?;
            dict.set_item("blocks", index.ready)?;
            dict.set_item("leased_blocks", index.leased)?;
            dict.set_item("evictions", evictions)?;
            dict.set_item("in_flight", self.planner().in_flight())?;
            dict.set_item("index_bytes", index.bytes)?;
            let disk = py.detach(|| self.planner().lower_stats());
            dict.set_item("disk", disk.map(|disk| disk_dict(py, &disk)).transpose()?)?;
            Ok(dict)
        })
    }
}

impl PyRankPlanner {
    fn planner(&self) -> &RankPlanner {
        self.0.as_ref().expect("taken only by drop")
    }
}

impl Drop for PyRankPlanner {
    /// The end of a disk tier waits for what is being written, so other Python threads go on meanwhile.
    fn drop(&mut self) {
        let planner = self.0.take();
        Python::attach(|py| py.detach(|| drop(planner)));
    }
}

/// The memory and the copies of one rank. Plans must be passed in the order of their tickets.
#[pyclass(name = "RankMover", frozen, module = "kvortex")]
pub(crate) struct PyRankMover(Option<Arc<RankMover>>);

#[pymethods]
impl PyRankMover {
    /// Maps `config.cpu_pool_size_bytes` for `rank`, or with `rows="one"` for all. What the planner was given must be the
    /// same. `layout` is a digest of how the KV lies: without it nothing goes to a disk.
    #[expect(clippy::too_many_arguments, reason = "each says one thing of the rank, by name")]
    #[new]
    #[pyo3(signature = (config, engine_id, ranks, rank, *, block_size_bytes, namespace, rows="private", layout=None))]
    fn new(
        py: Python<'_>,
        config: &Bound<'_, PyAny>,
        engine_id: String,
        ranks: &Bound<'_, PyAny>,
        rank: &Bound<'_, PyAny>,
        block_size_bytes: &Bound<'_, PyAny>,
        namespace: &Bound<'_, PyAny>,
        rows: &str,
        layout: Option<[u8; 32]>,
    ) -> PyResult<Self> {
        entry(py, || {
            logs::follow_level(py)?;
            let (ranks, rank) = (whole("ranks", ranks)?, whole("rank", rank)?);
            let seat = seat(&config.getattr("cpu_pool_size_bytes")?, block_size_bytes, namespace)?;
            let seat = seat.with_rows(rows_of(rows)?);
            let config = settings(config, "")?;
            let create = || {
                let board = RankBoard::join(&engine_id, ranks)?;
                layout.map_or(Ok(()), |layout| board.describe(rank, &layout))?;
                RankMover::create(&config, (&board, rank), &seat)
            };
            Ok(Self(Some(Arc::new(detached(py, create)?))))
        })
    }

    /// Starts to store `blocks` into `slots`, after what torch's current stream was given so far.
    fn store(&self, py: Python<'_>, ticket: u64, slots: &[u8], blocks: &Bound<'_, PagedBlocks>) -> PyResult<()> {
        entry(py, || {
            let ticket = ticket_of(Lane::Store, ticket)?;
            let pages = in_stream(blocks.get().pages(false, "blocks")?, None, py)?;
            let slots = unpacked(slots)?;
            detached(py, || self.mover().submit(ticket, &slots, pages))
        })
    }

    /// Loads `blocks` from `slots`. On a GPU what torch's current stream is given from now on comes after it; host
    /// memory is waited for.
    /// With `parts` a stream waits by `Parts.hold` only. What does not start is tried once more before TransferError.
    #[expect(clippy::too_many_arguments, reason = "each says one thing of the load, by name")]
    #[pyo3(signature = (ticket, slots, blocks, *, parts=None))]
    fn load(
        &self,
        py: Python<'_>,
        ticket: u64,
        slots: &[u8],
        blocks: &Bound<'_, PagedBlocks>,
        parts: Option<&Bound<'_, PyParts>>,
    ) -> PyResult<()> {
        entry(py, || {
            let ticket = ticket_of(Lane::Load, ticket)?;
            let pages = in_stream(blocks.get().pages(true, "blocks")?, None, py)?;
            let pages = parts.map_or(Ok(pages.clone()), |parts| parts.get().of(pages))?;
            let slots = unpacked(slots)?;
            detached(py, || self.mover().load(ticket, &slots, pages))
        })
    }

    /// Starts to load `blocks` from `slots` in the background; nothing waits for it.
    fn load_later(&self, py: Python<'_>, ticket: u64, slots: &[u8], blocks: &Bound<'_, PagedBlocks>) -> PyResult<()> {
        entry(py, || {
            let ticket = ticket_of(Lane::Background, ticket)?;
            let pages = in_stream(blocks.get().pages(true, "blocks")?, None, py)?;
            let slots = unpacked(slots)?;
            detached(py, || self.mover().submit(ticket, &slots, pages))
        })
    }

    /// Puts every unfinished copy that reads or writes `blocks`, which are about to be written, before what torch's current
    /// stream is given from now on; for host memory, waits for them.
    fn fence(&self, py: Python<'_>, blocks: &Bound<'_, PagedBlocks>) -> PyResult<()> {
        entry(py, || {
            let pages: Pages = blocks.get().pages(false, "blocks")?;
            let stream = stream_of(pages.place(), None, py)?;
            detached(py, || self.mover().fence(stream, &pages))
        })
    }

    /// The loads inside steps that have ended since the last call: (ticket, whether it succeeded).
    fn ended_loads(&self) -> Vec<(u64, bool)> {
        pairs(self.mover().take_ended(Lane::Load))
    }

    /// As `ended_loads`, of those in the background.
    fn ended_later(&self) -> Vec<(u64, bool)> {
        pairs(self.mover().take_ended(Lane::Background))
    }

    /// As `ended_loads`, of stores.
    fn ended_stores(&self) -> Vec<(u64, bool)> {
        pairs(self.mover().take_ended(Lane::Store))
    }

    /// Refuses new copies and waits for those under way; whether all ended in time.
    #[pyo3(signature = (timeout_ms=None), text_signature = "($self, timeout_ms=5000)")]
    fn shutdown(&self, py: Python<'_>, timeout_ms: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        entry(py, || {
            let timeout = timeout_of(timeout_ms)?;
            Ok(py.detach(|| self.mover().shutdown(timeout)))
        })
    }

    /// The GPU whose memory can be passed, "cuda:0" say; "none" without one.
    #[getter]
    fn device(&self) -> String {
        let ordinal = self.mover().device().map(|device| device.info().ordinal);
        ordinal.map_or_else(|| "none".to_owned(), |ordinal| format!("cuda:{ordinal}"))
    }

    /// Whether this rank stores: not where another one stores the same bytes for all.
    #[getter]
    fn stores(&self) -> bool {
        self.mover().stores()
    }

    /// Whether the memory is page-locked.
    #[getter]
    fn pinned(&self) -> bool {
        self.mover().is_pinned()
    }
}

impl PyRankMover {
    fn mover(&self) -> &RankMover {
        self.0.as_ref().expect("taken only by drop")
    }
}

impl Drop for PyRankMover {
    /// Ending a rank may wait for copies and unmaps its memory, so other Python threads go on meanwhile.
    fn drop(&mut self) {
        let mover = self.0.take();
        Python::attach(|py| py.detach(|| drop(mover)));
    }
}

fn seat(pool: &Bound<'_, PyAny>, block: &Bound<'_, PyAny>, given: &Bound<'_, PyAny>) -> PyResult<Seat> {
    let (pool, block) = (whole("cpu_pool_size_bytes", pool)?, whole("block_size_bytes", block)?);
    Seat::fit(pool, block, namespace(given)?).map_err(raise)
}

/// The rows of this name.
fn rows_of(name: &str) -> PyResult<Rows> {
    match name {
        "private" => Ok(Rows::Private),
        "open" => Ok(Rows::Open),
        "one" => Ok(Rows::One),
        _ => Err(invalid(format!("rows = {name:?}: give one of \"private\", \"open\", \"one\""))),
    }
}

/// The terms of each of `keys` keys; none for the usual ones.
fn each(runs: &[Run], keys: usize) -> PyResult<Vec<Terms>> {
    let covered = runs.iter().try_fold(0_usize, |sum, run| sum.checked_add(run.0));
    if !runs.is_empty() && covered != Some(keys) {
        return Err(invalid(format!("terms are for other than the {keys} keys: give runs that cover them")));
    }
    let mut terms = Vec::with_capacity(if runs.is_empty() { 0 } else { keys });
    for &(count, priority, until_ms) in runs {
        terms.extend(std::iter::repeat_n(Terms::new(priority_of(priority)?, until_ms), count));
    }
    Ok(terms)
}

fn priority_of(number: u8) -> PyResult<Priority> {
    match number {
        0 => Ok(Priority::Low),
        1 => Ok(Priority::Normal),
        2 => Ok(Priority::High),
        _ => Err(invalid(format!("priority = {number}: give 0 (low), 1 (normal) or 2 (high)"))),
    }
}

fn packed<'py>(py: Python<'py>, numbers: impl Iterator<Item = u32>) -> Bound<'py, PyBytes> {
    let bytes: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
    PyBytes::new(py, &bytes)
}

fn unpacked(slots: &[u8]) -> PyResult<Vec<SlotId>> {
    Ok(words("slots", slots)?.into_iter().map(SlotId).collect())
}

/// Packed numbers of 32 bits.
fn words(name: &str, bytes: &[u8]) -> PyResult<Vec<u32>> {
    let (words, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(invalid(format!("{name} has {} bytes: pass 4 for each, as the planner returns them", bytes.len())));
    }
    Ok(words.iter().map(|&word| u32::from_le_bytes(word)).collect())
}

fn pairs(ended: Vec<Ended>) -> Vec<(u64, bool)> {
    ended.into_iter().map(|Ended { ticket, ok }| (ticket.id(), ok)).collect()
}

fn ticket(id: u64) -> PyResult<RankTicket> {
    RankTicket::from_id(id).map_err(raise)
}

fn ticket_of(lane: Lane, id: u64) -> PyResult<RankTicket> {
    let found = ticket(id)?;
    let plan = match found.lane() {
        Lane::Store => "to store",
        Lane::Load => "to load inside a step",
        Lane::Background => "to load in the background",
    };
    if found.lane() == lane {
        Ok(found)
    } else {
        Err(invalid(format!("ticket {id} is of a plan {plan}: pass it to that method")))
    }
}
