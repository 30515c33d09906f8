//! Rows that more than one process maps: one for all ranks, or each rank's with the planner.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Key, key};
use kvortex::ranks::{RankBoard, RankMover, RankPlanner, RankTicket, Rows, Seat};
use kvortex::{EngineConfig, Keys, Namespace, SlotId};
use kvortex_mem::MemError;
use kvortex_mem::arena::Arena;
use kvortex_mem::copy::{CopyEngine, Direction, Done, HostCopy, Step, Transfer};
use kvortex_mem::device::RawStream;
use kvortex_mem::span::{Pages, Region};

const BLOCK: usize = 4096;
const SLOTS: usize = 8;
const ROLE: &str = "KVORTEX_TEST_ROLE";

fn keys(from: usize, count: usize) -> Vec<Key> {
    (from..from + count).map(key).collect()
}

fn engine_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("rows-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn seat(rows: Rows) -> Seat {
    Seat::fit(SLOTS * BLOCK, BLOCK, Namespace::default()).unwrap().with_rows(rows)
}

fn config() -> EngineConfig {
    EngineConfig { huge_pages: false, ..EngineConfig::new(SLOTS * BLOCK) }
}

fn planner(id: &str, ranks: usize, rows: Rows) -> RankPlanner {
    RankPlanner::new(RankBoard::join(id, ranks).unwrap(), seat(rows), ranks, (1.0, 0.0)).unwrap()
}

fn mover(id: &str, (rank, ranks): (usize, usize), rows: Rows) -> kvortex::Result<RankMover> {
    let board = RankBoard::join(id, ranks)?;
    RankMover::with_copies(&config(), (&board, rank), &seat(rows), Arc::new(HostCopy::new(1)))
}

fn pages(count: usize, value: u8) -> (Region, Pages) {
    let region = Region::from_vec(vec![value; count * BLOCK]);
    (region.clone(), Pages::contiguous(region, count).unwrap())
}

fn stored(planner: &RankPlanner, keys: &[Key]) -> (RankTicket, Vec<SlotId>) {
    let stored = planner.plan_store(Keys::from_slices(keys), &[]).unwrap();
    (stored.ticket.unwrap(), stored.slots)
}

fn visible(planner: &RankPlanner, keys: &[Key]) -> usize {
    planner.poll().unwrap();
    planner.lease_prefix(Keys::from_slices(keys)).unwrap().len()
}

fn wait_visible(planner: &RankPlanner, keys: &[Key]) {
    let there = (0..5000).any(|_| {
        std::thread::sleep(Duration::from_millis(1));
        visible(planner, keys) == keys.len()
    });
    assert!(there, "the store never ended");
}

fn plan_load(planner: &RankPlanner, keys: &[Key]) -> (RankTicket, Vec<SlotId>) {
    planner.plan_load(planner.lease_prefix(Keys::from_slices(keys)).unwrap(), false).unwrap()
}

/// Loads into pages of zeroes; the byte that all of them have then.
fn loaded(mover: &RankMover, (ticket, slots): &(RankTicket, Vec<SlotId>)) -> u8 {
    let (region, target) = pages(slots.len(), 0);
    mover.load(*ticket, slots, target).unwrap();
    the_byte(&region.to_vec())
}

fn the_byte(bytes: &[u8]) -> u8 {
    assert!(bytes.iter().all(|&byte| byte == bytes[0]), "torn");
    bytes[0]
}

/// Copies between a slot of a row that the planner maps and a page of this byte; the byte that the page has then.
fn by_planner(row: &Arc<Arena>, direction: Direction, slot: SlotId, byte: u8) -> u8 {
    let (region, page) = pages(1, byte);
    let transfer = Transfer::new(direction, Arc::clone(row), vec![Step { slot, page: 0 }], page).unwrap();
    HostCopy::new(1).run(transfer).unwrap();
    the_byte(&region.to_vec())
}

