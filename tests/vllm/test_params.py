"""``kv_transfer_params``: every value that a client can send, and what the good ones do."""

import logging

import harness
import pytest
from direct import Direct, whole_blocks
from harness import Options, make_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import PARAMS_CASES
from kvortex.vllm import params

OURS = ("kvortex_store", "kvortex_load", "kvortex_priority", "kvortex_ttl_s", "kvortex_report", "kvortex_loaded_tokens")
TOKENS = list(range(100, 180))


@pytest.fixture(scope="module")
def config(model_folder):
    logging.disable(logging.WARNING)
    return harness.vllm_config(model_folder, Options(0))


@pytest.fixture
def direct(config, model_folder):
    logging.disable(logging.WARNING)
    one = Direct(model_folder, config)
    with one.run.virtual():
        yield one


class Hostile:
    """Not what JSON brings, but what a caller in the process may pass."""

    def __getattribute__(self, name):
        raise RuntimeError("do not look at me")

    def __eq__(self, other):
        raise RuntimeError("do not compare me")

    def __hash__(self):
        return 1


class HostileDict(dict):
    """A dictionary that is none."""

    def __iter__(self):
        raise RuntimeError("do not go through me")

    keys = items = __iter__


numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2, 1e-9, 10**400, 1e300, 2**63, 31622400]))
plain = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from(["low", "normal", "high"]))
odd = st.one_of(st.binary(max_size=4), st.builds(Hostile), st.builds(object), st.builds(complex), st.just(Hostile))
values = st.one_of(
    plain,
    odd,
    st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)),
)
names = st.one_of(
    st.sampled_from(OURS),
    st.text(max_size=12),
    st.text(max_size=6).map(lambda end: "kvortex_" + end),
    st.sampled_from(["do_remote_prefill", "KVORTEX_STORE", 1, None, b"kvortex_store"]),
)
asked = st.one_of(
    st.dictionaries(names, values, max_size=6), values, st.builds(HostileDict), st.lists(st.tuples(names))
)


def is_good(name, value):
    """Whether a value can be used, in other words than the code's."""
    if name == "kvortex_priority":
        return type(value) in (str, int) and value in ("low", "normal", "high", -1, 0, 1)
    if name == "kvortex_ttl_s":
        return type(value) in (int, float) and 0 < value <= 366 * 86400
    return type(value) is bool


def check_read(given):
    wishes, ignored = params.read(given)
    assert type(wishes.store) is type(wishes.load) is type(wishes.report) is bool
    assert wishes.priority in (0, 1, 2)
    assert wishes.ttl_ms is None or 0 < wishes.ttl_ms <= 366 * 86400 * 1000
    if type(given) is not dict:
        assert (ignored.values, ignored.keys) == (0 if given is None else 1, 0)
        return ignored
    ours = {name: value for name, value in given.items() if type(name) is str and name.startswith("kvortex_")}
    ours.pop("kvortex_loaded_tokens", None)
    known = {name: value for name, value in ours.items() if name in OURS}
    assert ignored.keys == len(ours) - len(known)
    assert ignored.values == sum(not is_good(name, value) for name, value in known.items())
    if "kvortex_store" in known and ignored.values == 0:
        assert wishes.store is known["kvortex_store"]
    return ignored


