"""Beginnings and ends: fork, exit in the middle of a copy, a dying interpreter, signals, log records."""

import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest

import kvortex
from blocks import BLOCK, blocks_of, key_of, keys_of

EXIT_SECONDS = 15  # a hang, not a measure: starting Python and importing numpy takes most of it

PREAMBLE = """
import os, sys, threading, time
import numpy as np
import kvortex
from blocks import blocks_of, keys_of
keys = keys_of(16)
# Items of one byte each, far apart: a copy that takes long.
slow = np.zeros((16, 1 << 20, 3), np.uint8)[:, :, 1]
engine = kvortex.KVortexEngine.create({}, cpu_pool_size_bytes="64MiB", num_transfer_streams=2)
"""


def run_script(script, before=""):
    """Runs a script in a fresh interpreter; returns what it printed. Errors but our own warning fail."""
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error"}
    code = textwrap.dedent(before) + PREAMBLE + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=EXIT_SECONDS,
                          env=environ, check=False)  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if not line.startswith("shut down with copies in flight")]
    assert (done.returncode, errors) == (0, [])
    return done.stdout


def in_child(task):
    """Runs `task` in a forked child; returns its exit status and the seconds it took. 0 says that it returned."""
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 and later warn of threads
        child = os.fork()
    if child == 0:
        status = 70
        try:
            signal.alarm(10)
            task()
            status = 0
        except BaseException as error:  # noqa: BLE001
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start


def use_everything(engine, keys):
    """Every call of a child must say that it is one."""
    out = np.zeros((len(keys), BLOCK), np.uint8)
    for call in (
        lambda: engine.save_blocks(keys, out),
        lambda: engine.load_blocks(keys, out),
        lambda: engine.load_blocks(keys),
        lambda: engine.check_blocks(keys),
        lambda: engine.match_prefix(keys),
        lambda: engine.lease_prefix(keys),
        lambda: engine.save_blocks_async(keys, out),
        lambda: engine.load_blocks_async(keys, out),
        lambda: engine.bind(BLOCK),
        engine.reset,
    ):
        with pytest.raises(
            kvortex.ForkedProcessError, match=f"{os.getppid()}.*{os.getpid()}: create one after the fork"
        ):
            call()
    engine.get_stats()
    assert engine.shutdown()


def test_a_forked_child_is_told_so_and_the_parent_goes_on(engine):
    keys = keys_of(20)
    engine.save_blocks(keys, blocks_of(keys))
    lease, blocks = engine.lease_prefix(keys), engine.load_blocks(keys)
    status, seconds = in_child(lambda: use_everything(engine, keys))
    assert status == 0
    assert seconds < 2

    def drop_all():
        nonlocal engine, lease, blocks
        lease.release()
        del engine, lease, blocks
        gc.collect()

    assert in_child(drop_all)[0] == 0
    assert engine.get_stats()["leased_blocks"] == 20
    assert engine.check_blocks(keys).all()


def test_a_child_makes_an_engine_of_its_own(engine):
    keys = keys_of(20)
    engine.save_blocks(keys, blocks_of(keys))

    def task():
        with kvortex.KVortexEngine.create({}, cpu_pool_size_bytes="1MiB") as own:
            own.save_blocks(keys, blocks_of(keys))
            out = np.zeros((20, BLOCK), np.uint8)
            assert own.wait(own.load_blocks_async(keys, out)).mask.all()
            assert (out == blocks_of(keys)).all()

    assert in_child(task)[0] == 0


@pytest.mark.slow
def test_forks_in_the_middle_of_copies():
    """A lock that a copy thread held at the fork stays locked in the child for ever; so the child may take none."""
    printed = run_script("""
        import warnings
        warnings.simplefilter("ignore")  # 3.12 and later warn of threads
        def copy():
            out = np.zeros_like(slow)
            while not stop.is_set():
                engine.reset()
                engine.wait(engine.save_blocks_async(keys, slow))
                engine.load_blocks(keys, out)
        stop = threading.Event()
        threads = [threading.Thread(target=copy) for _ in range(2)]
        for thread in threads:
            thread.start()
        failures = 0
        for turn in range(30):
            ticket = engine.save_blocks_async(keys, slow)
            child = os.fork()
            if child == 0:
                try:
                    engine.check_blocks(keys)
                except kvortex.ForkedProcessError:
                    engine.get_stats()
                    engine.shutdown()
                    del ticket, engine
                    os._exit(0)
                os._exit(1)
            start = time.monotonic()
            while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < start + 2:
                time.sleep(0.001)
            if done[0] == 0:
                os.kill(child, 9)
                os.waitpid(child, 0)
            failures += done[1] != 0 or done[0] == 0
        stop.set()
        for thread in threads:
            thread.join()
        print(failures)
    """)
    assert printed == "0\n"


def test_a_child_that_exits_as_python_does():
    """The child runs the exit handlers of its parent, which must not wait for copies that are not its own."""
    printed = run_script("""
        import warnings
        warnings.simplefilter("ignore")
        ticket = engine.save_blocks_async(keys, slow)
        child = os.fork()
        if child == 0:
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), engine.wait(ticket).mask.all())
    """)
    assert printed == "7 True\n"


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)", "del engine", "del engine, ticket", "engine.shutdown()",
                                    "engine.shutdown(timeout_ms=0)", "engine.wait(ticket)"])  # fmt: skip