#[test]
fn what_the_first_rank_stores_all_ranks_load() {
    let (id, keys) = (engine_id(), keys(0, 3));
    // Whoever comes first makes it.
    let others = [2, 1].map(|rank| mover(&id, (rank, 3), Rows::One).unwrap());
    let planner = planner(&id, 3, Rows::One);
    assert!(!planner.is_ready().unwrap());
    let first = mover(&id, (0, 3), Rows::One).unwrap();
    assert!(planner.is_ready().unwrap());
    let (ticket, slots) = stored(&planner, &keys);
    others[0].submit(ticket, &slots, pages(3, 99).1).unwrap();
    assert_eq!(visible(&planner, &keys), 0, "nobody has stored it");
    first.submit(ticket, &slots, pages(3, 7).1).unwrap();
    assert!(first.shutdown(Duration::from_secs(10)));
    others[1].submit(ticket, &slots, pages(3, 99).1).unwrap();
    assert!(others[1].shutdown(Duration::from_secs(10)));
    wait_visible(&planner, &keys);
    let load = plan_load(&planner, &keys);
    assert_eq!(loaded(&others[0], &load), 7);
    assert_eq!(first.arena_bytes(), SLOTS * BLOCK);
}

#[test]
fn a_store_that_only_the_first_rank_makes_fails_with_it() {
    let (id, keys) = (engine_id(), keys(0, 2));
    let (planner, movers) = (planner(&id, 2, Rows::One), [0, 1].map(|rank| mover(&id, (rank, 2), Rows::One).unwrap()));
    assert!(planner.is_ready().unwrap());
    let (ticket, slots) = stored(&planner, &keys);
    movers[1].submit(ticket, &slots, pages(2, 7).1).unwrap();
    assert!(movers[0].submit(ticket, &slots, pages(1, 7).1).is_err(), "too few pages");
    assert_eq!((visible(&planner, &keys), planner.in_flight(), planner.room().1), (0, 0, 0));
    assert!(movers[1].submit(ticket, &slots, pages(2, 7).1).is_err(), "each plan goes once");
}

/// Loads that the test lets end.
#[derive(Default)]
struct Held(Mutex<Vec<(Transfer, Done)>>);

impl Held {
    fn end(&self) {
        let (transfer, done) = self.0.lock().unwrap().remove(0);
        done(HostCopy::new(1).run(transfer));
    }
}

impl CopyEngine for Held {
    fn run(&self, transfer: Transfer) -> Result<(), MemError> {
        HostCopy::new(1).run(transfer)
    }

    fn submit(&self, transfer: Transfer, done: Done) -> Result<(), MemError> {
        self.0.lock().unwrap().push((transfer, done));
        Ok(())
    }

    fn fence(&self, _: RawStream, _: &Pages) -> Result<(), MemError> {
        Ok(())
    }

    fn stop(&self, _: Duration) -> bool {
        true
    }

    fn name(&self) -> &'static str {
        "held"
    }
}

#[test]
fn nothing_is_evicted_under_a_load_of_any_rank() {
    let (id, old, new) = (engine_id(), keys(0, SLOTS), keys(100, SLOTS));
    let (planner, held) = (planner(&id, 2, Rows::One), [Arc::<Held>::default(), Arc::default()]);
    let movers = [0, 1].map(|rank| {
        let board = RankBoard::join(&id, 2).unwrap();
        RankMover::with_copies(&config(), (&board, rank), &seat(Rows::One), held[rank].clone()).unwrap()
    });
    assert!(planner.is_ready().unwrap());
    let (ticket, slots) = stored(&planner, &old);
    movers.iter().for_each(|mover| mover.submit(ticket, &slots, pages(SLOTS, 7).1).unwrap());
    held[0].end();
    assert_eq!(visible(&planner, &old), SLOTS);

    let lease = planner.lease_prefix(Keys::from_slices(&old)).unwrap();
    let (ticket, slots) = planner.plan_load(lease, true).unwrap();
    let targets = [0, 1].map(|_| pages(SLOTS, 0));
    for (mover, (_, target)) in movers.iter().zip(&targets) {
        mover.submit(ticket, &slots, target.clone()).unwrap();
    }
    for ended in [false, true] {
        planner.poll().unwrap();
        let refused = planner.plan_store(Keys::from_slices(&new), &[]).unwrap();
        assert_eq!((refused.slots.len(), refused.refused), (0, SLOTS), "rank 1 still reads, rank 0 ended: {ended}");
        if !ended {
            held[0].end();
        }
    }
    held[1].end();
    assert!(targets.iter().all(|(region, _)| the_byte(&region.to_vec()) == 7));
    planner.poll().unwrap();
    let (ticket, slots) = stored(&planner, &new);
    assert_eq!(slots.len(), SLOTS, "now there is room");
    movers.iter().for_each(|mover| mover.submit(ticket, &slots, pages(SLOTS, 8).1).unwrap());
    held[0].end();
    assert_eq!((visible(&planner, &new), visible(&planner, &old)), (SLOTS, 0));
}

