//! Memory that several processes map: who made it ends, its place is taken by something else, there is not enough of it.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use kvortex_mem::MemError;
use kvortex_mem::map::{HostMemory, MapOptions, SharedPlace};

const MIB: usize = 1 << 20;
const ROLE: &str = "KVORTEX_TEST_ROLE";

fn options(bytes: usize) -> MapOptions {
    MapOptions { bytes, huge_pages: true, numa_node: Some(0), touch_threads: 2 }
}

fn write(memory: &HostMemory, at: usize, byte: u8) {
    assert!(at < memory.len());
    // SAFETY: inside the mapping; the tests take turns.
    unsafe { memory.addr().as_ptr().add(at).write_volatile(byte) };
}

fn read(memory: &HostMemory, at: usize) -> u8 {
    assert!(at < memory.len());
    // SAFETY: as above.
    unsafe { memory.addr().as_ptr().add(at).read_volatile() }
}

fn attach(place: SharedPlace, bytes: usize) -> Result<HostMemory, MemError> {
    HostMemory::attach(&place.open()?, &options(bytes))
}

/// Resident bytes of a mapping, as the system counts them.
fn resident(memory: &HostMemory) -> usize {
    let mut pages = vec![0u8; memory.len() / 4096];
    // SAFETY: one byte per page of the mapping.
    let rc = unsafe { libc::mincore(memory.addr().as_ptr().cast(), memory.len(), pages.as_mut_ptr()) };
    assert_eq!(rc, 0);
    pages.iter().filter(|&&page| page & 1 == 1).count() * 4096
}

#[test]
fn all_who_attach_see_the_same_bytes() {
    for (bytes, len) in [(1, 4096), (4097, 8192), (5 * MIB + 1, 5 * MIB + 4096)] {
        let made = HostMemory::share(&MapOptions { huge_pages: false, ..options(bytes) }).unwrap();
        assert_eq!((made.len(), resident(&made)), (len, len));
        assert!((0..len).step_by(511).all(|at| read(&made, at) == 0));
        write(&made, len - 1, 7);
        let other = attach(made.place().unwrap(), bytes).unwrap();
        assert_eq!((other.len(), read(&other, len - 1)), (len, 7), "touching it changed nothing");
        assert_eq!(other.addr().as_ptr() as usize % if len < 2 * MIB { 4096 } else { 2 * MIB }, 0);
        write(&other, 0, 9);
        assert_eq!(read(&made, 0), 9);
        assert_eq!(other.place(), None, "only who made it is found");
        drop(made);
        assert_eq!(read(&other, len - 1), 7);
    }
    let private = HostMemory::map(&options(4096)).unwrap();
    assert_eq!(private.place(), None);
}

#[test]
fn all_of_it_is_there_before_it_is_touched() {
    let made = HostMemory::share(&MapOptions { touch_threads: 0, ..options(3 * MIB) }).unwrap();
    let descriptor = (made.place().unwrap().words()[0] as u32) - 1;
    let taken = fs::metadata(format!("/proc/self/fd/{descriptor}")).unwrap().blocks() * 512;
    assert!(taken >= 3 * MIB as u64, "{taken} bytes");
}

#[test]
fn a_place_travels_as_numbers() {
    let made = HostMemory::share(&options(4096)).unwrap();
    let place = made.place().unwrap();
    assert_eq!(SharedPlace::from_words(place.words()), place);
    assert_eq!(read(&attach(SharedPlace::from_words(place.words()), 4096).unwrap(), 0), 0);
}

/// Where some are reserved, `echo 8 > /proc/sys/vm/nr_hugepages` say.
#[test]
fn reserved_huge_pages_are_used_where_they_are_enough() {
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or_default();
    let free: usize = free.trim().parse().unwrap_or(0);
    if free < 4 {
        return eprintln!("skipped: {free} huge pages are reserved and free");
    }
    let made = HostMemory::share(&options(3 * MIB)).unwrap();
    assert_eq!((made.len(), made.huge_page_bytes()), (4 * MIB, 4 * MIB));
    write(&made, 4 * MIB - 1, 4);
    let other = attach(made.place().unwrap(), 3 * MIB).unwrap();
    assert_eq!((read(&other, 4 * MIB - 1), other.huge_page_bytes()), (4, 4 * MIB));
    let larger = HostMemory::share(&options((free + 1) * 2 * MIB)).unwrap();
    assert_eq!(larger.len(), (free + 1) * 2 * MIB);
}

