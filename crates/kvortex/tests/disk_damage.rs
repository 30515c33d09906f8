//! Files that are damaged, cut, swapped, or torn by a power cut: what is served afterwards is right, or a miss. The world checks
//! every byte that comes back.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod folder;

use std::fs;
use std::sync::Arc;

use folder::*;
use kvortex::tier::Tier;
use kvortex::tier::disk::DiskTier;
use kvortex::tier::suite::{PATIENCE, World};
use kvortex_mem::file::{Call, FaultPlan, Written};

const START: usize = 8192;
const HEADER: usize = 4096;
const STRIDE: usize = 8192;
const KEPT: usize = 12;

/// A small generator of the tests' own, so that a failure can be run again.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % below
    }
}

/// A folder that holds [`KEPT`] blocks, closed, and its file.
fn kept(name: &str) -> (Folder, World, Vec<u8>) {
    let (folder, world) = (Folder::quick(name), World::new(64, BLOCK));
    let tier = folder.open(&world, 32);
    world.keep(&tier, 0..KEPT);
    assert!(tier.stop(PATIENCE));
    drop(tier);
    let bytes = fs::read(folder.blocks_file()).unwrap();
    (folder, world, bytes)
}

/// Which of the blocks come back from a file of these bytes.
fn served(folder: &Folder, world: &World, bytes: &[u8]) -> Vec<bool> {
    fs::write(folder.blocks_file(), bytes).unwrap();
    let tier = folder.open(world, 32);
    assert!(tier.flush(PATIENCE));
    let ids: Vec<usize> = (0..KEPT).collect();
    let found = world.get(&tier, &ids, PATIENCE);
    assert!(tier.stop(PATIENCE));
    found
}

/// Blocks of a segment in these small files, read from the superblock.
fn segment_slots(bytes: &[u8]) -> usize {
    u32::from_le_bytes(bytes[56..60].try_into().unwrap()) as usize
}

fn header_at(bytes: &[u8], slot: usize) -> usize {
    let each = segment_slots(bytes);
    START + slot / each * each * (HEADER + STRIDE) + slot % each * HEADER
}

fn payload_at(bytes: &[u8], slot: usize) -> usize {
    let each = segment_slots(bytes);
    START + slot / each * each * (HEADER + STRIDE) + each * HEADER + slot % each * STRIDE
}

#[test]
fn nothing_is_damaged_without_damage() {
    let (folder, world, bytes) = kept("whole");
    assert_eq!(served(&folder, &world, &bytes), [true; KEPT]);
}

#[test]
fn ten_thousand_edits_of_payloads_are_all_seen() {
    let (folder, world, bytes) = kept("edits");
    let mut random = Random(1);
    let mut edits = 0;
    while edits < 10_000 {
        let mut damaged = bytes.clone();
        // Every block is damaged in one place or several, so each open judges as many edits as there are blocks.
        for slot in 0..KEPT {
            let at = payload_at(&bytes, slot);
            for _ in 0..1 + random.next(3) {
                damaged[at + random.next(BLOCK)] ^= 1 << random.next(8);
            }
            let same = damaged[at..at + BLOCK] == bytes[at..at + BLOCK];
            damaged[at] ^= u8::from(same);
        }
        assert_eq!(served(&folder, &world, &damaged), [false; KEPT]);
        edits += KEPT;
    }
}

#[test]
fn every_byte_of_a_header_counts_on_the_disk() {
    let (folder, world, bytes) = kept("headers");
    // All headers at once, each with another bit flipped; every single bit is tried on one header in the unit tests.
    for round in 0..HEADER.div_ceil(KEPT) {
        let mut damaged = bytes.clone();
        for slot in 0..KEPT {
            let byte = (round * KEPT + slot) % HEADER;
            damaged[header_at(&bytes, slot) + byte] ^= 1 << (round % 8);
        }
        assert_eq!(served(&folder, &world, &damaged), [false; KEPT], "round {round}");
    }
}

#[test]
fn a_file_cut_anywhere_serves_what_is_whole() {
    let (folder, world, bytes) = kept("cut");
    for len in (0..bytes.len()).step_by(512) {
        served(&folder, &world, &bytes[..len]);
    }
}

#[test]
fn swapped_entries_headers_and_payloads_are_misses() {
    let (folder, world, bytes) = kept("swap");
    let swap = |damaged: &mut Vec<u8>, a: usize, b: usize, len: usize| {
        let first = damaged[a..a + len].to_vec();
        damaged.copy_within(b..b + len, a);
        damaged[b..b + len].copy_from_slice(&first);
    };
    for a in 0..KEPT {
        for b in a + 1..KEPT {
            let (mut whole, mut headers, mut payloads) = (bytes.clone(), bytes.clone(), bytes.clone());
            let (header, payload) =
                ([header_at(&bytes, a), header_at(&bytes, b)], [payload_at(&bytes, a), payload_at(&bytes, b)]);
            for damaged in [&mut whole, &mut headers] {
                swap(damaged, header[0], header[1], HEADER);
            }
            for damaged in [&mut whole, &mut payloads] {
                swap(damaged, payload[0], payload[1], STRIDE);
            }
            for damaged in [whole, headers, payloads] {
                let found = served(&folder, &world, &damaged);
                assert_eq!(found.iter().filter(|&&found| !found).count(), 2, "{a} and {b}");
            }
        }
    }
}

