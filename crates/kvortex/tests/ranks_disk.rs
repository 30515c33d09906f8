//! A tier below the rows of several ranks: what comes back on all of them, and what on none.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod common;
mod folder;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Key, bytes_of, key};
use folder::{Folder, IDENTITY, fresh};
use kvortex::ranks::{RankBoard, RankMover, RankPlanner, Rows, Seat};
use kvortex::terms::{Priority, Terms};
use kvortex::tier::disk::{DiskConfig, DiskTier};
use kvortex::tier::rows::AllRows;
use kvortex::tier::suite::{World, conforms};
use kvortex::tier::{Identity, Tier};
use kvortex::{EngineConfig, Keys, Namespace, Promotion};
use kvortex_mem::copy::HostCopy;
use kvortex_mem::file::{Call, Effect, Fault, FaultPlan};
use kvortex_mem::span::{Pages, Region};

const BLOCK: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(20);
/// Places of the blocks in a file: two superblocks, the headers of a segment, then the blocks.
const SUPERBLOCKS: u64 = 2 * 4096;

fn keys(ids: std::ops::Range<usize>) -> Vec<Key> {
    ids.map(key).collect()
}

/// An engine of several ranks with a disk below.
struct Ranks {
    planner: RankPlanner,
    movers: Vec<RankMover>,
}

#[derive(Clone)]
struct Options {
    ranks: usize,
    slots: usize,
    rows: Rows,
    layout: u8,
    deadline: Duration,
}

const TWO: Options = Options { ranks: 2, slots: 16, rows: Rows::Open, layout: 7, deadline: PATIENCE };

fn config(folder: &Folder) -> DiskConfig {
    let mut config = folder.config(256);
    config.max_bytes *= 2;
    config
}

