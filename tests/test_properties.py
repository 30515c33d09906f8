"""Properties over any shape, stride, type, key and token, against models in numpy and plain Python."""

import array

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import kvortex
from blocks import block_of, keys_of
from test_keys import chain_model

relaxed = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
KINDS = ["i1", "u2", "<i4", ">i4", "f2", "f8", "c16", "?", "V3", "S5"]


@pytest.fixture(scope="module")
def room():
    """One pool of memory for all examples; each uses an engine bound to its own size."""

    def make(block_bytes):
        return kvortex.KVortexEngine.create({}, cpu_pool_size_bytes="1MiB", block_size_bytes=block_bytes)

    return make


@st.composite
def views(draw, shape, kind):
    """A writable array of this shape: any order of axes, any positive or negative steps, in a larger array."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in shape]
    pads = [draw(st.integers(0, 2)) for _ in shape]
    outer = [size * abs(step) + pad for size, step, pad in zip(shape, steps, pads, strict=True)]
    base = np.zeros([outer[axis] for axis in order], kind)
    view = base.transpose(np.argsort(order))
    cut = tuple(slice(None, size * step, step) if step > 0 else slice(size * -step - 1, None, step)
                for size, step in zip(shape, steps, strict=True))  # fmt: skip
    view = view[cut]
    assert view.shape == tuple(shape)
    return view


@st.composite
def transfers(draw):
    """Keys, a source and a target of the same bytes; the target may have another shape inside its blocks."""
    blocks = draw(st.integers(1, 6))
    kind = draw(st.sampled_from(KINDS))
    inner = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=5))
    source = draw(views((blocks, *inner), kind))
    target = draw(views((blocks, *draw(st.permutations(inner))), kind))
    seed = draw(st.integers(0, 2**32))
    keys = keys_of(blocks, seed)
    rows = np.stack([block_of(key, source.nbytes // blocks) for key in keys])
    if kind == "?":
        rows = rows & 1
    source[...] = np.frombuffer(rows.tobytes(), kind).reshape(source.shape)
    return keys, source, target


def as_arguments(draw, array_):
    """The same blocks as one tensor, as a list, or in two segments."""
    form = draw(st.sampled_from(["table", "list", "segments", "mixed"]))
    if form == "list":
        return list(array_) if array_.ndim > 1 else [array_[i : i + 1] for i in range(len(array_))]
    if form == "table" or array_.ndim == 1 or array_.shape[1] < 2:
        return array_
    first, second = array_[:, :1], array_[:, 1:]
    return kvortex.Segments([first, list(second) if form == "mixed" else second])


@relaxed
@given(data=st.data(), transfer=transfers())
def test_any_array_comes_back(room, data, transfer):
    keys, source, target = transfer
    with room(source.nbytes // len(keys)) as engine:
        report = engine.save_blocks(keys, as_arguments(data.draw, source))
        assert (report.blocks, report.bytes) == (len(keys), source.nbytes)
        assert engine.load_blocks(keys, as_arguments(data.draw, target)).mask.all()
        assert target.tobytes() == source.tobytes()
        assert [bytes(block) for block in engine.load_blocks(keys)] == [
            source[i : i + 1].tobytes() for i in range(len(keys))
        ]


@relaxed
@given(transfer=transfers())
def test_nothing_beside_the_target_is_written(room, transfer):
    keys, source, target = transfer
    source[...] = np.frombuffer(b"\1" * source.nbytes, source.dtype).reshape(source.shape)
    whole = target
    while whole.base is not None:
        whole = whole.base
    with room(source.nbytes // len(keys)) as engine:
        engine.save_blocks(keys, source)
        engine.load_blocks(keys, target)
    assert sum(whole.tobytes()) == source.nbytes


@relaxed
@given(
    shape=npst.array_shapes(min_dims=2, max_dims=3, max_side=4),
    strides=st.lists(st.integers(-6, 6), min_size=3, max_size=3),
)
def test_a_target_is_refused_exactly_when_it_overlaps(room, shape, strides):
    memory = np.zeros(200, np.uint8)
    steps = strides[: len(shape)]
    target = np.lib.stride_tricks.as_strided(memory[100:], shape, steps)
    places = [sum(i * step for i, step in zip(index, steps, strict=True)) for index in np.ndindex(*shape)]
    keys = keys_of(shape[0])
    with room(target[0].nbytes) as engine:
        engine.save_blocks(keys, np.ones(shape, np.uint8))
        if len(set(places)) == len(places):
            assert engine.load_blocks(keys, target).mask.all()
            assert memory.sum() == target.size
        else:
            with pytest.raises(kvortex.InvalidArgumentError, match="overlap"):
                engine.load_blocks(keys, target)
            assert not memory.any()


class Model:
    """What an engine of endless room would hold."""

    def __init__(self):
        self.held = {}

    def save(self, keys, version):
        for key in keys:
            self.held.setdefault(key, version)

    def mask(self, keys):
        return [key in self.held for key in keys]


KEYS = keys_of(12, "model")
runs = st.lists(st.sampled_from(KEYS), max_size=8)
steps = st.lists(
    st.tuples(st.sampled_from(["save", "load", "check", "match", "lease", "reset", "blocks"]), runs), max_size=30
)


@relaxed
@given(history=steps)
def test_an_engine_with_room_is_a_dictionary(room, history):
    model = Model()
    with room(64) as engine:
        for version, (what, keys) in enumerate(history):
            expected = model.mask(keys)
            prefix = next((i for i, found in enumerate(expected) if not found), len(keys))
            if what == "save":
                fresh = len({key for key in keys if key not in model.held})
                rows = np.full((len(keys), 64), version, np.uint8)
                report = engine.save_blocks(keys, rows)
                assert (report.blocks, report.present, report.refused) == (fresh, len(keys) - fresh, 0)
                model.save(keys, version)
            elif what == "load":
                out = np.full((len(keys), 64), 255, np.uint8)
                report = engine.load_blocks(b"".join(keys), out)
                assert list(report.mask) == expected
                assert report.missing == expected.count(False)
                assert [row[0] for row in out] == [model.held.get(key, 255) for key in keys]
                assert (out == out[:, :1]).all()
            elif what == "check":
                assert list(engine.check_blocks(keys)) == expected
            elif what == "match":
                assert engine.match_prefix(keys) == prefix
            elif what == "lease":
                assert len(engine.lease_prefix(keys)) == prefix
            elif what == "blocks":
                seen = [block and bytes(block)[0] for block in engine.load_blocks(keys)]
                assert seen == [model.held.get(key) for key in keys]
            else:
                assert engine.reset() == len(model.held)
                model.held.clear()
        stats = engine.get_stats()
        assert (stats["blocks"], stats["leased_blocks"]) == (len(model.held), 0)


@relaxed
@given(bits=st.lists(st.booleans(), max_size=200))
def test_a_mask_is_a_list_of_booleans(room, bits):
    keys = keys_of(len(bits), "bits")
    with room(32) as engine:
        chosen = [key for key, bit in zip(keys, bits, strict=True) if bit]
        engine.save_blocks(chosen, chosen)
        mask = engine.check_blocks(keys)
    assert list(mask) == bits
    assert mask.count() == sum(bits)
    assert mask.prefix() == (bits.index(False) if False in bits else len(bits))
    assert (mask.all(), mask.any()) == (all(bits), any(bits))
    assert int(mask) == sum(1 << i for i, bit in enumerate(bits) if bit)
    assert bytes(mask) == np.packbits(np.array(bits, bool), bitorder="little").tobytes()
    assert [mask[i - len(bits)] for i in range(len(bits))] == bits


@relaxed
@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=100),
    block_tokens=st.integers(1, 20),
    extra=st.binary(max_size=20),
    cuts=st.lists(st.integers(0, 100), max_size=5),
    form=st.sampled_from(
        [list, tuple, lambda t: array.array("q", t), lambda t: np.array(t, "u4"), lambda t: np.array(t, "i8")]
    ),
)
def test_keys_are_those_of_the_formula(tokens, block_tokens, extra, cuts, form):
    namespace = kvortex.Namespace(model="any")
    expected = chain_model(namespace.digest, tokens, block_tokens, extra)
    assert kvortex.hash_tokens(namespace, form(tokens), block_tokens, extra) == expected
    chain = kvortex.KeyChain(namespace, block_tokens, extra)
    ends = sorted(min(cut, len(tokens)) for cut in cuts)
    parts = [chain.extend(form(tokens[a:b])) for a, b in zip([0, *ends], [*ends, len(tokens)], strict=True)]
    assert b"".join(parts) == chain.keys == expected


fields = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


def tagged(value):
    """A value and its type: 1, 1.0 and True are equal to Python but not to a namespace."""
    return (list, tuple(tagged(item) for item in value)) if isinstance(value, list) else (type(value), repr(value))


@relaxed
@given(
    a=st.dictionaries(st.text(max_size=4), fields, max_size=4),
    b=st.dictionaries(st.text(max_size=4), fields, max_size=4),
)
def test_namespaces_are_equal_exactly_when_their_fields_are(a, b):
    same = {name: tagged(value) for name, value in a.items()} == {name: tagged(value) for name, value in b.items()}
    assert (kvortex.Namespace(**a) == kvortex.Namespace(**b)) == same
    assert kvortex.Namespace(**dict(reversed(a.items()))) == kvortex.Namespace(**a)


@settings(relaxed, max_examples=50)
@given(
    junk=st.none()
    | st.integers()
    | st.text()
    | st.binary()
    | st.lists(st.integers() | st.binary() | st.none())
    | fields
)
def test_junk_is_refused_by_a_typed_error_or_is_no_junk(room, junk):
    keys = keys_of(2)
    with room(32) as engine:
        engine.save_blocks(keys, keys)
        before = engine.get_stats()
        for call in (lambda: engine.check_blocks(junk), lambda: engine.save_blocks(keys, junk),
                     lambda: engine.load_blocks_async(keys, junk), lambda: kvortex.hash_tokens(bytes(32), junk),
                     lambda: engine.bind(junk), lambda: kvortex.Namespace(x=junk)):  # fmt: skip
            try:
                call()
            except kvortex.KVortexError as error:
                assert str(error)  # noqa: PT017
        after = engine.get_stats()
        assert (after["blocks"], after["failed"], before["blocks"]) == (2, 0, 2)
