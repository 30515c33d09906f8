"""The configuration says the same whichever way it comes in, and refuses what it does not know by name."""

import copy
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex import ConfigError, KVortexConfig
from kvortex.config import KNOBS, cgroup_limit, default_pool_size, parse_size, physical_memory

FULL = {
    "cpu_pool_size_bytes": 3 << 30,
    "block_size_bytes": 4096,
    "num_transfer_streams": 3,
    "eviction_watermark": 0.5,
    "eviction_ratio": 0.25,
    "huge_pages": False,
    "device": "cuda:3",
    "copy_method": "staged",
    "gpu_streams": 2,
    "staging_bytes": 1 << 24,
    "disk_paths": ("/var/cache/one", "/var/cache/two"),
    "disk_size_bytes": 1 << 33,
    "disk_admission": "second_touch",
    "disk_queue_bytes": 1 << 26,
    "disk_read_deadline_ms": 100,
    "numa_node": 0,
    "namespace": "rev 7",
}


def test_the_full_example_sets_every_knob_to_something_else_than_its_default():
    defaults = KVortexConfig().to_dict()
    assert FULL.keys() == KNOBS.keys() == defaults.keys()
    assert not [name for name in FULL if FULL[name] == defaults[name]]


def test_defaults_are_filled_in():
    config = KVortexConfig()
    assert config.cpu_pool_size_bytes == default_pool_size()
    assert 1 <= config.num_transfer_streams <= 4
    assert (config.eviction_watermark, config.eviction_ratio) == (0.8, 0.2)
    assert config.block_size_bytes is None
    assert KVortexConfig(cpu_pool_size_bytes=None) == config


def test_every_way_in_says_the_same(tmp_path, monkeypatch):
    text_of = {name: ":".join(value) if isinstance(value, tuple) else str(value) for name, value in FULL.items()}
    environ = {f"KVORTEX_{name.upper()}": text for name, text in text_of.items()}
    toml = "\n".join(f"{name} = {json.dumps(value)}" for name, value in FULL.items())
    (tmp_path / "table.toml").write_text("[other]\nx = 1\n[kvortex]\n" + toml)
    (tmp_path / "top.toml").write_text(toml)
    direct = KVortexConfig(**FULL)
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    assert direct.to_dict() == FULL
    assert KVortexConfig.from_dict(FULL) == direct
    assert KVortexConfig.from_env(environ) == KVortexConfig.from_env() == direct
    assert KVortexConfig.from_toml(tmp_path / "table.toml") == direct
    assert KVortexConfig.from_toml(str(tmp_path / "top.toml")) == direct
    assert KVortexConfig.of(direct) is direct
    assert KVortexConfig.of(FULL) == KVortexConfig.of() == KVortexConfig.of(None, namespace="rev 7") == direct


def test_overrides_win_over_each_source(monkeypatch):
    monkeypatch.setenv("KVORTEX_NAMESPACE", "from the environment")
    base = KVortexConfig.from_env()
    assert base.namespace == "from the environment"
    for source in (None, base, {"namespace": "from a mapping"}):
        assert KVortexConfig.of(source, namespace="mine").namespace == "mine"
    assert KVortexConfig.of({}).namespace == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 << 30),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("1.5 kib", 1536),
        (" 4096 ", 4096),
        ("7B", 7),
        ("2TB", 2 * 10**12),
        (1, 1),
    ],
)
def test_sizes(text, size):
    assert parse_size("k", text) == size


@pytest.mark.parametrize(
    "text", ["16G", "16 GiBs", "-1", "0", "0.0001KB", "", "GiB", "1e9", "1.2.3GB", "٣", "B1", True, 1.0, b"1", 1 << 63]
)
def test_sizes_that_say_nothing_clear_are_refused(text):
    with pytest.raises(ConfigError) as refused:
        parse_size("cpu_pool_size_bytes", text)
    assert str(refused.value).startswith(f"cpu_pool_size_bytes = {text!r}: give a positive number of bytes")