fn start(disk: DiskConfig, options: &Options) -> Ranks {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let id = format!("ranks-disk-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let Options { ranks, slots, rows, layout, deadline } = *options;
    let seat = Seat::fit(slots * BLOCK, BLOCK, Namespace::from_digest([3; 32])).unwrap().with_rows(rows);
    let board = || RankBoard::join(&id, ranks).unwrap();
    let planner = RankPlanner::new(board(), seat, ranks, (1.0, 0.0)).unwrap().with_disk(disk, deadline).unwrap();
    let mover = |rank: usize| {
        if layout > 0 {
            board().describe(rank, &[layout; 32]).unwrap();
        }
        let config = EngineConfig { huge_pages: false, ..EngineConfig::new(slots * BLOCK) };
        RankMover::with_copies(&config, (&board(), rank), &seat, Arc::new(HostCopy::new(1))).unwrap()
    };
    let movers = (0..ranks).map(mover).collect();
    assert!(planner.is_ready().unwrap());
    assert!(planner.flush(PATIENCE).unwrap(), "the scan has ended");
    Ranks { planner, movers }
}

/// What a rank keeps under a key: other bytes on each.
fn part(key: &Key, rank: usize) -> Vec<u8> {
    let mut key = *key;
    key[31] ^= rank as u8;
    bytes_of(&key, BLOCK)
}

fn pages(bytes: Vec<u8>, count: usize) -> (Region, Pages) {
    let region = Region::from_vec(bytes);
    (region.clone(), Pages::contiguous(region, count).unwrap())
}

impl Ranks {
    /// Stores blocks on all ranks, and waits until they are visible.
    fn store(&self, keys: &[Key]) {
        self.store_on(keys, &[]);
    }

    fn store_on(&self, keys: &[Key], terms: &[Terms]) {
        let stored = self.planner.plan_store_on(Keys::from_slices(keys), terms, &[]).unwrap();
        for (rank, mover) in self.movers.iter().enumerate() {
            let bytes = stored.positions.iter().flat_map(|&at| part(&keys[at as usize], rank)).collect();
            mover.submit(stored.ticket.unwrap(), &stored.slots, pages(bytes, stored.slots.len()).1).unwrap();
        }
        let end = Instant::now() + PATIENCE;
        while self.visible(keys) < keys.len() {
            assert!(Instant::now() < end, "the store never ended");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn keep(&self, keys: &[Key]) {
        self.store(keys);
        assert!(self.planner.flush(PATIENCE).unwrap());
    }

    fn visible(&self, keys: &[Key]) -> usize {
        self.planner.poll().unwrap();
        self.planner.lease_prefix(Keys::from_slices(keys)).unwrap().len()
    }

    fn find(&self, keys: &[Key]) -> Option<Promotion> {
        self.planner.find_below(Keys::from_slices(keys)).unwrap()
    }

    /// Brings up what is below; the length of the prefix that is in memory then, and every byte of it was checked on each rank.
    fn promoted(&self, keys: &[Key]) -> usize {
        if let Some(promotion) = self.find(keys) {
            self.planner.promote(&promotion).unwrap();
            ended(&promotion);
        }
        self.loaded(keys)
    }

    fn loaded(&self, keys: &[Key]) -> usize {
        let lease = self.planner.lease_prefix(Keys::from_slices(keys)).unwrap();
        let count = lease.len();
        if count == 0 {
            return 0;
        }
        let (ticket, slots) = self.planner.plan_load(lease, false).unwrap();
        for (rank, mover) in self.movers.iter().enumerate() {
            let (region, target) = pages(vec![0xEE; count * BLOCK], count);
            mover.load(ticket, &slots, target).unwrap();
            let wanted: Vec<u8> = keys[..count].iter().flat_map(|key| part(key, rank)).collect();
            assert!(region.to_vec() == wanted, "rank {rank} was given bytes that are not its own");
        }
        self.planner.poll().unwrap();
        count
    }

    fn disk(&self) -> kvortex::LowerStats {
        self.planner.lower_stats().unwrap()
    }
}

fn ended(promotion: &Promotion) {
    let end = Instant::now() + PATIENCE;
    while promotion.is_pending() {
        assert!(Instant::now() < end, "a promotion never ends");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn blocks_file(folder: &Folder, rank: usize) -> PathBuf {
    folder.path.join(format!("rank-{rank}-of-2/v1/blocks"))
}

#[test]
fn all_rows_together_keep_the_contract() {
    conforms(&|| {
        let (one, two) = (Folder::new("row-0"), Folder::new("row-1"));
        let (world, first) = fresh(one.config(64), vec![]);
        let second = DiskTier::open(two.config(64), &world.arena, Identity { row: 1, ..IDENTITY }).unwrap();
        folder::full(&second);
        let mut world: World = world;
        world.guard = Some(Box::new(vec![one, two]));
        (world, Box::new(AllRows::new(vec![first, Box::new(second)])) as Box<dyn Tier>)
    });
}

#[test]
fn what_was_kept_comes_back_on_every_rank_after_a_restart() {
    for (ranks, rows) in [(1, Rows::Open), (2, Rows::Open), (3, Rows::Open)] {
        let (folder, all, options) = (Folder::new("restart"), keys(0..10), Options { ranks, rows, ..TWO });
        start(config(&folder), &options).keep(&all);
        let again = start(config(&folder), &options);
        assert_eq!(again.loaded(&all), 0, "memory is empty");
        assert_eq!(again.find(&all).unwrap().len(), 10);
        assert_eq!(again.promoted(&all), 10);
        assert!(again.find(&all).is_none(), "it is in memory now");
        let stats = again.disk();
        assert_eq!((stats.promoted_blocks, stats.lost_blocks, stats.tier.corrupt), (10, 0, 0));
        assert_eq!(stats.promoted_bytes, (10 * BLOCK * ranks) as u64);
        assert!(stats.bytes_per_second.is_some_and(|speed| speed > 0.0));
    }
}

#[test]
fn one_row_of_all_ranks_is_kept_once() {
    let (folder, all) = (Folder::new("one"), keys(0..6));
    let options = Options { rows: Rows::One, ..TWO };
    let first = start(config(&folder), &options);
    let stored = first.planner.plan_store(Keys::from_slices(&all), &[]).unwrap();
    let bytes: Vec<u8> = all.iter().flat_map(|key| part(key, 0)).collect();
    for mover in &first.movers {
        mover.submit(stored.ticket.unwrap(), &stored.slots, pages(bytes.clone(), 6).1).unwrap();
    }
    assert!((0..2000).any(|_| {
        std::thread::sleep(Duration::from_millis(1));
        first.visible(&all) == 6
    }));
    drop(first);
    let again = start(config(&folder), &options);
    let promotion = again.find(&all).unwrap();
    again.planner.promote(&promotion).unwrap();
    ended(&promotion);
    assert_eq!(again.visible(&all), 6);
    assert!(folder.path.join("v1/blocks").exists());
}

#[test]
fn what_one_row_has_lost_is_a_miss() {
    let (folder, all) = (Folder::new("lost"), keys(0..10));
    start(config(&folder), &TWO).keep(&all);
    std::fs::remove_file(blocks_file(&folder, 1)).unwrap();
    let again = start(config(&folder), &TWO);
    assert!(again.find(&all).is_none());
    assert_eq!((again.promoted(&all), again.disk().tier.blocks), (0, 0));
    again.keep(&all);
    drop(again);
    assert_eq!(start(config(&folder), &TWO).promoted(&all), 10);
}

#[test]
fn what_is_damaged_in_one_row_is_on_no_rank() {
    let (folder, all) = (Folder::new("damaged"), keys(0..8));
    start(config(&folder), &TWO).keep(&all);
    let path = blocks_file(&folder, 0);
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    // Headers tell where each block is; the fifth block's place is zeroed.
    let mut place = None;
    for at in (SUPERBLOCKS..file.metadata().unwrap().len()).step_by(4096) {
        let mut header = [0; 4096];
        file.read_exact_at(&mut header, at).unwrap();
        if header.starts_with(b"KVORTEX\x01") && header[32..64] == all[4] {
            place = Some((at, part(&all[4], 0)));
        }
    }
    let (_, payload) = place.expect("the block was written");
    let bytes = std::fs::read(&path).unwrap();
    let at = (0..bytes.len()).step_by(4096).find(|&at| bytes[at..].starts_with(&payload)).unwrap();
    file.write_all_at(&[0; BLOCK], at as u64).unwrap();
    let again = start(config(&folder), &TWO);
    assert_eq!(again.find(&all).unwrap().len(), 8, "nobody has looked yet");
    assert_eq!(again.promoted(&all), 4);
    let stats = again.disk();
    assert_eq!((stats.tier.corrupt, stats.lost_blocks, stats.promoted_blocks), (1, 1, 7));
    assert!(again.find(&all).is_none(), "the fifth is nowhere");
}

#[test]
fn a_read_that_fails_on_one_row_is_a_miss() {
    let (folder, all, plan) = (Folder::new("unread"), keys(0..4), Arc::new(FaultPlan::default()));
    start(config(&folder), &TWO).keep(&all);
    let again = start(faulty(&folder, &plan), &TWO);
    // One of the eight reads of both rows.
    let first = plan.count(Call::Read);
    plan.set(&[Fault { call: Call::Read, first, count: 1, effect: Effect::Errno(5) }]);
    assert!(again.promoted(&all) < 4);
    assert_eq!(again.disk().lost_blocks, 1);
    assert_eq!(again.disk().promoted_blocks, 3);
    assert_eq!(again.planner.index_stats().leased, 0);
}

fn faulty(folder: &Folder, plan: &Arc<FaultPlan>) -> DiskConfig {
    DiskConfig { max_bytes: config(folder).max_bytes, ..folder.faulty(256, plan) }
}

#[test]
fn nothing_that_was_there_before_a_reset_comes_after_it() {
    let (folder, all, plan) = (Folder::new("reset"), keys(0..8), Arc::new(FaultPlan::default()));
    start(config(&folder), &TWO).keep(&all);
    let again = start(faulty(&folder, &plan), &TWO);
    plan.always(Call::Read, Effect::Delay(Duration::from_millis(200)));
    let promotion = again.find(&all).unwrap();
    again.planner.promote(&promotion).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(promotion.is_pending());
    assert_eq!(again.planner.reset().unwrap(), 0);
    ended(&promotion);
    drop(promotion);
    assert_eq!((again.visible(&all), again.find(&all).is_none()), (0, true));
    let end = Instant::now() + PATIENCE;
    while again.planner.room().1 > 0 {
        assert!(Instant::now() < end, "slots never come back");
        std::thread::sleep(Duration::from_millis(1));
    }
    plan.clear();
    drop(again);
    assert!(start(config(&folder), &TWO).find(&all).is_none(), "nor after a restart");
}

#[test]
fn what_lives_for_a_time_only_does_not_go_below() {
    let folder = Folder::new("ranks-mortal");
    let mortal = Terms::new(Priority::Normal, Some(60_000));
    {
        let ranks = start(config(&folder), &TWO);
        let terms = [Terms::default(), mortal, Terms::default(), mortal];
        ranks.store_on(&keys(0..4), &terms);
        // Who asks for them again, for a time too, and who does not mind.
        assert!(ranks.planner.plan_store_on(Keys::from_slices(&keys(1..2)), &[mortal], &[]).unwrap().ticket.is_none());
        assert!(ranks.planner.plan_store(Keys::from_slices(&keys(3..4)), &[]).unwrap().ticket.is_none());
        assert!(ranks.planner.flush(PATIENCE).unwrap());
    }
    let ranks = start(config(&folder), &TWO);
    let below: Vec<bool> = keys(0..4).iter().map(|&key| ranks.find(&[key]).is_some()).collect();
    assert_eq!(below, [true, false, true, true]);
}

#[test]
fn what_was_stored_before_a_reset_is_not_kept_after_it() {
    let (folder, all) = (Folder::new("reset-store"), keys(0..8));
    let first = start(config(&folder), &TWO);
    first.store(&all);
    // Its offers may be anywhere on their way down.
    assert_eq!(first.planner.reset().unwrap(), 8);
    assert!(first.planner.flush(PATIENCE).unwrap());
    assert!(first.find(&all).is_none());
    drop(first);
    assert!(start(config(&folder), &TWO).find(&all).is_none());
}

#[test]
fn a_slow_disk_holds_nobody_up() {
    let (folder, all, plan) = (Folder::new("slow"), keys(0..8), Arc::new(FaultPlan::default()));
    start(config(&folder), &TWO).keep(&all);
    let options = Options { deadline: Duration::from_millis(400), ..TWO };
    let again = start(faulty(&folder, &plan), &options);
    plan.always(Call::Read, Effect::Delay(Duration::from_secs(2)));
    plan.always(Call::Write, Effect::Delay(Duration::from_secs(2)));
    let begun = Instant::now();
    let promotion = again.find(&all).unwrap();
    again.planner.promote(&promotion).unwrap();
    again.store(&keys(100..104));
    assert!(begun.elapsed() < Duration::from_millis(390), "{:?}", begun.elapsed());
    ended(&promotion);
    assert!(promotion.is_late() && begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    let left = Instant::now();
    assert!(!again.planner.leave_below(Duration::from_millis(50)), "a write goes on");
    assert!(left.elapsed() < Duration::from_secs(1), "{:?}", left.elapsed());
    assert_eq!((again.find(&all).is_none(), again.planner.lower_stats()), (true, None));
}

#[test]
fn the_head_is_not_evicted_for_the_tail() {
    let (folder, all) = (Folder::new("head"), keys(0..14));
    let options = Options { slots: 12, ..TWO };
    let first = start(config(&folder), &TWO);
    all.chunks(7).for_each(|run| first.keep(run));
    drop(first);
    let again = start(config(&folder), &options);
    assert_eq!(again.promoted(&all[..6]), 6);
    // Other blocks in between are used more recently than the head.
    again.keep(&keys(100..104));
    let promotion = again.find(&all).unwrap();
    assert_eq!((promotion.len(), promotion.among(6), promotion.among(9)), (8, 0, 3));
    again.planner.promote(&promotion).unwrap();
    ended(&promotion);
    let prefix = again.loaded(&all);
    assert!((9..=12).contains(&prefix), "{prefix}: the head stayed, and the tail found the room that there was");
}

#[test]
fn what_has_come_stays_until_it_is_taken() {
    let (folder, all) = (Folder::new("stays"), keys(0..6));
    start(config(&folder), &TWO).keep(&all);
    let again = start(config(&folder), &Options { slots: 8, ..TWO });
    let promotion = again.find(&all).unwrap();
    again.planner.promote(&promotion).unwrap();
    ended(&promotion);
    let refused = again.planner.plan_store(Keys::from_slices(&keys(100..108)), &[]).unwrap();
    assert_eq!((refused.slots.len(), refused.refused), (2, 6));
    assert_eq!(again.loaded(&all), 6);
    drop(promotion);
    assert_eq!(again.planner.index_stats().leased, 0);
}

#[test]
fn another_layout_or_number_of_ranks_finds_nothing() {
    let (folder, all) = (Folder::new("other"), keys(0..6));
    start(config(&folder), &TWO).keep(&all);
    assert!(start(config(&folder), &Options { layout: 8, ..TWO }).find(&all).is_none());
    assert_eq!(start(config(&folder), &TWO).promoted(&all), 6, "its own are still there");
    assert!(start(config(&folder), &Options { ranks: 1, ..TWO }).find(&all).is_none());
    let kept = |rank| std::fs::metadata(blocks_file(&folder, rank)).unwrap().len();
    assert_eq!((kept(0), kept(1)), (0, 0), "what nobody can use takes no room");
    assert!(start(config(&folder), &TWO).find(&all).is_none());
}

#[test]
fn without_knowing_how_the_kv_lies_nothing_is_kept() {
    let folder = Folder::new("undescribed");
    let ranks = start(config(&folder), &Options { layout: 0, ..TWO });
    ranks.keep(&keys(0..4));
    assert_eq!((ranks.planner.lower_stats(), folder.path.exists()), (None, false));
}

#[test]
fn private_rows_have_nothing_below() {
    let folder = Folder::new("private");
    let seat = Seat::fit(8 * BLOCK, BLOCK, Namespace::from_digest([3; 32])).unwrap();
    let board = RankBoard::join(&format!("ranks-disk-private-{}", std::process::id()), 1).unwrap();
    let planner = RankPlanner::new(board, seat, 1, (1.0, 0.0)).unwrap();
    let refused = planner.with_disk(config(&folder), PATIENCE).err().unwrap().to_string();
    assert!(refused.contains("make them open, or one"), "{refused}");
}
