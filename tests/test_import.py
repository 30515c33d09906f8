"""What `import kvortex` must not do. Each check runs in a fresh interpreter, where nothing else has been imported."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, os, sys
before = set(sys.modules)
import kvortex
with open("/proc/self/maps") as maps:
    mapped = sorted({line.split()[-1] for line in maps if "/" in line})
print(json.dumps({
    "modules": sorted(set(sys.modules) - before),
    "threads": len(os.listdir("/proc/self/task")),
    "mapped": mapped,
}))
"""


@pytest.fixture(scope="module")
def imported():
    done = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)


def test_pulls_in_neither_torch_nor_numpy_nor_other_heavy_modules(imported):
    heavy = {"torch", "numpy", "transformers", "dataclasses", "inspect", "asyncio", "tomllib", "difflib", "argparse"}
    assert heavy.isdisjoint(imported["modules"])


def test_imports_only_the_core_and_the_configuration_of_its_own(imported):
    own = {name for name in imported["modules"] if name.split(".")[0] == "kvortex"}
    assert own == {"kvortex", "kvortex._core", "kvortex.config"}


def test_starts_no_thread(imported):
    assert imported["threads"] == 1


def test_touches_no_cuda(imported):
    assert not [path for path in imported["mapped"] if "libcuda" in path or "libnv" in path]


def test_every_exported_name_is_there():
    import kvortex

    missing = [name for name in kvortex.__all__ if not hasattr(kvortex, name)]
    assert not missing
    assert len(kvortex.__all__) == len(set(kvortex.__all__))


def test_every_error_is_a_kvortex_error():
    import kvortex

    errors = [getattr(kvortex, name) for name in kvortex.__all__ if name.endswith("Error")]
    assert len(errors) > 10
    assert all(issubclass(error, kvortex.KVortexError) for error in errors)
    assert not issubclass(kvortex.KVortexError, (ValueError, RuntimeError, OSError))


def test_the_build_says_which_it_is():
    import kvortex

    assert kvortex.build_info()["version"] == kvortex.__version__
