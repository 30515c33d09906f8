//! What the machine has: NUMA nodes, memory, and the limits of the control group this process runs in.

use std::io;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use crate::error::MemError;

const NODES: &str = "/sys/devices/system/node/online";

/// Number of NUMA nodes, counted up to the highest; 1 where the system does not tell.
pub fn node_count() -> u32 {
    std::fs::read_to_string(NODES).ok().and_then(|list| highest_in(&list)).map_or(1, |highest| highest + 1)
}

/// Bytes that this process could take now without swapping or being ended: the least of `MemAvailable` and of what is left
/// under each limit of its control groups. `usize::MAX` where the system tells neither.
pub fn available_memory() -> usize {
    let ram = meminfo("MemAvailable:").unwrap_or(usize::MAX);
    groups().iter().filter_map(Group::left).fold(ram, usize::min)
}

/// Bytes that this process could ever take: the least of the machine's RAM and each limit of its control groups.
/// `usize::MAX` where the system tells neither.
pub fn total_memory_limit() -> usize {
    let ram = meminfo("MemTotal:").unwrap_or(usize::MAX);
    groups().iter().filter_map(Group::limit).fold(ram, usize::min)
}

pub(crate) fn check_node(node: u32) -> Result<(), MemError> {
    let last = node_count() - 1;
    if node > last { Err(MemError::NoSuchNode { node, last }) } else { Ok(()) }
}

/// Prefers the memory of `node` for the pages of a mapping that are not filled yet.
///
/// Preferred rather than strictly bound: with a strict binding a full node ends the process although others have room.
pub(crate) fn prefer(addr: NonNull<u8>, len: usize, node: u32) -> io::Result<()> {
    const MPOL_PREFERRED: libc::c_long = 1;
    let bits = usize::BITS;
    let mut mask = vec![0usize; (node / bits + 1) as usize];
    mask[(node / bits) as usize] = 1 << (node % bits);
    // The kernel reads one bit less than it is told.
    let mask_bits = mask.len() * bits as usize + 1;
    // SAFETY: the mask lives during the call and has the bits it is said to have; the policy changes no bytes.
    let rc = unsafe { libc::syscall(libc::SYS_mbind, addr.as_ptr(), len, MPOL_PREFERRED, mask.as_ptr(), mask_bits, 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The highest number of a list like `0-3,8`.
fn highest_in(list: &str) -> Option<u32> {
    list.trim().split([',', '-']).filter_map(|number| number.parse().ok()).max()
}

fn meminfo(field: &str) -> Option<usize> {
    kib_field(&std::fs::read_to_string("/proc/meminfo").ok()?, field)
}

fn kib_field(text: &str, field: &str) -> Option<usize> {
    let value = text.lines().find_map(|line| line.strip_prefix(field))?;
    value.trim().trim_end_matches("kB").trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// One control group that limits this process, in either version of the interface.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    path: PathBuf,
    version: Version,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Group {
    /// The limit in bytes, if there is one.
    fn limit(&self) -> Option<usize> {
        let file = match self.version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        // Version 2 says "max", version 1 a number near 2^63.
        self.number(file).filter(|&limit| limit < 1 << 60)
    }

    /// Bytes left under the limit; file pages count as free, because the kernel drops them before it ends a process.
    fn left(&self) -> Option<usize> {
        let (usage, prefix) = match self.version {
            Version::One => ("memory.usage_in_bytes", "total_"),
            Version::Two => ("memory.current", ""),
        };
        let used = self.number(usage)?.saturating_sub(self.file_pages(prefix));
        Some(self.limit()?.saturating_sub(used))
    }

    fn file_pages(&self, prefix: &str) -> usize {
        let text = std::fs::read_to_string(self.path.join("memory.stat")).unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(prefix)?.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|value| value.trim().parse::<usize>().ok()).unwrap_or(0)
        };
        field("inactive_file") + field("active_file")
    }

    fn number(&self, file: &str) -> Option<usize> {
        std::fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()
    }
}

fn groups() -> Vec<Group> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    groups_in(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"))
}

/// The group of this process and those above it, for each memory hierarchy that is mounted.
fn groups_in(mountinfo: &str, membership: &str) -> Vec<Group> {
    mountinfo
        .lines()
        .filter_map(memory_mount)
        .flat_map(|mount| {
            let own = own_path(membership, mount.version).unwrap_or("/");
            // In a container the mount's root may be the own group, named as the host names it.
            let inside = own.strip_prefix(mount.root).unwrap_or(own).trim_start_matches('/');
            let (top, version) = (PathBuf::from(mount.point), mount.version);
            let lowest = top.join(inside);
            let levels: Vec<PathBuf> =
                lowest.ancestors().take_while(|path| path.starts_with(&top)).map(Path::to_owned).collect();
            levels.into_iter().map(move |path| Group { path, version })
        })
        .collect()
}

struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    version: Version,
}

/// Reads a line `id parent device root point options ... - type source super-options`.
fn memory_mount(line: &str) -> Option<Mount<'_>> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ').skip(3);
    let (root, point) = (front.next()?, front.next()?);
    let mut back = back.split(' ');
    let version = match back.next()? {
        "cgroup2" => Version::Two,
        "cgroup" if back.nth(1)?.split(',').any(|option| option == "memory") => Version::One,
        _ => return None,
    };
    Some(Mount { root: root.trim_end_matches('/'), point, version })
}

