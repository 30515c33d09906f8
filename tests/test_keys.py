"""Namespaces, key chains and masks from Python, against the formulas of the documentation."""

import array
import hashlib
import math
import struct

import numpy as np
import pytest

import kvortex
from blocks import keys_of

EMPTY = bytes(32)


def chain_model(namespace, tokens, block_tokens=16, extra=b"", block_extra=b""):
    """The keys as documented: SHA-256 over the key before and the tokens of the block, little-endian."""
    root = b"kvortex chain 1" + namespace + struct.pack("<I", block_tokens) + extra
    key, keys = hashlib.sha256(root).digest(), b""
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        block = struct.pack(f"<{block_tokens}I", *tokens[start : start + block_tokens])
        key = hashlib.sha256(key + block + block_extra).digest()
        keys += key
    return keys


def test_keys_are_the_documented_digests():
    namespace = kvortex.Namespace(model="m")
    tokens = [7, 2**32 - 1, 0, 5] * 33
    expected = chain_model(namespace.digest, tokens, 8, b"tenant")
    assert kvortex.hash_tokens(namespace, tokens, 8, b"tenant") == expected
    assert kvortex.hash_tokens(namespace.digest, tokens, block_tokens=8, extra=b"tenant") == expected


def test_equal_blocks_at_different_places_differ():
    keys = kvortex.hash_tokens(EMPTY, [7] * 32)
    assert keys[:32] != keys[32:]


@pytest.mark.parametrize("form", [list, tuple, lambda t: array.array("q", t), lambda t: array.array("I", t),
    *(lambda t, kind=kind: np.array(t, kind) for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")),
    lambda t: np.repeat(np.array(t), 3)[::3], lambda t: np.array(t[::-1])[::-1], lambda t: memoryview(bytes(t)),
    lambda t: [np.int64(i) for i in t]])  # fmt: skip
def test_every_form_of_tokens(form):
    tokens = [i % 100 for i in range(50)]
    assert kvortex.hash_tokens(EMPTY, form(tokens)) == chain_model(EMPTY, tokens)


def test_large_ids_in_wide_types():
    tokens = [2**32 - 1 - i for i in range(16)]
    expected = chain_model(EMPTY, tokens)
    for kind in ("u4", "i8", "u8"):
        assert kvortex.hash_tokens(EMPTY, np.array(tokens, kind)) == expected


def test_tokens_of_torch(torch):
    tokens = list(range(40))
    for kind in (torch.int64, torch.int32, torch.uint8):
        assert kvortex.hash_tokens(EMPTY, torch.tensor(tokens, dtype=kind)) == chain_model(EMPTY, tokens)
    assert kvortex.hash_tokens(EMPTY, torch.tensor([tokens, tokens]).T[:, 0]) == chain_model(EMPTY, tokens)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([1, -1], r"tokens\[1\] is -1: a token id is a whole number from 0 to 4294967295"),
        ([2**32], r"tokens\[0\] is 4294967296"),
        ([2**70], r"tokens\[0\] is 1180591620717411303424"),
        ([1, 2, 1.5], r"tokens\[2\] is 1.5"),
        (["a"], r"tokens\[0\] is 'a'"),
        ([None], r"tokens\[0\] is None"),
        (np.array([5, -7]), r"tokens\[1\] is -7"),
        (np.array([2**32]), r"tokens\[0\] is 4294967296"),
        (np.array([2**64 - 1], "u8"), r"tokens\[0\] is 18446744073709551615"),
        (np.zeros(16), "no integer type: pass ids as integers"),
        (np.zeros(16, bool), "no integer type"),
        (np.zeros(16, ">i4"), "no integer type"),
        (np.zeros(16, "c8"), "no integer type"),
        (np.zeros((2, 8), int), r"shape \[2, 8\]: pass the ids of one prompt"),
        (np.array(3), r"shape \[\]"),
        (3, "tokens is int, which has neither __dlpack__ nor the buffer protocol"),
        ("text", "tokens is str"),
        (None, "tokens is NoneType"),
        ({1: 2}, "tokens is dict"),
        (np.zeros(2**24 + 1, "u1"), "at most 16777216 tokens, but this one has 16777217: cut it"),
        ([0] * (2**24 + 1), "at most 16777216 tokens"),
    ],
)
def test_bad_tokens_are_named_and_change_nothing(tokens, said):
    chain = kvortex.KeyChain(EMPTY)
    chain.extend(range_list := list(range(20)))
    with pytest.raises(kvortex.InvalidArgumentError, match=said):
        chain.extend(tokens)
    assert (chain.num_tokens, chain.keys) == (20, chain_model(EMPTY, range_list))


def test_a_prompt_that_grows_too_long_is_refused():
    chain = kvortex.KeyChain(EMPTY, block_tokens=65536)
    chain.extend(np.zeros(2**24 - 1, "u1"))
    with pytest.raises(kvortex.InvalidArgumentError, match="would have 16777217"):
        chain.extend([1, 2])
    assert chain.num_tokens == 2**24 - 1
    assert len(chain.extend([1])) == 32