#[test]
fn another_length_is_refused() {
    let made = HostMemory::share(&MapOptions { huge_pages: false, ..options(8192) }).unwrap();
    for bytes in [4096, 8193, MIB] {
        let error = attach(made.place().unwrap(), bytes).unwrap_err();
        assert!(matches!(error, MemError::OtherLength { found: 8192, asked } if asked == bytes), "{error}");
    }
    let [whose, token, device, inode, len] = made.place().unwrap().words();
    let error = SharedPlace::from_words([whose, token, device, inode, len + 4096]).open().unwrap_err().to_string();
    assert!(error.contains("it has 8192 bytes, not 12288"), "{error}");
}

#[test]
fn what_took_its_place_is_never_taken_for_it() {
    let (made, other) = (HostMemory::share(&options(4096)).unwrap(), HostMemory::share(&options(4096)).unwrap());
    let [whose, token, device, inode, len] = made.place().unwrap().words();
    let refused = |words| SharedPlace::from_words(words).open().unwrap_err().to_string();
    // The descriptor's number stands for other memory of ours, of the same length.
    let recycled = refused([other.place().unwrap().words()[0], token, device, inode, len]);
    assert!(recycled.contains("something else has its place"), "{recycled}");
    // Even the inode's number is used again.
    let renamed = refused([whose, token ^ 1, device, inode, len]);
    assert!(renamed.contains("has its place; restart all processes"), "{renamed}");
    let file = fs::File::open("/proc/self/maps").unwrap();
    let gone = refused([whose >> 32 << 32 | (file.as_raw_fd() as u64 + 1), token, device, inode, len]);
    assert!(gone.contains("has its place"), "{gone}");
    let (pipe, _end) = std::io::pipe().unwrap();
    let pipe = refused([whose >> 32 << 32 | (pipe.as_raw_fd() as u64 + 1), token, device, inode, len]);
    assert!(pipe.contains("not a file of this user"), "{pipe}");
    drop(made);
    assert!(refused([whose, token, device, inode, len]).contains("restart all processes"));
}

#[test]
fn more_than_there_is_is_refused() {
    let bytes = kvortex_mem::numa::total_memory_limit() / 4096 * 4096 + 4096;
    assert!(matches!(HostMemory::share(&options(bytes)), Err(MemError::TooLarge { .. })));
    assert!(matches!(HostMemory::share(&options(0)), Err(MemError::ZeroBytes { .. })));
}

/// This test's program once more, in a part of [`other_process`].
struct Other {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Other {
    fn start(role: &str) -> Other {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "other_process", "--ignored", "--nocapture"]).env(ROLE, role);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (process.stdin.take(), BufReader::new(process.stdout.take().unwrap()));
        Other { process, input, output }
    }

    /// The next line that it prints for us.
    fn says(&mut self) -> String {
        for line in (&mut self.output).lines() {
            let line = line.unwrap();
            if let Some((_, said)) = line.split_once("SAYS ") {
                return said.to_owned();
            }
        }
        panic!("it ended without a word: {:?}", self.process.wait())
    }

    fn place(&mut self) -> SharedPlace {
        let said = self.says();
        let words: Vec<u64> = said.split(' ').map(|word| word.parse().expect(&said)).collect();
        SharedPlace::from_words(words.try_into().unwrap())
    }

    fn end(mut self) {
        self.input = None;
        assert!(self.process.wait().unwrap().success());
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.process.wait();
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout();
    writeln!(out, "\nSAYS {text}").unwrap();
    out.flush().unwrap();
}

fn hide() {
    // SAFETY: a setting of this process; touches no memory.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) }, 0);
}

/// Private `/dev/shm` of 1 MiB; false where that is not allowed.
fn small_folder() -> bool {
    // SAFETY: changes what this process sees, no memory; the strings live during the calls.
    unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
            && libc::mount(c"none".as_ptr(), c"/dev/shm".as_ptr(), c"tmpfs".as_ptr(), 0, c"size=1m".as_ptr().cast())
                == 0
    }
}

