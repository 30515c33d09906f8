//! Huge pages: which there are, and which a mapping got.

use std::ops::Range;

use super::HUGE_PAGE;

/// The fields of `smaps` that count them: transparent ones of private and of shared memory, and reserved ones.
const FIELDS: [&str; 4] = ["AnonHugePages:", "ShmemPmdMapped:", "Shared_Hugetlb:", "Private_Hugetlb:"];

/// Reserved pages of the size that mappings are aligned to.
const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Bytes of reserved huge pages that nobody has been promised.
pub(super) fn reserved() -> usize {
    let count = |file: &str| {
        let text = std::fs::read_to_string(format!("{RESERVED}/{file}")).unwrap_or_default();
        text.trim().parse::<usize>().unwrap_or(0)
    };
    count("free_hugepages").saturating_sub(count("resv_hugepages")).saturating_mul(HUGE_PAGE)
}

/// Bytes in huge pages of the areas of `smaps` that intersect `range`.
pub(super) fn bytes_in(smaps: &str, range: Range<usize>) -> usize {
    let mut inside = false;
    let mut kib = 0usize;
    for line in smaps.lines() {
        if let Some(area) = area_of(line) {
            inside = area.start < range.end && range.start < area.end;
        } else if inside && let Some(value) = FIELDS.iter().find_map(|field| line.strip_prefix(field)) {
            kib += value.trim_end_matches("kB").trim().parse::<usize>().unwrap_or(0);
        }
    }
    // Areas may be joined with a neighbour's.
    (kib << 10).min(range.len())
}

/// The addresses of a line that opens an area: `start-end perms ...`.
fn area_of(line: &str) -> Option<Range<usize>> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_bytes_are_those_of_the_own_area() {
        let smaps = "\
            1000-3000 rw-p 00000000 00:00 0 [heap]\nSize: 8 kB\nAnonHugePages:        4 kB\n\
            400000-800000 rw-p 00000000 00:00 0 \nSize: 4096 kB\nAnonHugePages:     2048 kB\nVmFlags: rd\n\
            800000-900000 rw-s 00000000 00:01 9 /memfd:x (deleted)\nShmemPmdMapped:     1024 kB\n\
            a00000-c00000 rw-s 00000000 00:01 9 /memfd:y (deleted)\nShared_Hugetlb: 1024 kB\nPrivate_Hugetlb: 512 kB\n";
        assert_eq!(bytes_in(smaps, 0x400000..0x800000), 2 << 20);
        assert_eq!(bytes_in(smaps, 0x400000..0x900000), 3 << 20);
        assert_eq!(bytes_in(smaps, 0x500000..0x501000), 4096);
        assert_eq!(bytes_in(smaps, 0xa00000..0xc00000), 1536 << 10);
        assert_eq!(bytes_in("", 0..4096), 0);
    }
}
