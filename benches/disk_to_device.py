"""A prefix of 8,192 tokens from the disk to the GPU, beside fio's time for the same bytes plus the link's.

python benches/disk_to_device.py [--folder DIR] [--device cuda] [--rounds 8]      # needs torch, and fio to compare with

The shape is Llama 3.1 8B's: 32 layers, blocks of 16 tokens, 2 MiB each, 1 GiB in all. Each round starts an engine on
what an earlier one kept, overwrites the pages with noise, loads, and compares every byte. The two take turns at going
first.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import kvortex

LAYERS, BLOCKS, TOKENS, DEPTH = 32, 512, 16, 32
PAGE = (2, TOKENS, 8, 128)
BLOCK_BYTES = LAYERS * 2 * TOKENS * 8 * 128 * 2
KEYS = [hashlib.sha256(f"block {number}".encode()).digest() for number in range(BLOCKS)]


def engine(folder, device):
    """An engine that has read all headers in the folder."""
    size = BLOCKS * BLOCK_BYTES
    made = kvortex.KVortexEngine.create(
        {},
        device=device,
        cpu_pool_size_bytes=2 * size,
        block_size_bytes=BLOCK_BYTES,
        namespace="bench",
        disk_paths=[str(folder)],
        disk_size_bytes=size * 3 // 2,
        disk_queue_bytes=size,
        disk_read_deadline_ms=60_000,
    )
    while made.get_stats()["disk"]["scanning"]:
        time.sleep(0.01)
    return made


def seconds(work, device):
    if device != "none":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "none":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fio(folder):
    """Seconds that fio takes to read the bytes in pieces of a block, and None without fio."""
    if shutil.which("fio") is None:
        return None
    told = subprocess.run(
        [
            "fio", "--name=rival", "--ioengine=io_uring", "--direct=1", "--rw=randread", "--output-format=json",
            f"--bs={BLOCK_BYTES}", f"--size={BLOCKS * BLOCK_BYTES}", f"--iodepth={DEPTH}",
            f"--filename={folder / 'fio'}",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(told.stdout)["jobs"][0]["read"]["runtime"] / 1e3


def link(device):
    """Seconds that one contiguous copy of the bytes takes, out of page-locked memory."""
    if device == "none":
        return 0.0
    host = torch.empty(BLOCKS * BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    return min(seconds(lambda: target.copy_(host, non_blocking=True), device) for _ in range(5))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk that is meant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "none")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), arguments.device, arguments.rounds)


class Prefix:
    """The prefix as it must be, and the pages of a cache that it is loaded into."""

    def __init__(self, folder, device):
        self.folder, self.device, place = folder, device, "cpu" if device == "none" else device
        shape = (BLOCKS, *PAGE)
        self.right = [torch.randint(-9, 9, shape, dtype=torch.int16, device=place) for _ in range(LAYERS)]
        self.pages = [torch.empty(shape, dtype=torch.int16, device=place) for _ in range(LAYERS)]
        self.stream = None if device == "none" else torch.cuda.current_stream()
        self.order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()

    def keep(self):
        """Save it, and wait until it is on the disk."""
        with engine(self.folder, self.device) as saving:
            saving.save_blocks(KEYS, kvortex.PagedCache(self.right).blocks(self.order), stream=self.stream)
            if not saving.flush(120_000):
                sys.exit("what was saved is not kept after two minutes")

    def bring_back(self):
        """Seconds to load it into pages of noise, by an engine that has nothing in memory."""
        blocks = kvortex.PagedCache(self.pages).blocks(self.order)
        for page in self.pages:
            page.random_()
        with engine(self.folder, self.device) as loading:
            taken = seconds(lambda: loading.load_blocks(KEYS, blocks, stream=self.stream), self.device)
            from_disk = loading.get_stats()["disk"]["hits"]
        if from_disk != BLOCKS:
            sys.exit(f"{from_disk} of {BLOCKS} blocks came from the disk")
        if not all(map(torch.equal, self.pages, self.right)):
            sys.exit("the bytes differ")
        return taken


def measure(folder, device, rounds):
    prefix, ours, rivals = Prefix(folder / "kept", device), [], []
    prefix.keep()
    fio(folder)  # makes its file
    turns = [lambda: rivals.append(fio(folder)), lambda: ours.append(prefix.bring_back())]
    for _ in range(rounds):
        for turn in turns:
            turn()
        turns.reverse()
    tell(device, ours, rivals, link(device))


def tell(device, ours, rivals, wire):
    size = BLOCKS * BLOCK_BYTES
    name = "memory of the host" if device == "none" else torch.cuda.get_device_name()
    print(f"{BLOCKS * TOKENS} tokens, {size >> 20} MiB from disk to {name}: every byte equal in {len(ours)} rounds")
    print(f"  kvortex        {told(ours)}   {size / statistics.median(ours) / 1e9:.2f} GB/s")
    if None in rivals:
        print(f"  link           {wire * 1e3:.0f} ms; fio is not installed")
        return
    print(f"  fio            {told(rivals)}   {size / statistics.median(rivals) / 1e9:.2f} GB/s")
    print(f"  link           {wire * 1e3:.0f} ms")
    shares = [one / (rival + wire) for one, rival in zip(ours, rivals, strict=True)]
    print(f"  of fio + link  {statistics.median(shares):.2f}   ({' '.join(f'{share:.2f}' for share in shares)})")


def told(times):
    return f"{statistics.median(times) * 1e3:.0f} ms   ({' '.join(f'{one * 1e3:.0f}' for one in times)})"


if __name__ == "__main__":
    main()
