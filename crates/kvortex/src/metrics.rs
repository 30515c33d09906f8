//! Counters, all atomics: counting never waits.

use std::time::Duration;

use crate::plan::{Kind, Report};
use crate::sync::{Arc, AtomicU64, Ordering};

/// Buckets for each power of two: quantiles are right to one part in eight.
const STEPS: u64 = 8;
const BUCKETS: usize = 64 * STEPS as usize;

/// A latency distribution in nanoseconds.
struct Histogram {
    buckets: Box<[AtomicU64]>,
    max: AtomicU64,
}

/// Latency quantiles in microseconds; zeros when nothing was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Quantiles {
    /// Half of the calls took no longer.
    pub p50: f64,
    /// Nine in ten took no longer.
    pub p90: f64,
    /// Ninety-nine in a hundred took no longer.
    pub p99: f64,
    /// The longest call.
    pub max: f64,
    /// Number of calls.
    pub count: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), max: AtomicU64::new(0) }
    }
}

fn bucket_of(nanos: u64) -> usize {
    let nanos = nanos.max(STEPS);
    let power = u64::from(nanos.ilog2());
    let step = (nanos >> (power - 3)) & (STEPS - 1);
    (power * STEPS + step) as usize
}

/// The largest value that falls into a bucket, in nanoseconds.
fn upper_end(bucket: usize) -> f64 {
    let (power, step) = (bucket as u64 / STEPS, bucket as u64 % STEPS);
    (STEPS + step + 1) as f64 * (1_u64 << power) as f64 / STEPS as f64
}

impl Histogram {
    fn add(&self, elapsed: Duration) {
        let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(nanos)].fetch_add(1, Ordering::Relaxed);
        self.max.fetch_max(nanos, Ordering::Relaxed);
    }

    fn quantiles(&self) -> Quantiles {
        let counts: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        let count = counts.iter().sum();
        let max = self.max.load(Ordering::Relaxed) as f64;
        let at = |share: f64| {
            let (rank, mut seen) = (share * count as f64, 0);
            let reached = |&n: &u64| {
                seen += n;
                n > 0 && seen as f64 >= rank
            };
            counts.iter().position(reached).map_or(0.0, |bucket| upper_end(bucket).min(max) / 1e3)
        };
        Quantiles { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: max / 1e3, count }
    }
}

/// Counters of one direction.
#[derive(Default)]
struct Lane {
    blocks: AtomicU64,
    bytes: AtomicU64,
    nanos: AtomicU64,
    latency: Histogram,
}

/// Counters of an engine.
#[derive(Default)]
pub(crate) struct Metrics {
    save: Lane,
    load: Lane,
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) duplicates: AtomicU64,
    pub(crate) evictions: Arc<AtomicU64>,
    pub(crate) refused: AtomicU64,
    pub(crate) failed: AtomicU64,
}

/// Numbers of one direction at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LaneStats {
    /// Blocks copied.
    pub blocks: u64,
    /// Bytes copied.
    pub bytes: u64,
    /// Bytes by the time that calls took, summed over calls, in bytes a second.
    pub bandwidth: f64,
    /// How long calls took that copied something.
    pub latency: Quantiles,
}

impl Lane {
    fn count(&self, report: &Report) {
        self.blocks.fetch_add(report.blocks as u64, Ordering::Relaxed);
        self.bytes.fetch_add(report.bytes, Ordering::Relaxed);
        if report.blocks > 0 {
            let nanos = u64::try_from(report.elapsed.as_nanos()).unwrap_or(u64::MAX);
            self.nanos.fetch_add(nanos, Ordering::Relaxed);
            self.latency.add(report.elapsed);
        }
    }

    fn stats(&self) -> LaneStats {
        let bytes = self.bytes.load(Ordering::Relaxed);
        let seconds = self.nanos.load(Ordering::Relaxed) as f64 / 1e9;
        let bandwidth = if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 };
        LaneStats { blocks: self.blocks.load(Ordering::Relaxed), bytes, bandwidth, latency: self.latency.quantiles() }
    }
}

impl Metrics {
    /// Counts what came of a call.
    pub(crate) fn count(&self, report: &Report) {
        match report.kind {
            Kind::Save => {
                self.save.count(report);
                self.duplicates.fetch_add(report.present as u64, Ordering::Relaxed);
                self.refused.fetch_add(report.refused as u64, Ordering::Relaxed);
            }
            Kind::Load => {
                self.load.count(report);
                self.hits.fetch_add(report.blocks as u64, Ordering::Relaxed);
                self.misses.fetch_add(report.missing as u64, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn save(&self) -> LaneStats {
        self.save.stats()
    }

    pub(crate) fn load(&self) -> LaneStats {
        self.load.stats()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket() {
        for nanos in (0..2_000).chain((11..64).map(|power| (1_u64 << power) + 12345 % (1 << power))) {
            let bucket = bucket_of(nanos);
            assert!(upper_end(bucket) >= nanos as f64, "{nanos}");
            let lower = if bucket == 0 { 0.0 } else { upper_end(bucket) * 8.0 / 9.0 };
            assert!(nanos.max(8) as f64 >= lower - 1.0 - lower / 8.0, "{nanos} {lower}");
        }
    }

    #[test]
    fn quantiles_are_right_to_an_eighth() {
        let histogram = Histogram::default();
        (1..=1000).for_each(|micros| histogram.add(Duration::from_micros(micros)));
        let quantiles = histogram.quantiles();
        for (got, want) in [(quantiles.p50, 500.0), (quantiles.p90, 900.0), (quantiles.p99, 990.0)] {
            assert!((want..=want * 1.126).contains(&got), "{got} for {want}");
        }
        assert_eq!((quantiles.max, quantiles.count), (1000.0, 1000));
    }

    #[test]
    fn nothing_counted_is_zero() {
        assert_eq!(Metrics::default().load(), LaneStats::default());
    }
}
