use std::path::PathBuf;
use std::sync::mpsc;

use super::*;
use crate::map::{HostMemory, MapOptions};
use crate::slots::SlotId;

const SLOT: usize = 3 * ALIGNMENT;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("kvortex-file-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Folder(path)
    }

    fn open(&self, options: SlabOptions) -> Arc<SlabFile> {
        let mut options = options;
        options.folder.clone_from(&self.0);
        let file = SlabFile::open(&options).unwrap();
        file.grow(64 * SLOT as u64).unwrap();
        Arc::new(file)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn arena() -> Arc<Arena> {
    let options = MapOptions { bytes: 64 * SLOT, huge_pages: false, numa_node: None, touch_threads: 1 };
    Arc::new(Arena::cut(HostMemory::map(&options).unwrap(), SLOT).unwrap())
}

fn fill(arena: &Arena, slot: u32, value: u8) {
    // SAFETY: the slot is this test's, and no operation uses it.
    unsafe { arena.addr(SlotId(slot)).unwrap().as_ptr().write_bytes(value, SLOT) };
}

fn value(arena: &Arena, slot: u32) -> Vec<u8> {
    // SAFETY: as in `fill`.
    unsafe { std::slice::from_raw_parts(arena.addr(SlotId(slot)).unwrap().as_ptr(), SLOT) }.to_vec()
}

/// Carries `steps` of (access, slot, place) out together and tells how each ended.
fn all(io: &dyn FileIo, steps: &[(Access, u32, u64)]) -> Vec<std::io::Result<()>> {
    let (sender, receiver) = mpsc::channel();
    let op = |&(access, slot, place): &(Access, u32, u64)| {
        let (sender, index) = (sender.clone(), place);
        let done: Done = Box::new(move |ended| sender.send((index, ended.result)).unwrap());
        Op { access, offset: place * SLOT as u64, memory: Memory::Slot(SlotId(slot)), deadline: None, done }
    };
    io.submit(steps.iter().map(op).collect());
    let ended = |_| receiver.recv_timeout(Duration::from_secs(60)).unwrap();
    let mut results: Vec<_> = (0..steps.len()).map(ended).collect();
    results.sort_by_key(|(place, _)| *place);
    results.into_iter().map(|(_, result)| result).collect()
}

fn each_engine(name: &str, test: impl Fn(&dyn FileIo, &Arc<Arena>)) {
    for direct in [true, false] {
        for ring in [false, true] {
            let folder = Folder::new(&format!("{name}-{direct}-{ring}"));
            let mut options = SlabOptions::new("");
            options.direct = direct;
            let file = folder.open(options);
            let arena = arena();
            let io = serve(&file, &arena, IoOptions { depth: 8, ring }).unwrap();
            // In the system's temporary folder a ring works wherever the kernel gives one.
            let expected = if ring && io_uring::IoUring::new(2).is_ok() { "io_uring" } else { "psync" };
            assert_eq!(io.name(), expected);
            test(&*io, &arena);
            assert!(io.stop(Duration::from_secs(10)));
        }
    }
}

#[test]
fn slots_come_back_as_they_were_written() {
    each_engine("round", |io, arena| {
        (0..32).for_each(|slot| fill(arena, slot, slot as u8 + 1));
        let writes: Vec<_> = (0..32).map(|slot| (Access::Write, slot, 63 - u64::from(slot))).collect();
        assert!(all(io, &writes).iter().all(Result::is_ok));
        let reads: Vec<_> = (0..32).map(|slot| (Access::Read, slot + 32, 63 - u64::from(slot))).collect();
        assert!(all(io, &reads).iter().all(Result::is_ok));
        (0..32).for_each(|slot| assert_eq!(value(arena, slot + 32), vec![slot as u8 + 1; SLOT], "{slot}"));
    });
}

#[test]
fn what_lies_beyond_the_end_is_an_error() {
    each_engine("end", |io, _| {
        let ended = all(io, &[(Access::Read, 0, 63), (Access::Read, 1, 64), (Access::Read, 2, 1 << 20)]);
        assert!(ended[0].is_ok() && ended[1].is_err() && ended[2].is_err(), "{ended:?}");
        assert!(all(io, &[(Access::Read, 64, 0)])[0].is_err(), "there is no slot 64");
    });
}

#[test]
fn nothing_begins_after_its_deadline_or_the_end() {
    each_engine("late", |io, arena| {
        fill(arena, 0, 7);
        let (sender, receiver) = mpsc::channel();
        let op = |deadline| {
            let sender = sender.clone();
            let done: Done = Box::new(move |ended| sender.send(ended.result.unwrap_err().kind()).unwrap());
            Op { access: Access::Read, offset: 0, memory: Memory::Slot(SlotId(0)), deadline, done }
        };
        io.submit(vec![op(Some(std::time::Instant::now()))]);
        assert_eq!(receiver.recv().unwrap(), std::io::ErrorKind::TimedOut);
        assert!(io.stop(Duration::from_secs(10)));
        io.submit(vec![op(None)]);
        assert_eq!(receiver.recv().unwrap(), std::io::ErrorKind::Interrupted);
        assert_eq!(value(arena, 0), vec![7; SLOT]);
    });
}

#[test]
fn a_scratch_comes_back_with_its_bytes() {
    each_engine("scratch", |io, _| {
        let (sender, receiver) = mpsc::channel();
        let mut scratch = Scratch::new(ALIGNMENT);
        scratch.fill(9);
        for (access, memory) in [(Access::Write, scratch), (Access::Read, Scratch::new(1))] {
            let sender = sender.clone();
            let done: Done = Box::new(move |ended| sender.send(ended).unwrap());
            io.submit(vec![Op { access, offset: 8192, memory: Memory::Scratch(memory), deadline: None, done }]);
            let Ended { result, memory: Memory::Scratch(scratch) } = receiver.recv().unwrap() else { panic!() };
            result.unwrap();
            assert_eq!(&scratch[..], &[9; ALIGNMENT]);
        }
    });
}

#[test]
fn short_counts_go_on_and_errors_are_told() {
    let folder = Folder::new("short");
    let plan = Arc::new(FaultPlan::default());
    let file = folder.open(SlabOptions::new("").with_faults(&plan));
    let arena = arena();
    let io = Psync::start(&file, &arena, 2).unwrap();
    fill(&arena, 0, 3);
    plan.always(Call::Write, Effect::Short(ALIGNMENT));
    plan.always(Call::Read, Effect::Short(2 * ALIGNMENT));
    assert!(all(&io, &[(Access::Write, 0, 5)])[0].is_ok());
    assert!(all(&io, &[(Access::Read, 1, 5)])[0].is_ok());
    assert_eq!(value(&arena, 1), vec![3; SLOT]);
    plan.set(&[Fault { call: Call::Read, first: 0, count: u64::MAX, effect: Effect::Short(0) }]);
    assert_eq!(all(&io, &[(Access::Read, 1, 5)])[0].as_ref().unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    plan.set(&[Fault { call: Call::Read, first: 0, count: u64::MAX, effect: Effect::Errno(libc::EIO) }]);
    assert_eq!(all(&io, &[(Access::Read, 1, 5)])[0].as_ref().unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
fn a_folder_has_one_owner_and_no_other_writer() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    let folder = Folder::new("owner");
    let file = folder.open(SlabOptions::new(""));
    let mode = |name: &str| std::fs::metadata(folder.0.join(name)).unwrap().mode() & 0o777;
    assert_eq!((mode(""), mode("v1"), mode("v1/blocks")), (0o700, 0o700, 0o600));
    let again = SlabFile::open(&SlabOptions::new(&folder.0)).unwrap_err().to_string();
    assert!(again.contains("another process uses it"), "{again}");
    drop(file);
    std::fs::set_permissions(&folder.0, std::fs::Permissions::from_mode(0o777)).unwrap();
    let open = SlabFile::open(&SlabOptions::new(&folder.0)).unwrap_err().to_string();
    assert!(open.contains("chmod go-w"), "{open}");
    std::fs::set_permissions(&folder.0, std::fs::Permissions::from_mode(0o700)).unwrap();
    let link = folder.0.join("link");
    symlink(&folder.0, &link).unwrap();
    let linked = SlabFile::open(&SlabOptions::new(&link)).unwrap_err().to_string();
    assert!(linked.contains("a link or a file"), "{linked}");
    std::fs::remove_file(folder.0.join("v1/blocks")).unwrap();
    symlink("/etc/passwd", folder.0.join("v1/blocks")).unwrap();
    assert!(SlabFile::open(&SlabOptions::new(&folder.0)).is_err());
}
