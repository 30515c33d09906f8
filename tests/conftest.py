"""What several test files need."""

import pytest

import kvortex


@pytest.fixture
def make_engine():
    """Makes engines that are shut down after the test."""
    engines = []

    def make(pool="8MiB", **knobs):
        engines.append(kvortex.KVortexEngine.create({}, cpu_pool_size_bytes=pool, **knobs))
        return engines[-1]

    yield make
    for engine in engines:
        assert engine.shutdown()


@pytest.fixture
def engine(make_engine):
    """An engine of 1000 blocks or so."""
    return make_engine()


@pytest.fixture(scope="session")
def torch():
    """PyTorch, where it is installed."""
    return pytest.importorskip("torch")
