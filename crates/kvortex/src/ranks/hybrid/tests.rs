//! The longest hit against a search that tries every length.

use proptest::prelude::*;

use super::*;
use crate::ranks::groups::Group;
use crate::tier::host::{SlotId, SlotPool};

const BLOCK: usize = 4;

fn hashes(count: usize) -> Vec<[u8; KEY_BYTES]> {
    (0..count).map(|i| [i as u8 + 1; KEY_BYTES]).collect()
}

/// An index that has those keys, each in a slot of its own.
fn index_of(keys: &[[u8; KEY_BYTES]]) -> Arc<Index> {
    let slots = SlotPool::new(1000);
    let index = Arc::new(Index::new(slots.clone()));
    let reserved = index.reserve(Keys::from_slices(keys));
    let claims = slots.claim_many(keys.len());
    reserved.reservation.begin(claims).publish();
    index
}

/// Block of the tokens, and group.
type Place = (usize, usize);

/// What a hit of `hit` blocks loads beyond `first`, and what must be there besides.
fn reads(groups: &Groups, first: usize, hit: usize) -> (Vec<Place>, Vec<Place>) {
    let count = groups.all().len();
    let sees = |group: usize, block: usize| {
        let window = groups.all()[group].window;
        window == 0 || (block + 1) * BLOCK + window > hit * BLOCK + 1
    };
    let loaded = (first..hit).flat_map(|block| (0..count).map(move |group| (block, group)));
    let behind = (0..count).filter(|&group| groups.all()[group].looks_ahead).map(|group| (hit, group));
    (loaded.filter(|&(block, group)| sees(group, block)).collect(), behind.collect())
}

#[derive(Clone, Debug)]
struct Case {
    groups: Vec<Group>,
    first: usize,
    blocks: usize,
    most: usize,
    /// Which blocks of which group are there.
    there: Vec<Vec<bool>>,
}

fn case() -> impl Strategy<Value = Case> {
    let group = (prop_oneof![Just(0_usize), 1_usize..20], proptest::bool::weighted(0.2));
    let group = group.prop_map(|(window, looks_ahead)| Group { window, looks_ahead });
    let sizes = (proptest::collection::vec(group, 1..4), 0_usize..5, 1_usize..30, 0.3_f64..1.0);
    sizes.prop_flat_map(|(groups, first, blocks, density)| {
        let row = proptest::collection::vec(proptest::bool::weighted(density), blocks);
        let there = proptest::collection::vec(row, groups.len());
        (Just(groups), Just(first), Just(blocks), 1_usize..=blocks, there)
            .prop_map(|(groups, first, blocks, most, there)| Case { groups, first, blocks, most: first + most, there })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_hit_is_the_longest_for_which_every_group_has_what_it_reads(case in case()) {
        let groups = Groups::new(BLOCK, case.groups).unwrap();
        let hashes = hashes(case.blocks);
        let is_there = |&(block, group): &(usize, usize)| {
            block >= case.first && case.there[group].get(block - case.first).copied().unwrap_or(false)
        };
        let key = |&(block, group): &(usize, usize)| groups.key(group, &hashes[block - case.first]);
        let stored: Vec<_> = (0..groups.all().len())
            .flat_map(|group| (case.first..case.first + case.blocks).map(move |block| (block, group)))
            .filter(is_there)
            .map(|place| key(&place))
            .collect();
        let index = index_of(&stored);
        let holds = |&hit: &usize| {
            let (loaded, behind) = reads(&groups, case.first, hit);
            loaded.iter().chain(&behind).all(is_there)
        };
        let expected = (case.first + 1..=case.most).rev().find(holds);
        // A hit for which nothing is read is none.
        let expected = expected.filter(|&hit| !reads(&groups, case.first, hit).0.is_empty());
        let (hit, leased) = lease(&index, &groups, Keys::from_slices(&hashes), case.first, case.most);
        prop_assert_eq!(hit, expected.unwrap_or(0));
        let loaded = expected.map(|hit| reads(&groups, case.first, hit).0).unwrap_or_default();
        let slots: Vec<SlotId> = loaded.iter().map(|place| index.lease_prefix(Keys::from_slices(&[key(place)])).slots()[0]).collect();
        prop_assert_eq!(leased.slots(), &slots[..]);
        // What could be brought up is what the same search finds, with what must be there besides.
        let (reached, keys) = reach(&*index, &groups, Keys::from_slices(&hashes), (case.first, case.most));
        prop_assert_eq!(reached, hit);
        let behind = expected.map(|hit| reads(&groups, case.first, hit).1).unwrap_or_default();
        prop_assert_eq!(keys, loaded.iter().chain(&behind).map(key).collect::<Vec<_>>());
        prop_assert_eq!(index.stats().leased, slots.len());
        drop(leased);
        prop_assert_eq!(index.stats().leased, 0);
    }
}

#[test]
fn a_hole_in_a_window_costs_what_it_hides_and_no_more() {
    let groups = Groups::new(BLOCK, vec![Group::default(), Group { window: 9, looks_ahead: false }]).unwrap();
    let hashes = hashes(10);
    // The window of 9 reads two blocks, so a hit is spoiled by a hole in its last two.
    let there = |hole: usize| {
        let second = groups.keys(1, Keys::from_slices(&hashes));
        let second = second.into_iter().enumerate().filter(|&(block, _)| block != hole).map(|(_, key)| key);
        index_of(&hashes.iter().copied().chain(second).collect::<Vec<_>>())
    };
    let longest = |hole, most| lease(&there(hole), &groups, Keys::from_slices(&hashes), 0, most).0;
    assert_eq!(longest(7, 10), 10);
    assert_eq!(longest(7, 9), 7);
    assert_eq!(longest(8, 9), 8);
    assert_eq!(longest(0, 2), 0);
    assert_eq!(longest(0, 3), 3);
}