def test_the_way_tokens_arrive_changes_nothing():
    tokens = list(range(500))
    for step in (1, 15, 16, 17, 499):
        chain = kvortex.KeyChain(EMPTY)
        parts = [chain.extend(tokens[start : start + step]) for start in range(0, 500, step)]
        assert b"".join(parts) == chain.keys == chain_model(EMPTY, tokens)
        assert (len(chain), chain.num_tokens, chain.block_tokens) == (31, 500, 16)


def test_a_copy_goes_its_own_way():
    chain = kvortex.KeyChain(EMPTY, 4)
    chain.extend([1, 2, 3, 4, 5])
    copy = chain.copy()
    copy.extend([6, 7, 8])
    assert (len(chain), len(copy)) == (1, 2)
    assert copy.keys == chain.keys + chain.copy().extend([6, 7, 8])


def test_extra_of_a_block_is_in_its_key_and_those_after_it():
    plain, image = kvortex.KeyChain(EMPTY, 2), kvortex.KeyChain(EMPTY, 2)
    plain.extend([1, 2, 3, 4, 5, 6])
    image.extend([1, 2])
    image.extend([3, 4], b"digest")
    image.extend([5, 6])
    assert [plain.keys[i : i + 32] == image.keys[i : i + 32] for i in (0, 32, 64)] == [True, False, False]
    assert kvortex.KeyChain(EMPTY, 2).extend([1, 2], b"digest") == chain_model(EMPTY, [1, 2], 2, block_extra=b"digest")


@pytest.mark.parametrize("block_tokens", [0, -1, 2**16 + 1, 1.5, "16", 2**80])
def test_bad_block_sizes_are_named(block_tokens):
    with pytest.raises(kvortex.InvalidArgumentError, match="block_tokens"):
        kvortex.KeyChain(EMPTY, block_tokens)


@pytest.mark.parametrize("namespace", [b"short", bytes(33), "text", None, 3])
def test_bad_namespaces_are_named(namespace):
    with pytest.raises(kvortex.InvalidArgumentError, match=r"pass a kvortex.Namespace or its 32-byte digest"):
        kvortex.KeyChain(namespace)


def test_the_order_of_fields_does_not_matter():
    a, b = kvortex.Namespace(x=1, y="b"), kvortex.Namespace(y="b", x=1)
    assert a == b
    assert hash(a) == hash(b)
    assert a.digest.hex() == a.hex() == b.hex()
    assert len(a.digest) == 32
    assert a != kvortex.Namespace(x=1)
    assert a != a.digest


def test_values_of_different_types_differ():
    values = [None, False, 0, 0.0, -0.0, "", b"", "0", b"0", [], [None], [[]], ["a", "b"], ["ab"], True, 1, 1.0, "1"]
    digests = {kvortex.Namespace(x=value).digest for value in values}
    digests |= {kvortex.Namespace().digest, kvortex.Namespace(y=None).digest}
    assert len(digests) == len(values) + 2
    assert kvortex.Namespace(x=(1, "a")) == kvortex.Namespace(x=[1, "a"])
    assert kvortex.Namespace(x=math.nan) == kvortex.Namespace(x=math.nan)


def endless():
    inner = []
    inner.append(inner)
    return inner


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (2**63, "field does not fit 64 bits: pass it as text"),
        (-(2**63) - 1, "does not fit 64 bits"),
        (1j, "field is complex: a namespace takes None, bool, int, float, str, bytes"),
        ({"a": 1}, "field is dict"),
        ([1, {2}], "field is set"),
        (np.int64(1), "field is int64"),
        (object(), "field is object"),
        ("\ud800", "field is no Unicode"),
        (endless(), "more than 32 deep"),
    ],
)
def test_values_of_unknown_types_are_refused(value, said):
    with pytest.raises(kvortex.InvalidArgumentError, match=said):
        kvortex.Namespace(field=value)


def test_a_mask_is_a_sequence_and_a_number(engine):
    keys = keys_of(19)
    present = [i % 3 != 1 for i in range(19)]
    chosen = [key for key, is_there in zip(keys, present, strict=True) if is_there]
    engine.save_blocks(chosen, chosen)
    mask = engine.check_blocks(keys)
    assert list(mask) == [mask[i] for i in range(19)] == present
    assert mask[-1] is present[-1]
    assert int(mask) == sum(1 << i for i in range(19) if present[i])
    assert bytes(mask) == int(mask).to_bytes(3, "little")
    assert mask == engine.check_blocks(b"".join(keys))
    assert mask != engine.check_blocks(keys[:18])
    for index in (19, -20):
        with pytest.raises(IndexError, match=f"bit {index} of a mask of 19 bits"):
            mask[index]
