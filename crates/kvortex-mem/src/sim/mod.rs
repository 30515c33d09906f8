//! A device in host memory, for the tests of everything that is ordered by streams and events.
//!
//! One thread executes what the streams were given, a piece of the head of a random stream at a time, so that whatever is not
//! ordered by an event is sooner or later done in the wrong order. Every address is checked when it is used: a range that does
//! not lie within one allocation or one registration is a *violation*, which ends the device as an illegal address ends a GPU.

mod device;
mod ranges;
mod worker;

use std::collections::{BTreeMap, HashMap, VecDeque};

use self::ranges::{Kind, Ranges};
use crate::device::{CopyRows, DeviceInfo, Launch, RawStream};
use crate::sync::thread::JoinHandle;
use crate::sync::{Arc, Condvar, Mutex};

/// What a simulated device is like.
#[derive(Debug, Clone)]
pub struct SimOptions {
    /// Two devices with one seed take the same choices, as far as they are given the same work at the same moments.
    pub seed: u64,
    /// Whether kernels reach registered host memory.
    pub maps_host: bool,
    /// Memory of the device in bytes.
    pub memory_bytes: usize,
}

/// A simulated device.
pub struct Sim {
    info: DeviceInfo,
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
    pid: u32,
}

struct Shared {
    state: Mutex<State>,
    /// Signalled when there may be something to execute.
    work: Condvar,
    /// Signalled when something was executed.
    done: Condvar,
}

struct State {
    random: u64,
    streams: BTreeMap<u64, Stream>,
    events: HashMap<u64, Event>,
    ranges: Ranges,
    pools: HashMap<u64, Pool>,
    memory_left: usize,
    next: u64,
    lost: Option<String>,
    violations: Vec<String>,
    failures: HashMap<&'static str, u32>,
    maps_host: bool,
    paused: bool,
    /// Copies of this many bytes, and what their streams do next, are not executed.
    longest: usize,
    closing: bool,
    /// True while the worker executes something with the lock let go.
    busy: bool,
    counts: Counts,
}

/// What a simulated device has executed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Copies.
    pub copies: usize,
    /// Launches of the kernel.
    pub launches: usize,
    /// Bytes of both.
    pub bytes: usize,
}

#[derive(Default)]
struct Stream {
    queue: VecDeque<Op>,
}

#[derive(Default)]
struct Event {
    /// Records so far, and those executed.
    recorded: u64,
    passed: u64,
    when: Option<std::time::Instant>,
    waiters: usize,
    destroyed: bool,
}

#[derive(Default)]
struct Pool {
    keep: usize,
    reserved: usize,
    used: usize,
    peak: usize,
}

enum Op {
    Copy { to: usize, from: usize, bytes: usize, done: usize },
    CopyRows { copy: CopyRows, next: usize },
    Launch { launch: Launch, next: usize },
    Record { event: u64, number: u64 },
    Wait { event: u64, number: u64 },
    Compute(Box<dyn FnOnce() + Send>),
    Free { addr: usize },
}

impl Sim {
    /// A device of 1 GiB with this seed.
    pub fn new(seed: u64) -> Arc<Sim> {
        Sim::with(&SimOptions { seed, maps_host: true, memory_bytes: 1 << 30 })
    }

    /// A device with these options.
    ///
    /// # Panics
    ///
    /// If no thread can be started.
    pub fn with(options: &SimOptions) -> Arc<Sim> {
        let state = State {
            random: options.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            streams: BTreeMap::from([(0, Stream::default())]),
            events: HashMap::new(),
            ranges: Ranges::default(),
            pools: HashMap::new(),
            memory_left: options.memory_bytes,
            next: 1,
            lost: None,
            violations: Vec::new(),
            failures: HashMap::new(),
            maps_host: options.maps_host,
            paused: false,
            longest: usize::MAX,
            closing: false,
            busy: false,
            counts: Counts::default(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), work: Condvar::default(), done: Condvar::default() });
        let own = Arc::clone(&shared);
        let builder = crate::sync::thread::Builder::new().name("kvortex-sim".to_owned());
        let worker = builder.spawn(move || worker::execute(&own)).expect("a thread for the simulation");
        let info = DeviceInfo {
            ordinal: 0,
            name: "simulated".to_owned(),
            bus_id: String::new(),
            driver: (12, 0),
            capability: (9, 0),
            memory_bytes: options.memory_bytes,
            multiprocessors: 1,
            maps_host: options.maps_host,
            numa_node: None,
        };
        Arc::new(Sim { info, shared, worker: Mutex::new(Some(worker)), pid: std::process::id() })
    }

    /// What went wrong with addresses so far.
    pub fn violations(&self) -> Vec<String> {
        self.shared.state.lock().violations.clone()
    }

    /// What was executed so far.
    pub fn counts(&self) -> Counts {
        self.shared.state.lock().counts
    }

    /// Lets the next `times` calls of `call`, a name of the device's contract, fail.
    pub fn fail_next(&self, call: &'static str, times: u32) {
        self.shared.state.lock().failures.insert(call, times);
    }

    /// Ends the device, as a fault of a kernel would.
    pub fn lose(&self, cause: &str) {
        self.shared.state.lock().lose(cause);
        self.shared.done.notify_all();
        self.shared.work.notify_all();
    }

    /// Executes nothing until [`resume`](Sim::resume).
    pub fn pause(&self) {
        self.shared.state.lock().paused = true;
    }

    /// Goes on.
    pub fn resume(&self) {
        self.shared.state.lock().paused = false;
        self.shared.work.notify_all();
    }

    /// Holds streams up that come to a copy of at least `bytes` bytes; `usize::MAX` lets all go on.
    pub fn hold_copies(&self, bytes: usize) {
        self.shared.state.lock().longest = bytes;
        self.shared.work.notify_all();
    }

    /// Gives `stream` work of any kind: what its owner computes.
    pub fn compute(&self, stream: RawStream, work: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock();
        if state.lost.is_none() {
            state.streams.entry(stream.0).or_default().queue.push_back(Op::Compute(Box::new(work)));
        }
        self.shared.work.notify_all();
    }

    /// Waits until everything was executed.
    pub fn idle(&self) {
        let mut state = self.shared.state.lock();
        while state.busy || state.streams.values().any(|stream| !stream.queue.is_empty()) {
            self.shared.done.wait(&mut state);
        }
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        self.shared.state.lock().closing = true;
        self.shared.work.notify_all();
        if let Some(worker) = self.worker.lock().take()
            && worker.thread().id() != crate::sync::thread::current().id()
        {
            drop(worker.join());
        }
    }
}

impl State {
    fn lose(&mut self, cause: &str) {
        self.lost.get_or_insert_with(|| cause.to_owned());
        self.streams.values_mut().for_each(|stream| stream.queue.clear());
    }

    fn violate(&mut self, what: String) {
        self.lose(&what);
        self.violations.push(what);
    }

    /// A number below `bound`.
    fn below(&mut self, bound: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as usize % bound.max(1)
    }

    fn is_reachable(&self, addr: usize, bytes: usize, by_kernel: bool) -> bool {
        let kind = self.ranges.holding(addr, bytes);
        kind.is_some_and(|kind| !by_kernel || kind != Kind::Registered || self.maps_host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::device_suite::device_conforms;

    #[test]
    fn it_keeps_the_contract_of_a_device() {
        for seed in 0..4 {
            let sim = Sim::new(seed);
            let device: Arc<dyn Device> = sim.clone();
            device_conforms(&device);
            assert_eq!(sim.violations(), Vec::<String>::new());
        }
    }
}
