//! Which way to copy, from what was measured on this link.

/// A way to copy between paged device memory and slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// The copy engine, one copy for each stretch of bytes that continue each other on both sides.
    Dma,
    /// The copy kernel, straight between pages and pinned slots.
    Kernel,
    /// The copy kernel between pages and device memory, the copy engine between that and the slots.
    Staged,
}

impl Method {
    /// All of them.
    pub const ALL: [Method; 3] = [Method::Dma, Method::Kernel, Method::Staged];

    /// Its name in configuration and reports.
    pub fn name(self) -> &'static str {
        match self {
            Method::Dma => "dma",
            Method::Kernel => "kernel",
            Method::Staged => "staged",
        }
    }
}

/// What one direction of a link does. Speeds are in bytes per microsecond.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// One long copy.
    pub link: f64,
    /// The copy kernel on pinned memory.
    pub kernel: f64,
    /// Microseconds that each copy of the copy engine costs beyond its bytes.
    pub copy_us: f64,
    /// Microseconds that a staged transfer costs beyond its bytes, a filled and a drained buffer among them.
    pub staged_us: f64,
}

/// What the link of a device does, both ways.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Profile {
    /// From the device.
    pub store: Rates,
    /// To the device.
    pub load: Rates,
}

impl Profile {
    /// Measured on one H100 with PCIe 5 x16, 2026-11; used until this machine was measured.
    pub const ASSUMED: Profile = Profile {
        store: Rates { link: 55_100.0, kernel: 52_200.0, copy_us: 2.3, staged_us: 30.0 },
        load: Rates { link: 54_600.0, kernel: 50_300.0, copy_us: 2.6, staged_us: 30.0 },
    };
}

/// What matters of a transfer for the choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bytes in all.
    pub bytes: usize,
    /// Copies that the copy engine would make straight between pages and slots.
    pub fragments: usize,
    /// Copies that it would make between staging and slots.
    pub slots: usize,
    /// Rows of all of these copies.
    pub rows: usize,
    /// Whether something may be computed meanwhile: beside any store, and beside loads in the background or in parts.
    pub beside: bool,
}

impl Rates {
    /// The method with the least expected time; beside computation the kernel only if it takes half of that. Unless kernels
    /// reach host memory, only the copy engine reaches the slots.
    pub fn choose(&self, shape: &Shape, maps_host: bool) -> Method {
        self.best(shape, if maps_host { &Method::ALL } else { &[Method::Dma, Method::Staged] })
    }

    /// As [`choose`](Rates::choose), where there is no memory for staging.
    pub(super) fn choose_unstaged(&self, shape: &Shape, maps_host: bool) -> Method {
        self.best(shape, if maps_host { &[Method::Dma, Method::Kernel] } else { &[Method::Dma] })
    }

    fn best(&self, shape: &Shape, allowed: &[Method]) -> Method {
        let weight = |method| if method == Method::Kernel && shape.beside { HELD } else { 1.0 };
        let cost = |&method: &Method| weight(method) * self.cost(method, shape);
        allowed.iter().copied().min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap_or(Method::Dma)
    }

    /// Microseconds that `method` is expected to take.
    pub(super) fn cost(&self, method: Method, shape: &Shape) -> f64 {
        let bytes = shape.bytes as f64;
        match method {
            Method::Dma => self.engine_time(bytes, shape.fragments, shape.fragments),
            Method::Kernel => KERNEL_US + bytes / self.kernel,
            Method::Staged => self.staged_us + self.engine_time(bytes, shape.slots, shape.rows),
        }
    }

    fn engine_time(&self, bytes: f64, copies: usize, rows: usize) -> f64 {
        (bytes / self.link).max(ROW_US * rows as f64) + self.copy_us * copies as f64
    }
}

/// The least that a row of a copy takes: 16 KiB ones move at 47.5 GB/s, 32 KiB ones at full speed. One H100, 2026-11.
const ROW_US: f64 = 0.34;

/// What the kernel's time weighs beside computation. It holds some multiprocessors for as long as the link takes, and a step that
/// needs them waits: one of decoding took 38 ms instead of 7 beside a store of 2 GiB. Measured for stores, on one H200, 2026-11.
const HELD: f64 = 2.0;

/// What a launch takes beyond its bytes.
const KERNEL_US: f64 = 6.0;