#[test]
#[ignore = "a part of the other tests, in a process of its own"]
fn other_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    match role.as_str() {
        "makes" | "makes a name" => {
            if role == "makes a name" {
                hide();
            }
            let made = HostMemory::share(&options(3 * MIB)).unwrap();
            write(&made, 5, 55);
            say(&made.place().unwrap().words().map(|word| word.to_string()).join(" "));
            std::io::stdin().read_line(&mut String::new()).unwrap();
        }
        "lacks room" => {
            if !small_folder() {
                return say("not allowed");
            }
            hide();
            for touch_threads in [0, 2] {
                say(&HostMemory::share(&MapOptions { touch_threads, ..options(3 * MIB) }).unwrap_err().to_string());
            }
            let kept = HostMemory::share(&MapOptions { huge_pages: false, ..options(MIB / 2) }).unwrap();
            write(&kept, MIB / 2 - 1, 1);
            say(&fs::read_dir("/dev/shm").unwrap().count().to_string());
        }
        other => panic!("no role {other}"),
    }
}

#[test]
fn it_stays_when_who_made_it_ends_and_nobody_else_finds_it() {
    let mut other = Other::start("makes");
    let place = other.place();
    let memory = attach(place, 3 * MIB).unwrap();
    assert_eq!(read(&memory, 5), 55);
    let held = place.open().unwrap();
    other.kill();
    assert_eq!(read(&memory, 5), 55);
    write(&memory, 3 * MIB - 1, 3);
    assert!(matches!(place.open(), Err(MemError::NotShared { .. })));
    let late = HostMemory::attach(&held, &options(3 * MIB)).unwrap();
    assert_eq!(read(&late, 3 * MIB - 1), 3);
}

fn path_of(place: &SharedPlace) -> PathBuf {
    Path::new("/dev/shm").join(format!("kvortex-row-{:016x}", place.words()[1]))
}

#[test]
fn it_has_a_name_where_others_may_not_look() {
    let mut other = Other::start("makes a name");
    let place = other.place();
    let path = path_of(&place);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let memory = attach(place, 3 * MIB).unwrap();
    assert_eq!(read(&memory, 5), 55);
    drop(memory);
    assert!(path.exists(), "it is its maker's to take away, or of who knows that all are there");
    // A link with its name is not followed, not even to the very file.
    let moved = path.with_extension("moved");
    fs::rename(&path, &moved).unwrap();
    std::os::unix::fs::symlink(&moved, &path).unwrap();
    let error = place.open().unwrap_err().to_string();
    assert!(error.contains("not a file of this user"), "{error}");
    fs::rename(&moved, &path).unwrap();
    let held = place.open().unwrap();
    place.close_door();
    assert!(!path.exists());
    assert_eq!(read(&HostMemory::attach(&held, &options(3 * MIB)).unwrap(), 5), 55);
    other.end();
}

#[test]
fn a_name_goes_with_who_made_it() {
    let mut other = Other::start("makes a name");
    let path = path_of(&other.place());
    assert!(path.exists());
    other.end();
    assert!(!path.exists());
}

/// Where it fits nobody is told by a signal later, and what did not fit leaves nothing behind.
#[test]
fn too_small_a_folder_is_an_error_with_the_remedy() {
    let mut other = Other::start("lacks room");
    let said = other.says();
    if said == "not allowed" {
        return eprintln!("skipped: no mount namespace of one's own is allowed here");
    }
    for error in [said, other.says()] {
        assert!(error.contains("cannot have 3145728 bytes that processes share"), "{error}");
        assert!(error.contains("No space left on device") && error.contains("--shm-size"), "{error}");
    }
    assert_eq!(other.says(), "1");
    other.end();
}

/// `cargo test --release -p kvortex-mem --test sharing -- --ignored --nocapture what_it_costs`
#[test]
#[ignore = "takes 8 GiB, and measures"]
fn what_it_costs() {
    let options = MapOptions { bytes: 4096 * MIB, huge_pages: true, numa_node: None, touch_threads: 2 };
    let tell = |what, memory: &HostMemory, took: Duration| {
        say(&format!("{what}: {took:.2?}, {} MiB in huge pages", memory.huge_page_bytes() / MIB));
    };
    let start = Instant::now();
    let private = HostMemory::map(&options).unwrap();
    tell("private", &private, start.elapsed());
    drop(private);
    let start = Instant::now();
    let made = HostMemory::share(&options).unwrap();
    tell("shared", &made, start.elapsed());
    let start = Instant::now();
    let other = HostMemory::attach(&made.place().unwrap().open().unwrap(), &options).unwrap();
    tell("attached", &other, start.elapsed());
}