#[test]
fn random_bytes_are_no_blocks() {
    let (folder, world, bytes) = kept("random");
    let mut random = Random(3);
    for keep_super in [true, false] {
        let noise = (0..bytes.len()).map(|_| random.next(256) as u8);
        let mut damaged: Vec<u8> = noise.collect();
        if keep_super {
            damaged[..START].copy_from_slice(&bytes[..START]);
        }
        assert_eq!(served(&folder, &world, &damaged), [false; KEPT]);
    }
}

#[test]
fn a_header_is_written_when_its_block_is_in_place() {
    let (folder, world, plan) = (Folder::quick("order"), World::new(64, BLOCK), Arc::new(FaultPlan::default()));
    let tier = DiskTier::open(folder.faulty(32, &plan), &world.arena, IDENTITY).unwrap();
    assert!(tier.flush(PATIENCE));
    plan.record();
    (0..4).for_each(|batch| world.keep(&tier, batch * 8..batch * 8 + 8));
    let (file, written) = (fs::read(folder.blocks_file()).unwrap(), plan.written());
    let at =
        |offset: usize| written.iter().position(|one| matches!(one, Written::Bytes(at, _) if *at == offset as u64));
    let mut headers = 0;
    for slot in 0..32 {
        let Some(payload) = at(payload_at(&file, slot)) else { continue };
        let covers = |one: &Written| match one {
            Written::Bytes(at, bytes) => (*at as usize..*at as usize + bytes.len()).contains(&header_at(&file, slot)),
            _ => false,
        };
        let header = written.iter().position(covers).unwrap();
        assert!(payload < header, "the header of slot {slot} is write {header}, its block write {payload}");
        headers += 1;
    }
    assert!(headers > 20, "{headers}");
}

#[test]
fn one_torn_superblock_loses_nothing() {
    let (folder, world, bytes) = kept("super");
    for at in [0, HEADER] {
        let mut damaged = bytes.clone();
        damaged[at + 100..at + HEADER].fill(0x77);
        assert_eq!(served(&folder, &world, &damaged), [true; KEPT]);
    }
    let mut damaged = bytes;
    damaged[..START].fill(0);
    assert_eq!(served(&folder, &world, &damaged), [false; KEPT]);
}

/// The file as a power cut may leave it: what was flushed is there; of the rest each piece of 512 bytes is there or not, whatever
/// came before or after it.
fn after_a_cut(written: &[Written], upto: usize, random: &mut Random) -> Vec<u8> {
    let flushed = written[..upto].iter().rposition(|event| *event == Written::Sync).unwrap_or(0);
    let mut image = Vec::new();
    for (i, event) in written[..upto].iter().enumerate() {
        match event {
            Written::Length(len) => image.resize(*len as usize, 0),
            Written::Bytes(at, bytes) => {
                let lost = random.next(4);
                for (number, piece) in bytes.chunks(512).enumerate() {
                    let survives = i < flushed || lost == 0 || (lost > 1 && random.next(2) == 0);
                    let at = *at as usize + number * 512;
                    if survives && at + piece.len() <= image.len() {
                        image[at..at + piece.len()].copy_from_slice(piece);
                    }
                }
            }
            Written::Sync => {}
        }
    }
    image
}

#[test]
fn a_power_cut_leaves_what_is_right_or_a_miss() {
    let images: usize = std::env::var("KVORTEX_POWER_CUTS").map_or(50, |count| count.parse().unwrap());
    let (folder, world) = (Folder::quick("power"), World::new(128, BLOCK));
    let plan = Arc::new(FaultPlan::default());
    plan.record();
    let tier = DiskTier::open(folder.faulty(16, &plan), &world.arena, IDENTITY).unwrap();
    for first in 0..12 {
        world.keep(&tier, (0..5).map(|i| (first * 3 + i) % 30));
        if first % 4 == 3 {
            // Long enough for the file to be flushed.
            std::thread::sleep(std::time::Duration::from_millis(1500));
        }
    }
    assert!(tier.stop(PATIENCE));
    drop(tier);
    let written = plan.written();
    assert!(plan.count(Call::Write) > 50);
    let (mut random, mut found) = (Random(9), 0);
    for _ in 0..images {
        let upto = 1 + random.next(written.len());
        fs::write(folder.blocks_file(), after_a_cut(&written, upto, &mut random)).unwrap();
        let tier = DiskTier::open(folder.config(16), &world.arena, IDENTITY).unwrap();
        assert!(tier.flush(PATIENCE));
        let ids: Vec<usize> = (0..30).collect();
        found += world.get(&tier, &ids, PATIENCE).iter().filter(|&&found| found).count();
        assert!(folder.taken() <= tier.stats().max_bytes);
        assert!(tier.stop(PATIENCE));
    }
    assert!(found > images, "{found} blocks in {images} images: the test proves nothing if none survives");
}
