"""What a disk tier keeps in its files, found by the format in docs/disk.md, so that tests can spoil it."""

from pathlib import Path

PAGE = 4096


def files(folder):
    """The files of all ranks."""
    return sorted(Path(folder).glob("**/v1/blocks"))


def payloads(path):
    """Where the bytes of each block begin, and how many they are."""
    with open(path, "rb") as file:
        first = file.read(PAGE)
        stride, slots = int.from_bytes(first[48:56], "little"), int.from_bytes(first[56:60], "little")
        size, found = path.stat().st_size, []
        segment = slots * (PAGE + stride)
        for start in range(2 * PAGE, size - segment + 1, segment):
            for slot in range(slots):
                file.seek(start + slot * PAGE)
                if file.read(8) == b"KVORTEX\x01":
                    found.append((start + slots * PAGE + slot * stride, int.from_bytes(first[40:48], "little")))
    return found


def zero(folder):
    """Overwrites the bytes of every block with zeroes."""
    for path in files(folder):
        with open(path, "r+b") as file:
            for offset, length in payloads(path):
                file.seek(offset)
                file.write(bytes(length))


def truncate(folder):
    """Cuts every file in the middle of its first block."""
    for path in files(folder):
        offset, length = payloads(path)[0]
        with open(path, "r+b") as file:
            file.truncate(offset + length // 2)


def swap(folder):
    """Exchanges the bytes of neighbours."""
    for path in files(folder):
        places = payloads(path)
        with open(path, "r+b") as file:
            for (one, length), (other, _) in zip(places[::2], places[1::2], strict=False):
                file.seek(one)
                first = file.read(length)
                file.seek(other)
                second = file.read(length)
                file.seek(one)
                file.write(second)
                file.seek(other)
                file.write(first)


SPOILED = {"zeroed": zero, "truncated": truncate, "swapped": swap}
