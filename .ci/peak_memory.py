#!/usr/bin/env python3
"""Run a command and say what it took. Usage: peak_memory.py --limit-gb N COMMAND...; fails if its peak is above N."""

import argparse
import resource
import subprocess
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit-gb", type=float, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    start = time.monotonic()
    status = subprocess.run(arguments.command).returncode
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"{' '.join(arguments.command[:2])}: {time.monotonic() - start:.0f} s, peak {peak:.2f} GB", flush=True)
    if peak > arguments.limit_gb:
        print(f"peak memory is above {arguments.limit_gb} GB", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