@pytest.mark.parametrize("copy", ["save_blocks_async(keys, slow)", "load_blocks_async(keys, slow)"])
def test_the_end_of_a_process_in_the_middle_of_a_copy(copy, ending):
    run_script(f"""
        engine.save_blocks(keys, slow)
        engine.reset() if "save" in {copy!r} else None
        ticket = engine.{copy}
        del slow
        {ending}
    """)


def test_copies_end_before_the_interpreter_does():
    """What was registered before the engine runs after it."""
    before = """
        import atexit
        atexit.register(lambda: print(engine.closed, ticket.done, engine.wait(ticket).blocks))
    """
    assert run_script("ticket = engine.save_blocks_async(keys, slow)", before) == "True True 16\n"


def test_the_end_of_an_interpreter_with_everything_alive():
    run_script("""
        engine.save_blocks(keys, slow)
        kept = [engine.load_blocks(keys), np.from_dlpack(engine.load_blocks(keys)[0]), engine.lease_prefix(keys)]
        kept.append(kvortex.PinnedHostPool(1 << 20).allocate(100))
        kept.append(memoryview(kept[-1]))
        kept.append(kept)
        sys.kept = kept
        sys.modules["builtins"].kept = engine
    """)


def test_threads_that_are_still_in_a_call_at_exit():
    run_script("""
        def work():
            try:
                while True:
                    engine.wait(engine.save_blocks_async(keys, slow))
                    engine.reset()
            except kvortex.ClosedError:
                pass
        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.2)
    """)


def test_a_dropped_engine_ends_its_copies():
    """Without a shutdown, without a wait: memory of the caller is not written after it was let go."""
    for _ in range(5):
        engine = kvortex.KVortexEngine.create({}, cpu_pool_size_bytes="4MiB")
        keys = keys_of(200)
        engine.save_blocks(keys, blocks_of(keys))
        out = np.zeros((200, BLOCK), np.uint8)
        ticket = engine.load_blocks_async(keys, out)
        del engine
        deadline = time.monotonic() + 10
        while not ticket.done and time.monotonic() < deadline:
            time.sleep(0.001)
        assert ticket.done
        assert (out == blocks_of(keys)).all()


def test_memory_is_given_back():
    """Engines that come and go leave nothing mapped."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for turn in range(12):
        with kvortex.KVortexEngine.create({}, cpu_pool_size_bytes="64MiB") as engine:
            engine.save_blocks([key_of(turn)], np.ones((1, BLOCK), np.uint8))
        if turn == 1:
            before = resident()
    assert resident() - before < 64 << 20


def test_ctrl_c_ends_a_wait(make_engine):
    engine = make_engine("128MiB", num_transfer_streams=1)
    slow = np.zeros((100, 1 << 20, 3), np.uint8)[:, :, 1]
    ticket = engine.save_blocks_async(keys_of(100), slow)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.wait(ticket)
        assert not ticket.done
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert engine.wait(ticket).mask.all()


def test_log_records_come_out_through_logging(caplog):
    caplog.set_level(logging.INFO, logger="kvortex")
    with kvortex.KVortexEngine.create({}, cpu_pool_size_bytes="1MiB") as engine:
        engine.bind(BLOCK)
        found = [record for record in caplog.records if "blocks of 5000 bytes" in record.getMessage()]
    assert [record.levelname for record in found] == ["INFO"]
    assert found[0].name.startswith("kvortex.")


def test_log_records_that_nobody_wants_are_not_made(caplog):
    caplog.set_level(logging.WARNING, logger="kvortex")
    with kvortex.KVortexEngine.create({}, cpu_pool_size_bytes="1MiB") as engine:
        engine.bind(BLOCK)
    assert caplog.records == []


def test_a_broken_handler_fails_no_call(caplog, monkeypatch):
    class Broken(logging.Filter):
        def filter(self, record):
            raise RuntimeError("no disk")

    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    logger = logging.getLogger("kvortex.engine")
    broken = Broken()
    logger.addFilter(broken)
    caplog.set_level(logging.INFO, logger="kvortex")
    try:
        with kvortex.KVortexEngine.create({}, cpu_pool_size_bytes="1MiB") as engine:
            engine.bind(BLOCK)
            assert engine.block_size_bytes == BLOCK
    finally:
        logger.removeFilter(broken)
    assert [str(one.exc_value) for one in unraisable] == ["no disk"]


def test_subinterpreters_are_refused_or_work():
    """Whatever the interpreter's rule is, it is an ImportError, not a crash."""
    run_script("""
        try:
            import _xxsubinterpreters as interpreters
        except ImportError:
            sys.exit(0)
        one = interpreters.create()
        try:
            interpreters.run_string(one, "import sys; sys.path = %r; import kvortex" % sys.path)
        except interpreters.RunFailedError as error:
            assert "ImportError" in str(error), error
    """)