@given(
    st.integers(1, 10**6),
    st.sampled_from([("kib", 10), ("MiB", 20), ("GIB", 30), ("TiB", 40)]),
    st.sampled_from(["", " "]),
)
def test_a_whole_number_of_units_is_exact(count, unit, gap):
    assert parse_size("k", f"{count}{gap}{unit[0]}") == count << unit[1]


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_config_error(text):
    try:
        size, said = parse_size("k", text), ""
    except ConfigError as error:
        size, said = None, str(error)
    assert size is None or size > 0
    assert size is not None or repr(text) in said


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("cpu_pool_size_bytes", "lots", "GiB"),
        ("block_size_bytes", -1, "positive"),
        ("num_transfer_streams", 0, "from 1 to 256"),
        ("num_transfer_streams", 257, "from 1 to 256"),
        ("num_transfer_streams", 2.0, "whole number"),
        ("num_transfer_streams", True, "whole number"),
        ("eviction_watermark", 0, "above 0"),
        ("eviction_watermark", 1.01, "at most 1"),
        ("eviction_watermark", "nan", "such as 0.8"),
        ("eviction_watermark", [], "such as 0.8"),
        ("eviction_ratio", 1.1, "from 0 to 1"),
        ("eviction_ratio", -0.1, "from 0"),
        ("eviction_ratio", "a fifth", "such as 0.2"),
        ("huge_pages", "maybe", "true or false"),
        ("huge_pages", 2, "true or false"),
        ("device", "gpu", "cuda:N"),
        ("device", "cuda:x", "cuda:N"),
        ("copy_method", "memcpy", "auto, dma, kernel, staged"),
        ("gpu_streams", 0, "whole number from 1 to 4"),
        ("staging_bytes", "1KiB", "1MiB to 1GiB"),
        ("disk_paths", 3, "the path of a folder"),
        ("disk_paths", ["/a", "/a"], "each once"),
        ("disk_admission", "some", "second_touch"),
        ("disk_read_deadline_ms", 0, "1 to 600000"),
        ("numa_node", -1, "from 0"),
        ("namespace", 7, "text"),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_remedy(key, value, remedy):
    with pytest.raises(ConfigError) as refused:
        KVortexConfig.from_dict({key: value})
    assert str(refused.value).startswith(f"{key} = {value!r}: ")
    assert remedy in str(refused.value)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("cpu_pool_size", "cpu_pool_size_bytes"),
        ("eviction_watermrak", "eviction_watermark"),
        ("name_space", "namespace"),
        ("zzz", ""),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key, nearest):
    for make in (KVortexConfig, lambda **bad: KVortexConfig.of({}, **bad)):
        with pytest.raises(ConfigError, match=f"{key} = 1: no such setting; the nearest known one is {nearest}"):
            make(**{key: 1})
    with pytest.raises(ConfigError, match=f"KVORTEX_{nearest.upper()}"):
        KVortexConfig.from_env({f"KVORTEX_{key.upper()}": "1"})


def test_an_empty_variable_counts_as_unset_and_others_are_none_of_ours():
    assert KVortexConfig.from_env({"KVORTEX_NUMA_NODE": " ", "HOME": "/", "XKVORTEX_A": "1"}) == KVortexConfig()


def test_a_toml_file_that_cannot_serve_is_named(tmp_path):
    (tmp_path / "torn.toml").write_text("namespace = ")
    (tmp_path / "flat.toml").write_text("kvortex = 3")
    for name, why in (
        ("none.toml", "cannot be read: No such file"),
        ("torn.toml", "is not TOML"),
        ("flat.toml", "table"),
    ):
        with pytest.raises(ConfigError, match=why):
            KVortexConfig.from_toml(tmp_path / name)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match=r"config = 3: give a KVortexConfig, a mapping, or None"):
        KVortexConfig.of(3)


def test_a_config_does_not_change_and_can_be_copied_compared_and_sent():
    config = KVortexConfig(**FULL)
    for change in (
        lambda: setattr(config, "namespace", "x"),
        lambda: delattr(config, "namespace"),
        lambda: setattr(config, "new", 1),
    ):
        with pytest.raises(AttributeError, match="does not change"):
            change()
    twin = pickle.loads(pickle.dumps(config))
    assert twin == config == copy.deepcopy(config)
    assert {twin: 1}[config] == 1
    assert config != KVortexConfig()
    assert config != FULL
    assert eval(repr(config), {"KVortexConfig": KVortexConfig}) == config


def test_the_default_pool_respects_ram_and_the_tightest_control_group(tmp_path):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "a/b").mkdir(parents=True)
    (root / "memory/job").mkdir(parents=True)
    proc.write_text("0::/a/b\n")
    assert cgroup_limit(str(proc), str(root)) is None
    (root / "a/b/memory.max").write_text("max\n")
    (root / "a/memory.max").write_text("1000000\n")
    (root / "memory.max").write_text("2000000\n")
    assert cgroup_limit(str(proc), str(root)) == 1000000
    (root / "memory/job/memory.limit_in_bytes").write_text("4096\n")
    proc.write_text("7:cpu,memory:/job\n3:cpu:/elsewhere\n")
    assert cgroup_limit(str(proc), str(root)) == 4096
    (root / "memory/job/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroup_limit(str(proc), str(root)) is None
    assert cgroup_limit(str(tmp_path / "gone"), str(root)) is None
    assert 0 < default_pool_size() <= physical_memory() // 4


def test_the_default_pool_is_half_of_a_tight_limit(monkeypatch):
    monkeypatch.setattr("kvortex.config.cgroup_limit", lambda: 1 << 20)
    assert default_pool_size() == KVortexConfig().cpu_pool_size_bytes == 1 << 19
    monkeypatch.setattr("kvortex.config.cgroup_limit", lambda: 1 << 60)
    assert default_pool_size() == physical_memory() // 4


def test_there_are_few_knobs_and_the_guide_lists_each_as_it_is():
    assert len(KNOBS) < 25
    rows = [f"| `{name}` | {knob.unit} | {knob.default_text} | {knob.meaning} |" for name, knob in KNOBS.items()]
    guide = (Path(__file__).parent.parent / "docs/guide.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in guide
