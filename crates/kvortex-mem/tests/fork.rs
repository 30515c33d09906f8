//! A forked child inherits an engine whose threads do not exist there. It must be told, and must never wait for them.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvortex_mem::MemError;
use kvortex_mem::arena::Arena;
use kvortex_mem::copy::{CopyEngine, Direction, HostCopy, Step, Transfer};
use kvortex_mem::file::{SlabFile, SlabOptions};
use kvortex_mem::map::{HostMemory, MapOptions};
use kvortex_mem::shared::SharedWords;
use kvortex_mem::slots::SlotId;
use kvortex_mem::span::{Pages, Pattern, Region, Segment};

const SLOT_BYTES: usize = 4096;
const SLOTS: usize = 1024;

/// Memory that transfers of any number of pages share.
struct Memory {
    arena: Arc<Arena>,
    region: Region,
}

impl Memory {
    fn new() -> Memory {
        let bytes = SLOTS * SLOT_BYTES;
        let options = MapOptions { bytes, huge_pages: false, numa_node: None, touch_threads: 1 };
        let arena = Arena::cut(HostMemory::map(&options).unwrap(), SLOT_BYTES).unwrap();
        Memory { arena: Arc::new(arena), region: Region::from_vec(vec![0; bytes]) }
    }

    /// A store of the first `count` pages of 64 bytes or of a whole slot.
    fn store(&self, count: usize, page_bytes: usize) -> Transfer {
        let (region, pattern) = (self.region.clone(), Arc::new(Pattern::contiguous(page_bytes)));
        let table = Segment::Table { region, pattern, first: 0, stride: SLOT_BYTES as isize, count };
        let steps = (0..count as u32).map(|index| Step { slot: SlotId(index), page: index }).collect();
        let pages = Pages::new(vec![table]).unwrap();
        Transfer::new(Direction::Store, Arc::clone(&self.arena), steps, pages).unwrap()
    }
}

/// What the child saw, as its exit status: 0 if every call told it that it is a child.
fn in_child(engine: &HostCopy, transfers: [Transfer; 2]) -> i32 {
    let [first, second] = transfers;
    let parent = std::os::unix::process::parent_id();
    let told = |result| matches!(result, Err(MemError::Forked { parent: named, .. }) if named == parent);
    if !told(engine.run(first)) {
        return 1;
    }
    if !told(engine.submit(second, Box::new(|_| ()))) {
        return 2;
    }
    if !engine.stop(Duration::from_secs(60)) {
        return 3;
    }
    // SAFETY: in the child nobody else has the engine, and the child ends before its owner could drop it again.
    unsafe { std::ptr::drop_in_place(std::ptr::from_ref(engine).cast_mut()) };
    0
}

/// Exit status of `child`, or `None` if it had to be ended after `patience`.
fn exit_of(child: libc::pid_t, patience: Duration) -> Option<i32> {
    let start = Instant::now();
    let mut status = 0;
    loop {
        // SAFETY: `child` is a child of this process, and `status` outlives the call.
        if unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == child {
            return libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
        }
        if start.elapsed() > patience {
            // SAFETY: as above; the child is this test's own.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, &mut status, 0);
            }
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn fork_once(engine: &HostCopy, transfers: [Transfer; 2]) {
    // SAFETY: the child calls only code that must work after a fork, and ends without unwinding or running exit handlers.
    match unsafe { libc::fork() } {
        0 => {
            let status = in_child(engine, transfers);
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(status) };
        }
        -1 => panic!("cannot fork: {}", std::io::Error::last_os_error()),
        child => assert_eq!(exit_of(child, Duration::from_secs(10)), Some(0)),
    }
}

/// Sets a flag when it goes, also by a panic.
struct Sets<'a>(&'a AtomicBool);

impl Drop for Sets<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Forks while other threads copy as little and as often as they can, so that the engine's locks are often held.
#[test]
fn a_forked_child_is_told_and_never_waits() {
    let (memory, engine, over) = (Memory::new(), HostCopy::new(3), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let _over = Sets(&over);
        for submits in [false, true] {
            let (engine, over) = (&engine, &over);
            scope.spawn(move || {
                let memory = Memory::new();
                while !over.load(Ordering::Relaxed) {
                    if submits {
                        let (sender, receiver) = mpsc::channel();
                        let done = Box::new(move |result| sender.send(result).unwrap());
                        engine.submit(memory.store(1, 64), done).unwrap();
                        receiver.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
                    }
                    engine.run(memory.store(1, 64)).unwrap();
                }
            });
        }
        for _ in 0..60 {
            engine.run(memory.store(SLOTS, SLOT_BYTES)).unwrap();
            fork_once(&engine, [memory.store(1, 64), memory.store(SLOTS, SLOT_BYTES)]);
        }
    });
}

/// A child that does `work` and then waits for its end.
struct Idle(libc::pid_t);

impl Idle {
    fn after(work: impl FnOnce()) -> Idle {
        // SAFETY: the child calls only what must work after a fork, and never returns.
        match unsafe { libc::fork() } {
            0 => {
                work();
                loop {
                    // SAFETY: waits for a signal.
                    unsafe { libc::pause() };
                }
            }
            -1 => panic!("cannot fork: {}", std::io::Error::last_os_error()),
            child => Idle(child),
        }
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        assert_eq!(exit_of(self.0, Duration::ZERO), None);
    }
}

/// A child has all that its parent had open, until it becomes another program.
#[test]
fn a_child_holds_no_lock_that_its_parent_let_go() {
    let base = std::env::temp_dir().join(format!("kvortex-fork-{}", std::process::id()));
    let (board, options) = (base.with_extension("board"), SlabOptions::new(&base));
    let told = SharedWords::join(&base.with_extension("told"), 1).unwrap();
    let words = SharedWords::join(&board, 8).unwrap();
    words.words()[0].store(7, Ordering::Relaxed);
    let file = SlabFile::open(&options).unwrap();
    let child = Idle::after(|| ());
    drop((words, file));
    let words = SharedWords::join(&board, 8).unwrap();
    assert_eq!(words.words()[0].load(Ordering::Relaxed), 0, "it is somebody's still");
    let file = SlabFile::open(&options).unwrap();
    drop(child);
    // Nor does a child let go of what its parent holds.
    words.words()[0].store(7, Ordering::Relaxed);
    let child = Idle::after(|| {
        // SAFETY: in the child nobody else has them, and it never returns to their owner.
        unsafe {
            std::ptr::drop_in_place(std::ptr::from_ref(&file).cast_mut());
            std::ptr::drop_in_place(std::ptr::from_ref(&words).cast_mut());
        }
        told.words()[0].store(1, Ordering::Release);
    });
    while told.words()[0].load(Ordering::Acquire) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(SlabFile::open(&options).is_err(), "two have the folder");
    assert_eq!(SharedWords::join(&board, 8).unwrap().words()[0].load(Ordering::Relaxed), 7);
    drop((child, file));
    [words, told].iter().for_each(SharedWords::close_door);
    std::fs::remove_dir_all(&base).unwrap();
}
