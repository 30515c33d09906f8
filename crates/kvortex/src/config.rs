//! What an engine is made from.

use crate::error::{Error, Result};
use crate::namespace::Namespace;

/// Most copy threads that an engine may have.
pub const MAX_THREADS: usize = 256;

/// Knobs of an [`Engine`](crate::Engine).
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Bytes of the host arena.
    pub pool_bytes: usize,
    /// Bytes of one block; learned from the first save when absent.
    pub block_bytes: Option<usize>,
    /// Threads that copy, the caller's included.
    pub threads: usize,
    /// Share of the slots in use above which an allocation starts to sweep; in (0, 1].
    pub watermark: f64,
    /// Share of the watermark that a sweep gives back; in [0, 1].
    pub ratio: f64,
    /// Whether to ask for transparent huge pages.
    pub huge_pages: bool,
    /// NUMA node to bind the arena to.
    pub numa_node: Option<u32>,
    /// What the blocks belong to.
    pub namespace: Namespace,
    /// The GPU whose memory pages may lie in, and how to copy from and to it.
    pub gpu: GpuConfig,
    /// Where blocks are kept beyond the host's memory and this process.
    #[cfg(not(shuttle))]
    pub disk: Option<crate::tier::disk::DiskConfig>,
    /// How long a lookup or load may wait for blocks from the disk.
    pub disk_read_deadline: std::time::Duration,
}

/// Which GPU an engine works with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// None: pages lie in host memory only.
    None,
    /// The GPU with this number if it can be used, else none.
    Auto(u32),
    /// The GPU with this number.
    Cuda(u32),
}

/// Ways to copy between the pages of a GPU and slots.
pub use kvortex_mem::copy::Method;

/// Knobs of an engine that has a GPU.
#[derive(Clone, Debug)]
pub struct GpuConfig {
    /// Which one.
    pub device: DeviceChoice,
    /// Streams for copies, 1 to 4.
    pub streams: usize,
    /// The way to copy; measured and chosen for each transfer when absent.
    pub method: Option<Method>,
    /// Bytes of device memory for each of four staging buffers.
    pub staging_bytes: usize,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self { device: DeviceChoice::None, streams: 4, method: None, staging_bytes: 32 << 20 }
    }
}

impl GpuConfig {
    fn validate(&self) -> Result<()> {
        let refuse = |knob, value: usize, remedy: &str| {
            Err(Error::Config { knob, value: value.to_string(), remedy: remedy.to_owned() })
        };
        if !(1..=4).contains(&self.streams) {
            return refuse("gpu_streams", self.streams, "use 1 to 4; 4 is usual");
        }
        if !(1 << 20..=1 << 30).contains(&self.staging_bytes) {
            return refuse("staging_bytes", self.staging_bytes, "use 1MiB to 1GiB; 32MiB is usual");
        }
        Ok(())
    }
}

impl EngineConfig {
    /// The defaults, for a pool of `pool_bytes`.
    #[must_use]
    pub fn new(pool_bytes: usize) -> Self {
        Self {
            pool_bytes,
            block_bytes: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from).min(4),
            watermark: 0.8,
            ratio: 0.2,
            huge_pages: true,
            numa_node: None,
            namespace: Namespace::default(),
            gpu: GpuConfig::default(),
            #[cfg(not(shuttle))]
            disk: None,
            disk_read_deadline: std::time::Duration::from_millis(250),
        }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let refuse = |knob, value: String, remedy: &str| Err(Error::Config { knob, value, remedy: remedy.to_owned() });
        if self.pool_bytes == 0 {
            return refuse(
                "cpu_pool_size_bytes",
                "0".into(),
                "give the bytes that the host tier may use, \"4GiB\" say",
            );
        }
        if !(1..=MAX_THREADS).contains(&self.threads) {
            return refuse(
                "num_transfer_streams",
                self.threads.to_string(),
                "use 1 to 256; the number of cores is enough",
            );
        }
        if !(self.watermark > 0.0 && self.watermark <= 1.0) {
            return refuse(
                "eviction_watermark",
                self.watermark.to_string(),
                "use a share above 0 and up to 1; 0.8 is usual",
            );
        }
        if !(0.0..=1.0).contains(&self.ratio) {
            return refuse("eviction_ratio", self.ratio.to_string(), "use a share between 0 and 1; 0.2 is usual");
        }
        self.gpu.validate()
    }
}