#[test]
fn the_planner_reaches_open_rows() {
    let (id, keys) = (engine_id(), keys(0, 2));
    let planner = planner(&id, 2, Rows::Open);
    let early = planner.attach_rows().unwrap_err().to_string();
    assert!(early.contains("not every rank is there yet"), "{early}");
    let movers = [0, 1].map(|rank| mover(&id, (rank, 2), Rows::Open).unwrap());
    let rows = planner.attach_rows().unwrap();
    assert_eq!(rows.len(), 2);
    let (ticket, slots) = stored(&planner, &keys);
    for (mover, value) in movers.iter().zip([5, 6]) {
        mover.submit(ticket, &slots, pages(2, value).1).unwrap();
    }
    wait_visible(&planner, &keys);
    assert_eq!([0, 1].map(|rank: usize| by_planner(&rows[rank], Direction::Load, slots[1], 0)), [5, 6]);
    let load = plan_load(&planner, &keys[..1]);
    by_planner(&rows[1], Direction::Store, load.1[0], 9);
    assert_eq!([0, 1].map(|rank: usize| loaded(&movers[rank], &load)), [5, 9]);
}

#[test]
fn private_rows_stay_private() {
    let id = engine_id();
    let planner = planner(&id, 1, Rows::Private);
    let _mover = mover(&id, (0, 1), Rows::Private).unwrap();
    assert!(planner.is_ready().unwrap());
    assert!(planner.attach_rows().unwrap_err().to_string().contains("each rank's row is private"));
}

#[test]
fn all_must_mean_the_same_rows() {
    let id = engine_id();
    let (planner, _mover) = (planner(&id, 1, Rows::One), mover(&id, (0, 1), Rows::Private).unwrap());
    let differs = planner.is_ready().unwrap_err().to_string();
    assert!(differs.contains("their namespaces or rows differ"), "{differs}");

    let id = engine_id();
    let _first = mover(&id, (0, 2), Rows::One).unwrap();
    let board = RankBoard::join(&id, 2).unwrap();
    let larger = EngineConfig { pool_bytes: 2 * SLOTS * BLOCK, ..config() };
    let copies = Arc::new(HostCopy::new(1));
    let error = RankMover::with_copies(&larger, (&board, 1), &seat(Rows::One), copies).err().unwrap().to_string();
    assert!(error.contains("has 32768 bytes where 65536 were asked for"), "{error}");
    let taken = mover(&id, (0, 2), Rows::One).err().unwrap().to_string();
    assert!(taken.contains("is rank 0 of this engine already"), "{taken}");
}

/// This test's program once more, as one rank of an engine: makes its mover, then a load for each line that it is given.
struct Other {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Other {
    fn start(id: &str, rank: usize, rows: &str) -> Other {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "other_process", "--ignored", "--nocapture"]);
        command.env(ROLE, format!("{id} {rank} {rows}")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let (input, output) = (process.stdin.take(), BufReader::new(process.stdout.take().unwrap()));
        let mut other = Other { process, input, output };
        assert_eq!(other.says(), "here");
        other
    }

    fn says(&mut self) -> String {
        for line in (&mut self.output).lines() {
            if let Some((_, said)) = line.unwrap().split_once("SAYS ") {
                return said.to_owned();
            }
        }
        panic!("it ended without a word: {:?}", self.process.wait())
    }

    /// Stores or loads there, as the ticket says; the byte that was loaded.
    fn ask(&mut self, (ticket, slots): &(RankTicket, Vec<SlotId>), byte: u8) -> u8 {
        let slots: Vec<String> = slots.iter().map(|slot| slot.0.to_string()).collect();
        let input = self.input.as_mut().unwrap();
        writeln!(input, "{} {byte} {}", ticket.id(), slots.join(" ")).unwrap();
        self.says().parse().unwrap()
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.process.wait();
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout();
    writeln!(out, "\nSAYS {text}").unwrap();
    out.flush().unwrap();
}

#[test]
#[ignore = "a part of the other tests, in a process of its own"]
fn other_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let [id, rank, rows] = role.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let rows = if rows == "open" { Rows::Open } else { Rows::One };
    let mover = mover(id, (rank.parse().unwrap(), 2), rows).unwrap();
    say("here");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let numbers: Vec<u64> = line.split(' ').map(|number| number.parse().unwrap()).collect();
        let slots = numbers[2..].iter().map(|&slot| SlotId(slot as u32)).collect::<Vec<_>>();
        let ticket = RankTicket::from_id(numbers[0]).unwrap();
        if ticket.lane() == kvortex::ranks::Lane::Store {
            mover.submit(ticket, &slots, pages(slots.len(), numbers[1] as u8).1).unwrap();
            say("0");
        } else {
            say(&loaded(&mover, &(ticket, slots)).to_string());
        }
    }
}

