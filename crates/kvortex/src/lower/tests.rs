mod late;

use super::*;
use crate::eviction::Watermarks;
use crate::mask::BlockMask;
use crate::sync::Mutex;
use crate::tier::host::SlotPool;
use crate::tier::{Put, Want};

/// Has every block, counts what it is offered, and holds what it is asked for.
#[derive(Default)]
struct Fake {
    /// Whoever holds it holds up a clear.
    clearing: Mutex<()>,
    offered: Mutex<usize>,
    wanted: Mutex<Vec<Want>>,
}

impl Tier for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn contains(&self, keys: Keys<'_>, _: Instant) -> BlockMask {
        let mut all = BlockMask::new(keys.len());
        (0..keys.len()).for_each(|i| all.set(i));
        all
    }

    fn put(&self, offers: Vec<Offer>) -> Vec<Put> {
        *self.offered.lock() += offers.len();
        vec![Put::Queued; offers.len()]
    }

    fn get(&self, wants: Vec<Want>, _: Instant) {
        self.wanted.lock().extend(wants);
    }

    fn remove(&self, _: Keys<'_>, _: Instant) -> usize {
        0
    }

    fn clear(&self) -> bool {
        drop(self.clearing.lock());
        true
    }

    fn flush(&self, _: Duration) -> bool {
        true
    }

    fn stop(&self, _: Duration) -> bool {
        self.wanted.lock().clear();
        true
    }

    fn stats(&self) -> TierStats {
        TierStats::default()
    }
}

fn lower(slots: u32) -> (Lower, Arc<Fake>) {
    with_deadline(slots, Duration::from_secs(20))
}

fn with_deadline(slots: u32, deadline: Duration) -> (Lower, Arc<Fake>) {
    let (pool, fake) = (SlotPool::new(slots), Arc::<Fake>::default());
    let planner = Planner::new(pool.clone(), Watermarks::new(pool.total(), 1.0, 0.0), Arc::default());
    let lower = Lower::new(fake.clone(), Arc::new(planner), 4096, deadline);
    (lower.expect("a thread"), fake)
}

fn keys(ids: std::ops::Range<u8>) -> Vec<[u8; KEY_BYTES]> {
    ids.map(|id| [id; KEY_BYTES]).collect()
}

fn offers(lower: &Lower, count: usize) -> Vec<Offer> {
    let claim = || lower.below.planner.plan_promotion(Keys::from_slices(&keys(200..200 + count as u8)));
    let offer =
        |(_, slot, _writing)| Offer { key: crate::key::BlockKey::from_bytes([9; 32]), slot, keep: Arc::new(()) };
    claim().into_iter().map(offer).collect()
}

#[test]
fn what_was_leased_before_a_reset_is_not_offered_after_it() {
    let (lower, fake) = lower(8);
    let epoch = lower.below.epoch.load(Ordering::Acquire);
    lower.below.put(offers(&lower, 2), epoch);
    assert_eq!(*fake.offered.lock(), 2);
    lower.reset();
    lower.below.put(offers(&lower, 2), epoch);
    assert_eq!(*fake.offered.lock(), 2);
    lower.below.put(offers(&lower, 2), epoch + 1);
    assert_eq!(*fake.offered.lock(), 4);
}

#[test]
fn a_promotion_leaves_room_and_what_it_forgot_at_a_reset_stays_forgotten() {
    let (lower, fake) = lower(16);
    let all = keys(0..20);
    let promotion = lower.find(Keys::from_slices(&all), Reach::Prefix).expect("all are below");
    assert_eq!(promotion.len(), 20);
    assert!(!promotion.is_pending(), "it was not started");
    lower.start(&promotion);
    assert!(promotion.is_pending());
    assert!(lower.desk.flush(Instant::now() + Duration::from_secs(20)));
    assert_eq!(fake.wanted.lock().len(), 12, "a quarter of the slots is for others");
    lower.reset();
    fake.wanted.lock().drain(..).for_each(|want| want.landing.land());
    assert!(!promotion.is_pending());
    assert_eq!(lower.below.planner.index().prefix_len(Keys::from_slices(&all)), 0);
}

