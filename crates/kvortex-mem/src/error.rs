//! What can go wrong with memory and copies.

use std::io;

/// An error of this crate. Each names the value that was wrong and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemError {
    /// The system refused a mapping, or refused to fill it with pages.
    #[error("cannot map {bytes} bytes of host memory: {source}; ask for a smaller pool or free memory")]
    Map {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The file through which processes share words cannot be used.
    #[error("{path} cannot be shared between processes: {cause}; remove it if nobody uses it")]
    Shared {
        /// The file.
        path: String,
        /// What is wrong with it.
        cause: io::Error,
    },
    /// Memory for several processes cannot be had.
    #[error(
        "cannot have {bytes} bytes that processes share: {cause}; ask for a smaller pool, free memory, or enlarge /dev/shm \
         (in Docker with --shm-size)"
    )]
    CannotShare {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        cause: io::Error,
    },
    /// The memory that another process made cannot be opened, or is not what was made.
    #[error("the memory that process {pid} shares cannot be used: {cause}; restart all processes of the engine")]
    NotShared {
        /// The process that made it.
        pid: u32,
        /// What is wrong.
        cause: io::Error,
    },
    /// Shared memory of another length than this process was configured for.
    #[error("the shared memory has {found} bytes where {asked} were asked for: all ranks need the same configuration")]
    OtherLength {
        /// Bytes that there are.
        found: usize,
        /// Bytes asked for.
        asked: usize,
    },
    /// A folder cannot keep blocks.
    #[error("{path} cannot keep blocks: {cause}")]
    Disk {
        /// The folder.
        path: String,
        /// Why, and what to do.
        cause: io::Error,
    },
    /// More memory was asked for than the machine, or the control group of this process, has left.
    #[error(
        "{bytes} bytes of host memory asked for, but only {available} are available here (RAM and control-group limit); \
         ask for a smaller pool, free memory or raise the limit"
    )]
    TooLarge {
        /// Bytes asked for.
        bytes: usize,
        /// Bytes that could be had without swapping or being killed.
        available: usize,
    },
    /// The memory cannot hold even one slot or one aligned allocation.
    #[error(
        "{bytes} bytes of memory cannot hold one piece of {slot_bytes} bytes; enlarge the pool or shrink the block"
    )]
    TooSmall {
        /// Bytes there are.
        bytes: usize,
        /// Bytes one slot or piece needs, rounding included.
        slot_bytes: usize,
    },
    /// A size of zero where at least one byte is needed.
    #[error("{what} must be at least one byte")]
    ZeroBytes {
        /// What was given as zero.
        what: &'static str,
    },
    /// The memory would be cut into more slots than a slot number can name.
    #[error("{slots} slots are more than the {max} that a slot number can name; use larger blocks or a smaller pool")]
    TooManySlots {
        /// Slots the cut would make.
        slots: usize,
        /// The largest count.
        max: usize,
    },
    /// An alignment that is not a power of two, or too small.
    #[error("alignment {alignment} is not a power of two of at least {min}")]
    BadAlignment {
        /// The alignment given.
        alignment: usize,
        /// The smallest alignment.
        min: usize,
    },
    /// A NUMA node that this machine does not have.
    #[error("NUMA node {node} does not exist; this machine has nodes 0 to {last}")]
    NoSuchNode {
        /// The node asked for.
        node: u32,
        /// The highest node number.
        last: u32,
    },
    /// The pool has no free run that is long enough.
    #[error(
        "out of pool memory: {requested} bytes asked for, {free} free, of which the longest run is {largest}; \
         free allocations or enlarge the pool"
    )]
    OutOfMemory {
        /// Bytes asked for.
        requested: usize,
        /// Bytes free in all.
        free: usize,
        /// Bytes of the longest free run.
        largest: usize,
    },
    /// An address that this pool never gave out, or one inside an allocation instead of at its start.
    #[error("address {addr:#x} is not the start of an allocation of this pool")]
    ForeignPointer {
        /// The address given.
        addr: usize,
    },
    /// An address that this pool gave out and that was given back already.
    #[error("address {addr:#x} was already given back to this pool")]
    DoubleFree {
        /// The address given.
        addr: usize,
    },
    /// Bytes outside the region they are said to lie in.
    #[error("bytes {start} to {end} lie outside their region of {len} bytes")]
    Bounds {
        /// First byte, relative to the region's base.
        start: i128,
        /// One past the last byte, relative to the region's base.
        end: i128,
        /// The region's length in bytes.
        len: usize,
    },
    /// A shape, stride or count whose product no address can hold, or that has too many fragments.
    #[error("{what} is too large: {value} (at most {max})")]
    TooComplex {
        /// What is too large.
        what: &'static str,
        /// The value, saturated.
        value: usize,
        /// The largest value.
        max: usize,
    },
    /// The pieces of a transfer do not fit each other.
    #[error("{what}: expected {expected}, got {actual}")]
    PagesMismatch {
        /// What differs.
        what: &'static str,
        /// The value that the rest has.
        expected: usize,
        /// The value found.
        actual: usize,
    },
    /// A step names a page or slot that does not exist.
    #[error("{what} {index} does not exist; there are {count}")]
    OutOfRange {
        /// What was named.
        what: &'static str,
        /// The number given.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// Two steps of one transfer write the same place.
    #[error("{what} {index} is written by two steps of one transfer")]
    WrittenTwice {
        /// What is written.
        what: &'static str,
        /// Its number.
        index: usize,
    },
    /// A page that would have to be written is read-only memory.
    #[error("the target memory is read-only; pass a writable buffer")]
    ReadOnly,
    /// Pages that would be written share bytes with each other, or one with itself.
    #[error("target pages {first} and {second} share bytes; pass targets that do not overlap")]
    Overlap {
        /// The first of the two pages.
        first: usize,
        /// The second; equal to the first where a page overlaps itself.
        second: usize,
    },
    /// A page that would be written lies inside the arena itself.
    #[error(
        "the target memory lies in the cache's own arena (a block that was lent out); copy into memory of your own"
    )]
    TargetInArena,
    /// A copy did not end well; its target holds undefined bytes.
    #[error("copy failed: {0}")]
    CopyFailed(String),
    /// The copy engine or pool has been stopped and takes no more work.
    #[error("stopped: no more work is taken")]
    Stopped,
    /// The object was made by the process that this one was forked from.
    #[error("made in process {parent} and not usable in its forked child {child}; create a new one in the child")]
    Forked {
        /// Process that made the object.
        parent: u32,
        /// This process.
        child: u32,
    },
    /// A thread could not be started.
    #[error("cannot start a copy thread: {0}; raise the limit on threads or use fewer")]
    Thread(#[source] io::Error),
    /// There is no usable GPU.
    #[error("no CUDA device {ordinal}: {reason}")]
    NoDevice {
        /// Number of the device asked for.
        ordinal: u32,
        /// Why, and what to do.
        reason: String,
    },
    /// A call of the GPU's driver failed; the device can still be used.
    #[error("{call} failed with {name} ({code}){}{remedy}", if remedy.is_empty() { "" } else { "; " })]
    Device {
        /// The driver's function.
        call: &'static str,
        /// The driver's name of the error.
        name: String,
        /// The driver's number of the error.
        code: u32,
        /// What to do; empty where nothing general can be said.
        remedy: String,
    },
    /// An earlier fault ended the GPU's context: nothing on that GPU works any more in this process.
    #[error("the GPU is lost to this process: {cause}; restart the process")]
    DeviceLost {
        /// The fault that ended it.
        cause: String,
    },
    /// The GPU has no memory left.
    #[error("out of GPU memory: {requested} bytes asked for, {free} of {total} free; free memory or ask for less")]
    OutOfDeviceMemory {
        /// Bytes asked for.
        requested: usize,
        /// Bytes that the device has free.
        free: usize,
        /// Bytes that the device has.
        total: usize,
    },
    /// Memory in a place that the copy engine does not reach.
    #[error("the memory is in {found}, and copies here reach {expected}; {remedy}")]
    WrongPlace {
        /// Where the memory is.
        found: String,
        /// What can be reached.
        expected: String,
        /// What to do.
        remedy: &'static str,
    },
}