#[test]
fn ranks_in_processes_of_their_own_share_one_row() {
    let (id, keys) = (engine_id(), keys(0, 4));
    let mut others = [1, 0].map(|rank| Other::start(&id, rank, "one"));
    let planner = planner(&id, 2, Rows::One);
    assert!(planner.is_ready().unwrap());
    let plan = stored(&planner, &keys);
    for (other, byte) in others.iter_mut().zip([99, 7]) {
        other.ask(&plan, byte);
    }
    wait_visible(&planner, &keys);
    let load = plan_load(&planner, &keys);
    assert_eq!(others.each_mut().map(|other| other.ask(&load, 0)), [7, 7]);
    let [row] = planner.attach_rows().unwrap().try_into().unwrap();
    assert_eq!(by_planner(&row, Direction::Load, load.1[3], 0), 7);
    // The planner's process keeps it, whoever ends: rank 1 has made it.
    others.into_iter().for_each(Other::kill);
    assert_eq!(by_planner(&row, Direction::Load, load.1[3], 0), 7);
    assert_eq!(by_planner(&planner.attach_rows().unwrap()[0], Direction::Load, load.1[0], 0), 7);
}

#[test]
fn the_planner_reaches_rows_of_other_processes() {
    let (id, keys) = (engine_id(), keys(0, 2));
    let mut others = [0, 1].map(|rank| Other::start(&id, rank, "open"));
    let planner = planner(&id, 2, Rows::Open);
    let rows = planner.attach_rows().unwrap();
    let plan = stored(&planner, &keys);
    for (other, byte) in others.iter_mut().zip([3, 4]) {
        other.ask(&plan, byte);
    }
    wait_visible(&planner, &keys);
    assert_eq!([0, 1].map(|rank: usize| by_planner(&rows[rank], Direction::Load, plan.1[0], 0)), [3, 4]);
    // What a tier puts into a slot, a rank loads.
    plan.1.iter().for_each(|&slot| _ = by_planner(&rows[1], Direction::Store, slot, 8));
    let load = plan_load(&planner, &keys);
    assert_eq!(others.each_mut().map(|other| other.ask(&load, 0)), [3, 8]);
}

#[test]
fn a_rank_goes_on_when_who_made_the_row_is_gone() {
    let (id, keys) = (engine_id(), keys(0, 2));
    let maker = Other::start(&id, 1, "one");
    let first = mover(&id, (0, 2), Rows::One).unwrap();
    let planner = planner(&id, 2, Rows::One);
    assert!(planner.is_ready().unwrap());
    maker.kill();
    let (ticket, slots) = stored(&planner, &keys);
    first.submit(ticket, &slots, pages(2, 7).1).unwrap();
    wait_visible(&planner, &keys);
    let load = plan_load(&planner, &keys);
    assert_eq!(loaded(&first, &load), 7);
    planner.poll().unwrap();
    assert_eq!(planner.index_stats().leased, 2, "nobody knows whether the dead one still reads");
}

#[test]
fn memory_of_the_dead_is_not_taken_for_ours() {
    let id = engine_id();
    let mut dead = Other::start(&id, 0, "one");
    let ticket = RankTicket::from_id(4 | kvortex::ranks::Lane::Store as u64).unwrap();
    dead.ask(&(ticket, vec![SlotId(0)]), 7);
    // One who joined the board and has attached to nothing keeps what the dead one wrote there.
    let board = RankBoard::join(&id, 2).unwrap();
    dead.kill();
    let late = RankMover::with_copies(&config(), (&board, 1), &seat(Rows::One), Arc::new(HostCopy::new(1)));
    let error = late.err().unwrap().to_string();
    assert!(error.contains("cannot be used") && error.contains("restart all processes of the engine"), "{error}");
    drop(board);
    // With nobody left the next engine begins anew.
    let movers = [0, 1].map(|rank| mover(&id, (rank, 2), Rows::One).unwrap());
    let load = RankTicket::from_id(4 | kvortex::ranks::Lane::Load as u64).unwrap();
    assert_eq!(movers.each_ref().map(|mover| loaded(mover, &(load, vec![SlotId(0)]))), [0, 0]);
}
