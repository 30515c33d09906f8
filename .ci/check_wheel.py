"""The promises about the wheel: its size, tag, links and content; and the time that `import kvortex` takes.

Usage: check_wheel.py WHEEL
"""

import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

SIZE_LIMIT = 10_000_000
LINKED = re.compile(r"^(libc\.so\.6|libgcc_s\.so\.1|ld-linux-[a-z0-9-]+\.so\.\d)$")
CARRIED = {
    "kvortex/__init__.py",
    "kvortex/_core.abi3.so",
    "kvortex/_core.pyi",
    "kvortex/py.typed",
    "kvortex/demo_document.txt",
}
IMPORT_BUDGET_MS = 50


def linked(library: Path) -> list[str]:
    listing = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", listing)


def start_ms(python: Path, code: str) -> float:
    """The best of ten starts of an interpreter that runs `code`."""

    def once() -> float:
        start = time.perf_counter()
        subprocess.run([python, "-c", code], check=True)
        return (time.perf_counter() - start) * 1e3

    return min(once() for _ in range(10))


def import_times(wheel: Path, folder: Path) -> tuple[float, float]:
    """Milliseconds to start Python alone and with `import kvortex`, where nothing else is installed."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-index", wheel], check=True)
    return start_ms(python, "pass"), start_ms(python, "import kvortex")


def faults(wheel: Path, folder: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(folder)
    found = [f"it lacks {name}" for name in sorted(CARRIED - names)]
    if wheel.stat().st_size > SIZE_LIMIT:
        found.append(f"it has {wheel.stat().st_size} bytes, more than {SIZE_LIMIT}")
    if "-cp311-abi3-" not in wheel.name:
        found.append(f"its name {wheel.name} does not say cp311-abi3")
    if "kvortex/_core.abi3.so" in names:
        extra = [name for name in linked(folder / "kvortex/_core.abi3.so") if not LINKED.match(name)]
        found += [f"it links {name}" for name in extra]
    return found


def main() -> int:
    wheel = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        found = faults(wheel, Path(folder) / "content")
        bare, full = import_times(wheel, Path(folder) / "venv")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    print(
        f"import kvortex: {full - bare:.1f} ms beyond Python's own start of {bare:.1f} ms (aim: {IMPORT_BUDGET_MS} ms)"
    )
    for fault in found:
        print(f"wheel: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