#[test]
fn who_wants_the_same_waits_for_it_and_reads_nothing() {
    let (lower, fake) = lower(16);
    let all = keys(0..6);
    let [first, second] = [0, 1].map(|_| lower.find(Keys::from_slices(&all), Reach::Prefix).expect("all are below"));
    lower.start(&first);
    lower.start(&second);
    assert!(lower.desk.flush(Instant::now() + Duration::from_secs(20)));
    assert_eq!(fake.wanted.lock().len(), 6);
    assert!(first.is_pending() && second.is_pending());
    fake.wanted.lock().drain(..).for_each(|want| want.landing.land());
    assert!(!first.is_pending() && !second.is_pending());
    assert_eq!(lower.below.planner.index().prefix_len(Keys::from_slices(&all)), 6);
    assert_eq!(lower.stats().promoted_blocks, 6);
}

#[test]
fn after_a_release_what_comes_late_is_not_held() {
    let (lower, fake) = lower(16);
    let promotion = lower.find(Keys::from_slices(&keys(0..4)), Reach::Prefix).expect("all are below");
    lower.below.begin(promotion.start());
    let late = fake.wanted.lock().pop().expect("four");
    fake.wanted.lock().drain(..).for_each(|want| want.landing.land());
    assert_eq!(lower.below.planner.index_stats().leased, 3);
    promotion.release();
    late.landing.land();
    assert_eq!(lower.below.planner.index_stats().leased, 0);
    assert_eq!(lower.below.planner.index().prefix_len(Keys::from_slices(&keys(0..4))), 4);
}

#[test]
fn a_closed_desk_takes_nothing_and_says_so() {
    let (lower, fake) = lower(8);
    assert!(lower.stop(Duration::from_secs(20)));
    lower.desk.hand(Job::Offer { offers: offers(&lower, 3), epoch: 0 });
    assert_eq!((*fake.offered.lock(), lower.stats().unoffered_blocks), (0, 3));
    let promotion = lower.find(Keys::from_slices(&keys(0..4)), Reach::Prefix).expect("it seems to be there");
    lower.start(&promotion);
    assert!(!promotion.is_pending());
}

#[test]
fn promotions_that_follow_each_other_closely_do_not_keep_each_other() {
    let (lower, fake) = lower(16);
    let key = |i: u32| {
        let mut key = [7; KEY_BYTES];
        key[..4].copy_from_slice(&i.to_le_bytes());
        key
    };
    let mut before: Option<Promotion> = None;
    for i in 0..100_000 {
        let next = lower.find(Keys::from_slices(&[key(i), key(i + 1)]), Reach::Each).expect("it seems to be there");
        lower.below.begin(next.start());
        // The one before has ended only now, so this one waits for it.
        let own = fake.wanted.lock().split_off(usize::from(i > 0));
        std::mem::replace(&mut *fake.wanted.lock(), own).into_iter().for_each(|want| want.landing.land());
        before.replace(next);
    }
    // As a list it would be longer than a stack is deep.
    drop(before);
}

#[test]
fn nobody_waits_longer_than_the_deadline_for_a_reset_that_hangs() {
    let (lower, fake) = with_deadline(8, Duration::from_millis(100));
    let hang = fake.clearing.lock();
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| lower.reset());
        std::thread::sleep(Duration::from_millis(50));
        let start = Instant::now();
        let asked = scope.spawn(|| lower.promote(Keys::from_slices(&keys(0..4)), Reach::Prefix));
        while !asked.is_finished() && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let waited = start.elapsed();
        drop(hang);
        assert!(waited < Duration::from_secs(2), "{waited:?}");
        assert!(reset.join().is_ok_and(|(_, lasting)| lasting));
    });
    assert!(fake.wanted.lock().is_empty());
}