/// The group path of a line `id:controllers:path`.
fn own_path(membership: &str, version: Version) -> Option<&str> {
    membership.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let wanted = match version {
            Version::Two => controllers.is_empty(),
            Version::One => controllers.split(',').any(|controller| controller == "memory"),
        };
        wanted.then_some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(path: &str, version: Version) -> Group {
        Group { path: path.into(), version }
    }

    #[test]
    fn groups_of_both_versions_are_found_up_to_the_mount() {
        let mounts = "\
            31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
            35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:7 - cgroup cgroup rw,memory\n\
            36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let own = "5:cpu:/other\n4:memory:/a/b\n0::/c\n";
        let found = groups_in(mounts, own);
        let one = ["/sys/fs/cgroup/memory/a/b", "/sys/fs/cgroup/memory/a", "/sys/fs/cgroup/memory"];
        let two = ["/sys/fs/cgroup/unified/c", "/sys/fs/cgroup/unified"];
        let expected: Vec<Group> = one
            .iter()
            .map(|path| group(path, Version::One))
            .chain(two.iter().map(|path| group(path, Version::Two)))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_container_that_mounts_its_own_group_as_root_is_understood() {
        let mounts = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let found = groups_in(mounts, "4:memory:/docker/abc\n");
        assert_eq!(found, [group("/sys/fs/cgroup/memory", Version::One)]);
        let found = groups_in(mounts, "4:memory:/docker/abc/inner\n");
        assert_eq!(found[0], group("/sys/fs/cgroup/memory/inner", Version::One));
        assert_eq!(groups_in("garbage\n1 2 3 - cgroup\n", "garbage"), []);
    }

    struct Folder(PathBuf);

    impl Folder {
        fn with(name: &str, files: &[(&str, &str)]) -> Folder {
            let path = std::env::temp_dir().join(format!("kvortex-numa-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            files.iter().for_each(|(file, text)| std::fs::write(path.join(file), text).unwrap());
            Folder(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn limits_of_version_one_count_file_pages_as_free() {
        let stat = "cache 9\ninactive_file 1\ntotal_inactive_file 300\ntotal_active_file 50\n";
        let usage = ("memory.usage_in_bytes", "1000\n");
        let limited = Folder::with("one", &[("memory.limit_in_bytes", "5000\n"), usage, ("memory.stat", stat)]);
        let found = Group { path: limited.0.clone(), version: Version::One };
        assert_eq!((found.limit(), found.left()), (Some(5000), Some(5000 - (1000 - 350))));
        let unlimited = Folder::with("none", &[("memory.limit_in_bytes", "9223372036854771712\n"), usage]);
        let found = Group { path: unlimited.0.clone(), version: Version::One };
        assert_eq!((found.limit(), found.left()), (None, None));
    }

    #[test]
    fn limits_of_version_two_are_read() {
        let stat = "anon 5\ninactive_file 300\nactive_file 50\n";
        let files = [("memory.max", "5000\n"), ("memory.current", "6000\n"), ("memory.stat", stat)];
        let limited = Folder::with("two", &files);
        let found = Group { path: limited.0.clone(), version: Version::Two };
        assert_eq!((found.limit(), found.left()), (Some(5000), Some(0)));
        let unlimited = Folder::with("max", &[("memory.max", "max\n"), ("memory.current", "6000\n")]);
        let found = Group { path: unlimited.0.clone(), version: Version::Two };
        assert_eq!((found.limit(), found.left()), (None, None));
    }

    #[test]
    fn lists_and_fields_are_read() {
        assert_eq!(highest_in("0\n"), Some(0));
        assert_eq!(highest_in("0-3,8\n"), Some(8));
        assert_eq!(highest_in("\n"), None);
        let text = "MemTotal:       24684084 kB\nMemFree: 1 kB\n";
        assert_eq!(kib_field(text, "MemTotal:"), Some(24684084 * 1024));
        assert_eq!(kib_field(text, "MemAvailable:"), None);
    }

    #[test]
    fn preferring_a_node_works_where_it_is_allowed() {
        let memory = crate::map::HostMemory::map(&crate::map::MapOptions {
            bytes: 4096,
            huge_pages: false,
            numa_node: None,
            touch_threads: 0,
        })
        .unwrap();
        if let Err(error) = prefer(memory.addr(), memory.len(), 0) {
            let allowed = [libc::ENOSYS, libc::EPERM].map(Some);
            assert!(allowed.contains(&error.raw_os_error()), "{error}");
        }
        assert_eq!(prefer(memory.addr(), memory.len(), 1000).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