@pytest.mark.timeout(3600)
def test_no_value_disturbs_the_scheduler(direct):
    logging.disable(logging.CRITICAL)
    counted = {"value": 0, "key": 0}
    number = 0

    @settings(max_examples=PARAMS_CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(asked, st.integers(0, 9))
    def serve(given, document):
        nonlocal number
        number += 1
        ignored = check_read(given)
        request = make_request(f"r{number}", [document, *TOKENS], 1)
        request.kv_transfer_params = given
        direct.pass_time(0.01)
        _, answered = direct.serve(request)
        assert answered is None or answered == {"kvortex_loaded_tokens": {"host": 0}}
        counted["value"] += ignored.values
        counted["key"] += ignored.keys

    serve()
    numbers = direct.scheduler.get_kv_connector_stats().data
    for reason, count in counted.items():
        assert numbers.get(f"kvortex_ignored_params|{reason}", 0) == count > 0
    assert not direct.side._tracked
    assert numbers["kvortex_transferred_blocks|host|store"] > 10


def served(direct, name, tokens=TOKENS, **asks):
    request = make_request(name, tokens, 1)
    request.kv_transfer_params = {f"kvortex_{key}": value for key, value in asks.items()} or None
    return direct.serve(request)


def test_what_is_not_to_be_stored_is_not(direct):
    assert served(direct, "a", store=False) == (0, None)
    assert served(direct, "b") == (0, None)
    assert served(direct, "c", store=False)[0] == 64


def test_what_is_not_to_be_loaded_is_computed_and_kept(direct):
    served(direct, "a", load=False)
    assert served(direct, "b", load=False, report=True) == (0, {"kvortex_loaded_tokens": {"host": 0}})
    assert served(direct, "c")[0] == 64


def test_a_prompt_whose_every_token_is_told_of_is_computed_and_kept(direct):
    """As for ``prompt_logprobs``: vLLM sets it then, and not every version minds what a connector offers."""
    request = make_request("a", TOKENS, 1)
    request.skip_reading_prefix_cache = True
    assert direct.serve(request) == (0, None)
    assert served(direct, "b")[0] == 64
    again = make_request("c", TOKENS, 1)
    again.skip_reading_prefix_cache = True
    assert direct.hit_tokens(again) == 0


def test_a_life_counts_from_when_blocks_were_stored_and_the_longer_one_holds(direct):
    served(direct, "a", ttl_s=2)
    direct.pass_time(1.9)
    assert served(direct, "b", store=False)[0] == 64
    direct.pass_time(0.4)
    assert served(direct, "c", ttl_s=10)[0] == 0, "two seconds are over"
    served(direct, "d", ttl_s=1)
    direct.pass_time(5)
    assert served(direct, "e", store=False)[0] == 64, "ten seconds hold, not one"
    assert served(direct, "f")[0] == 64
    direct.pass_time(1e6)
    assert served(direct, "g")[0] == 64, "now they are kept as long as there is room"


@pytest.mark.parametrize("low", ["low", -1])
@pytest.mark.parametrize("high", ["high", 1])
def test_the_lower_priority_goes_first(direct, low, high):
    planner = direct.side._planner
    slots = planner.counts()["capacity_blocks"]
    runs = {"high": [1, *TOKENS[:33]], "normal": [2, *TOKENS[:33]], "low": list(range(16 * (slots // 3) + 2))}
    asked = {"high": high, "normal": "normal", "low": low}
    for name, tokens in runs.items():
        served(direct, name, tokens, priority=asked[name])

    def fill(blocks):
        fill.first += 10_000
        served(direct, f"fill {fill.first}", range(fill.first, fill.first + 16 * blocks))

    fill.first = 0
    while not planner.counts()["evicted_blocks"]:
        fill(1)
    for name, tokens in runs.items():
        found = direct.hit_tokens(make_request(f"look for {name}", tokens, 1))
        assert (found == len(tokens) // 16 * 16) == (name != "low"), "the low ones went, though used last"
    for _ in range(10):
        fill(slots // 3)
    found = {name: direct.hit_tokens(make_request(f"look again for {name}", runs[name], 1)) for name in runs}
    assert found == {"high": 32, "normal": 0, "low": 0}


def test_a_request_is_told_where_its_tokens_came_from_only_if_it_asks(direct):
    assert served(direct, "a", report=True) == (0, {"kvortex_loaded_tokens": {"host": 0}})
    assert served(direct, "b")[1] is None
    # An answer's parameters may come back with the next request.
    request = make_request("c", TOKENS, 1)
    request.kv_transfer_params = {"kvortex_loaded_tokens": {"host": 64}}
    assert direct.serve(request) == (whole_blocks(request), None)
    assert "kvortex_ignored_params|key" not in direct.scheduler.get_kv_connector_stats().data
