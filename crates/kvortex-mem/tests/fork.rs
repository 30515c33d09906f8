//! A forked child inherits an engine whose threads do not exist there. It must be told, and must never wait for them.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvortex_mem::MemError;
use kvortex_mem::arena::Arena;
use kvortex_mem::copy::{CopyEngine, Direction, HostCopy, Step, Transfer};
use kvortex_mem::map::{HostMemory, MapOptions};
use kvortex_mem::slots::SlotId;
use kvortex_mem::span::{Pages, Pattern, Region, Segment};

const SLOTS: usize = 8;
const SLOT_BYTES: usize = 1 << 20;

fn load() -> Transfer {
    let options = MapOptions { bytes: SLOTS * SLOT_BYTES, huge_pages: false, numa_node: None, touch_threads: 0 };
    let arena = Arena::cut(HostMemory::map(&options).unwrap(), SLOT_BYTES).unwrap();
    let region = Region::from_vec(vec![0; SLOTS * SLOT_BYTES]);
    let pattern = Arc::new(Pattern::contiguous(SLOT_BYTES));
    let table = Segment::Table { region, pattern, first: 0, stride: SLOT_BYTES as isize, count: SLOTS };
    let steps = (0..SLOTS as u32).map(|index| Step { slot: SlotId(index), page: index }).collect();
    Transfer::new(Direction::Load, Arc::new(arena), steps, Pages::new(vec![table]).unwrap()).unwrap()
}

/// What the child saw, as its exit status: 0 if every call told it that it is a child.
fn in_child(engine: HostCopy, transfers: [Transfer; 2]) -> i32 {
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
    drop(engine);
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

/// Forks while the engine's threads copy, so that its locks are likely to be held.
#[test]
fn a_forked_child_is_told_and_never_waits() {
    for round in 0..25 {
        let engine = HostCopy::new(3);
        let (sender, receiver) = mpsc::channel();
        for _ in 0..3 {
            let sender = sender.clone();
            engine.submit(load(), Box::new(move |result| sender.send(result).unwrap())).unwrap();
        }
        let transfers = [load(), load()];
        std::thread::sleep(Duration::from_micros(round * 31));
        // SAFETY: the child calls only code that must work after a fork, and ends without unwinding or running exit handlers.
        match unsafe { libc::fork() } {
            0 => {
                let status = in_child(engine, transfers);
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(status) };
            }
            child => assert_eq!(exit_of(child, Duration::from_secs(20)), Some(0), "round {round}"),
        }
        drop(transfers);
        for _ in 0..3 {
            receiver.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
        }
        drop(engine);
    }
}
