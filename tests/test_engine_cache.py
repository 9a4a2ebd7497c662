"""A kept plan serves the same build again, and only that one, whoever altered, killed or crowded it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_trt.config import ModelConfig
from mistral_trt.contract import GraphContract, Ring
from mistral_trt.engines import build_key as key_module
from mistral_trt.engines import engine_cache
from mistral_trt.engines.build_key import BuildKey, build_key
from mistral_trt.engines.engine_cache import DEFAULT_LIMIT_BYTES, CachedPlan, EngineCache
from mistral_trt.errors import ArtifactError
from mistral_trt.manifest import FileEntry, Manifest, sha256_file

DETAILS = {"network_layers": {"ATTENTION_INPUT": 2}, "compiled": {"ring_copies": {"decode": 0}}}
MODEL = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=8,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
PARTS: dict[str, Any] = {"onnx": "a", "tensorrt": "1.7.0", "mistral_trt": "0.1.0", "build_version": 1}


def key(**parts: Any) -> BuildKey:
    return BuildKey({**PARTS, **parts})


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache", 3_000)


def keep(cache: EngineCache, build: BuildKey, content: bytes = b"plan", details: Any = DETAILS) -> Path:
    """Store a plan as a build does; returns the artifact's file."""
    plan = cache.folder.parent / f"built-{build.digest}.plan"
    plan.write_bytes(content)
    assert cache.store(build, plan, sha256_file(plan), details)
    return plan


def found(cache: EngineCache, build: BuildKey) -> bytes | None:
    """What `find` puts into an artifact, None for a miss."""
    target = cache.folder.parent / "target.plan"
    target.unlink(missing_ok=True)
    plan = cache.find(build, target)
    assert (plan is not None) == target.exists()
    return target.read_bytes() if plan else None


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the key --------------------------------------------------------------------------------------------


@pytest.fixture
def source() -> Manifest:
    contract = GraphContract(MODEL, "fp16", Ring(8, 4), 2, None)
    details = {"graph_sha256": "graph", "text_files": ["tokenizer.json"]}
    return Manifest("onnx", {}, {}, contract, {}, details)


def key_of(source: Manifest, data: str = "data", text: str = "text", **changes: Any) -> BuildKey:
    """data, text: hash of the weights' file and of the tokenizer."""
    files = {"model.onnx.data": FileEntry(data, 1), "tokenizer.json": FileEntry(text, 1)}
    facts = {"compute_capabilities": ["8.6"], "flavor": "tensorrt-rtx", "tensorrt": "1.7.1"}
    return build_key(replace(source, files=files), **{"weights": "embedded", **facts, **changes})


def test_a_plan_does_not_depend_on_the_tokenizer_nor_on_who_exported(source: Manifest) -> None:
    other = replace(source, versions={"python": "3.99"}, sources={"checkpoint": "another"})
    assert key_of(source) == key_of(source, text="another") == key_of(other)


def test_every_part_of_a_build_makes_another_key(source: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(**changes: Any) -> Manifest:
        return replace(source, contract=replace(source.contract, **changes))

    keys = [
        key_of(source),
        key_of(source, "another"),
        key_of(source, compute_capabilities=["8.9"]),
        key_of(source, compute_capabilities=["8.6", "8.9"]),
        key_of(source, flavor="tensorrt"),
        key_of(source, flavor="tensorrt", device="NVIDIA A10G"),
        key_of(source, tensorrt="1.7.2"),
        key_of(source, weights="external"),
        key_of(of(precision="bf16")),
        key_of(of(max_batch_size=4)),
        key_of(of(max_context=64)),
        key_of(of(ring=Ring(8, 2))),
        key_of(of(config=replace(MODEL, rope_theta=5e5))),
    ]
    monkeypatch.setattr(key_module, "BUILD_VERSION", 99)
    keys.append(key_of(source))
    monkeypatch.setattr(key_module, "__version__", "9.9")
    keys.append(key_of(source))
    digests = [build.digest for build in keys]
    assert len(set(digests)) == len(keys)
    assert all(len(digest) == 32 and int(digest, 16) for digest in digests)


def test_a_key_is_the_same_every_time_and_survives_json(source: Manifest) -> None:
    build = key_of(source)
    assert build == key_of(source)
    assert BuildKey(json.loads(json.dumps(dict(reversed(list(build.parts.items())))))).digest == build.digest


def test_a_plan_without_its_weights_is_every_fine_tunes(source: Manifest) -> None:
    assert key_of(source, "one", weights="external") == key_of(source, "another", weights="external")
    other = replace(source, details={**source.details, "graph_sha256": "another"})
    assert key_of(source, weights="external").digest != key_of(other, weights="external").digest
    assert key_of(source, "same") == key_of(other, "same"), "embedded: the files' hashes cover the graph"


# --- kept and found -------------------------------------------------------------------------------------


def test_a_kept_plan_comes_back_with_its_details(cache: EngineCache, tmp_path: Path) -> None:
    assert cache.find(key(), tmp_path / "target") is None
    built = keep(cache, key(), b"the plan")
    again = cache.find(key(), tmp_path / "target")
    assert again == CachedPlan(sha256_file(built), 8, DETAILS)
    assert (tmp_path / "target").read_bytes() == b"the plan"
    assert (tmp_path / "target").samefile(built), "one file on the disk, not three"
    assert found(cache, key(onnx="b")) is None


def test_the_users_cache_folder_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert EngineCache().folder == tmp_path / "mistral-trt" / "engines"
    assert EngineCache().limit_bytes == DEFAULT_LIMIT_BYTES == 20e9


def test_removing_the_artifact_leaves_the_kept_plan_and_the_other_way_round(cache: EngineCache) -> None:
    keep(cache, key()).unlink()
    assert found(cache, key()) == b"plan"
    built = keep(cache, key(onnx="b"))
    for path in cache.folder.glob("*/*"):
        path.unlink()
    assert built.read_bytes() == b"plan"


def test_where_no_link_can_be_made_it_is_copied(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cache, "link_file", lambda source, target: False)
    built = keep(cache, key())
    assert found(cache, key()) == b"plan"
    assert built.stat().st_nlink == 1


def test_a_plan_built_again_replaces_the_kept_one(cache: EngineCache) -> None:
    """TensorRT's plans differ in their bytes from build to build."""
    keep(cache, key(), b"first", {"n": 1})
    keep(cache, key(), b"second", {"n": 2})
    assert found(cache, key()) == b"second"
    assert names(cache.folder) == [".lock", key().digest]


# --- altered --------------------------------------------------------------------------------------------


def entry_of(cache: EngineCache, build: BuildKey) -> Path:
    return cache.folder / build.digest


def change_plan(entry: Path) -> None:
    (entry / "model.plan").write_bytes(b"plaN")


def cut_plan(entry: Path) -> None:
    (entry / "model.plan").write_bytes(b"pl")


def lose_plan(entry: Path) -> None:
    (entry / "model.plan").unlink()


def lose_entry(entry: Path) -> None:
    (entry / "entry.json").unlink()


def change_entry(entry: Path) -> None:
    content = json.loads((entry / "entry.json").read_text())
    content["details"]["compiled"] = {}
    (entry / "entry.json").write_text(json.dumps(content))


def change_hash(entry: Path) -> None:
    """The hash is that of the changed plan, but the entry's own no longer holds."""
    change_plan(entry)
    content = json.loads((entry / "entry.json").read_text())
    content["plan_sha256"] = sha256_file(entry / "model.plan")
    (entry / "entry.json").write_text(json.dumps(content))


def cut_entry(entry: Path) -> None:
    (entry / "entry.json").write_text('{"key": ')


def no_object(entry: Path) -> None:
    (entry / "entry.json").write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [change_plan, cut_plan, lose_plan, lose_entry, change_entry, change_hash, cut_entry, no_object],
)
def test_an_altered_entry_is_removed_and_said_aloud(
    cache: EngineCache, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    keep(cache, key())
    keep(cache, key(onnx="b"), b"other")
    damage(entry_of(cache, key()))
    assert found(cache, key()) is None
    assert not entry_of(cache, key()).exists()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("was altered after it was kept; it is removed and built again")
    assert found(cache, key(onnx="b")) == b"other"
    keep(cache, key())
    assert found(cache, key()) == b"plan"


def test_an_artifact_altered_in_place_alters_the_kept_plan_which_is_noticed(
    cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    with keep(cache, key()).open("r+b") as shared:
        shared.write(b"evil")
    assert found(cache, key()) is None
    assert "was altered after it was kept" in caplog.text


def test_the_entry_of_another_key_is_not_taken_for_this_one(cache: EngineCache) -> None:
    keep(cache, key(onnx="b"))
    entry_of(cache, key(onnx="b")).rename(entry_of(cache, key()))
    assert found(cache, key()) is None


# --- why it is built again ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([], None),
        ([{}], None),
        ([{"tensorrt": "1.6.0"}], "tensorrt 1.6.0 → 1.7.0"),
        ([{"mistral_trt": "0.0.9"}], "mistral-trt 0.0.9 → 0.1.0"),
        ([{"build_version": 0}], "build version 0 → 1"),
        (
            [{"tensorrt": "1.6.0", "mistral_trt": "0.0.9"}],
            "tensorrt 1.6.0 → 1.7.0, mistral-trt 0.0.9 → 0.1.0",
        ),
        ([{"tensorrt": "1.6.0"}, {"tensorrt": "1.5.0", "build_version": 0}], "tensorrt 1.6.0 → 1.7.0"),
        ([{"tensorrt": "1.6.0"}, {"tensorrt": "1.5.0"}], "tensorrt 1.5.0 → 1.7.0"),
        ([{"onnx": "b"}], None),
        ([{"onnx": "b", "tensorrt": "1.6.0"}], None),
        ([{"another part": 1, "tensorrt": "1.6.0"}], None),
    ],
)
def test_a_miss_names_the_versions_that_changed(
    cache: EngineCache, kept: list[dict[str, Any]], words: str | None
) -> None:
    for index, parts in enumerate(kept):
        keep(cache, key(**parts))
        os.utime(entry_of(cache, key(**parts)), (index, index))
    assert cache.explain_miss(key()) == words


def test_a_damaged_entry_explains_nothing(cache: EngineCache) -> None:
    keep(cache, key(tensorrt="1.6.0"))
    cut_entry(entry_of(cache, key(tensorrt="1.6.0")))
    assert cache.explain_miss(key()) is None


# --- how much is kept -----------------------------------------------------------------------------------


def aged(cache: EngineCache, *builds: BuildKey) -> None:
    """As if they had been used in this order, long ago."""
    for second, build in enumerate(builds):
        os.utime(entry_of(cache, build), (second, second))


def test_the_least_recently_used_leave_first(cache: EngineCache) -> None:
    first, second, third = (key(onnx=name) for name in "abc")
    for build in (first, second):
        keep(cache, build, bytes(1_000))
    aged(cache, first, second)
    assert found(cache, first) == bytes(1_000), "used now, so the second is the oldest"
    keep(cache, third, bytes(1_000))
    assert found(cache, second) is None
    assert found(cache, first) and found(cache, third)


def test_as_many_leave_as_it_takes_and_the_new_one_stays(cache: EngineCache) -> None:
    builds = [key(onnx=name) for name in "abc"]
    for build in builds:
        keep(cache, build, bytes(400))
    aged(cache, *builds)
    keep(cache, key(onnx="large"), bytes(2_900))
    assert names(cache.folder) == [".lock", key(onnx="large").digest]


def test_a_plan_over_the_limit_is_not_kept_and_pushes_nothing_out(
    cache: EngineCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mistral_trt")
    keep(cache, key())
    (tmp_path / "large.plan").write_bytes(bytes(3_001))
    assert not cache.store(key(onnx="b"), tmp_path / "large.plan", "hash", DETAILS)
    assert "is not kept for the next build: it has 0.00 GB and the cache's limit" in caplog.text
    assert "raise it with --cache-gb" in caplog.text
    assert found(cache, key()) == b"plan"


def test_a_hit_under_a_smaller_limit_makes_room_too(cache: EngineCache) -> None:
    builds = [key(onnx=name) for name in "abc"]
    large = replace(cache, limit_bytes=100_000)
    for build in builds:
        keep(large, build, bytes(10_000))
    aged(cache, *builds)
    smaller = replace(cache, limit_bytes=25_000)
    assert found(smaller, builds[0]) == bytes(10_000), "the oldest, until it is used"
    kept = sorted(build.digest for build in (builds[0], builds[2]))
    assert names(cache.folder) == [".lock", *kept]
    assert found(smaller, builds[1]) is None


def test_a_plan_that_is_over_the_limit_itself_is_used_once_more_and_leaves(cache: EngineCache) -> None:
    built = keep(cache, key(), bytes(900))
    assert found(replace(cache, limit_bytes=0), key()) == bytes(900)
    assert names(cache.folder) == [".lock"]
    assert built.read_bytes() == bytes(900), "the artifact's own file stays"


def test_a_hit_within_the_limit_removes_nothing(cache: EngineCache) -> None:
    builds = [key(onnx=name) for name in "ab"]
    for build in builds:
        keep(cache, build)
    assert found(cache, builds[0]) == b"plan"
    assert names(cache.folder) == [".lock", *sorted(build.digest for build in builds)]


def test_a_cache_that_cannot_be_trimmed_still_serves(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mistral_trt")
    for name in "ab":
        keep(cache, key(onnx=name), bytes(900))

    def refuse(entry: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(engine_cache, "_remove", refuse)
    assert found(replace(cache, limit_bytes=1_000), key(onnx="a")) == bytes(900)
    assert f"the plans in {cache.folder} take more than they may: " in caplog.text


# --- what gets in the way -------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    cache: EngineCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mistral_trt")
    cache.folder.write_text("in the way")
    (tmp_path / "plan").write_bytes(b"plan")
    assert not cache.store(key(), tmp_path / "plan", "hash", DETAILS)
    assert "the plan is not kept for the next build: " in caplog.text
    assert cache.find(key(), tmp_path / "target") is None
    assert cache.explain_miss(key()) is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ArtifactError("no room")])
def test_a_copy_that_fails_leaves_nothing(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    keep(cache, key())
    monkeypatch.setattr(engine_cache, "link_file", lambda source, target: False)

    def half(source: Path, target: Path) -> None:
        target.write_bytes(b"pl")
        raise error

    monkeypatch.setattr("shutil.copyfile", half)
    assert cache.find(key(), tmp_path / "target") is None
    assert not (tmp_path / "target").exists()
    assert not cache.store(key(onnx="b"), tmp_path / f"built-{key().digest}.plan", "hash", DETAILS)
    assert names(cache.folder) == [".lock", key().digest]


def test_a_disk_without_room_for_a_copy_is_not_filled(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mistral_trt")
    (tmp_path / "plan").write_bytes(b"plan")
    monkeypatch.setattr(engine_cache, "link_file", lambda source, target: False)
    monkeypatch.setattr("mistral_trt.artifact.free_disk_bytes", lambda out: 3)
    assert not cache.store(key(), tmp_path / "plan", "hash", DETAILS)
    assert "a copy of the plan does not fit there" in caplog.text


def test_a_file_that_is_there_already_is_left_alone(cache: EngineCache, tmp_path: Path) -> None:
    keep(cache, key())
    (tmp_path / "target").write_text("mine")
    assert cache.find(key(), tmp_path / "target") is None
    assert (tmp_path / "target").read_text() == "mine"


def test_an_interrupt_is_not_swallowed(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(cache, key())

    def interrupted(source: Path, target: Path) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_cache, "link_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.find(key(), tmp_path / "target")
    with pytest.raises(KeyboardInterrupt):
        cache.store(key(onnx="b"), tmp_path / f"built-{key().digest}.plan", "hash", DETAILS)
    assert names(cache.folder) == [".lock", key().digest]


# --- several processes ----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from mistral_trt.engines import engine_cache
from mistral_trt.engines.build_key import BuildKey
engine_cache.write_file = lambda path, data: os.kill(os.getpid(), signal.SIGKILL)
plan = Path(sys.argv[2])
engine_cache.EngineCache(Path(sys.argv[1]), 3000).store(BuildKey({"onnx": "killed"}), plan, "hash", {})
"""


def test_a_killed_run_leaves_no_entry_and_the_next_clears_up(cache: EngineCache, tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(b"half")
    command = [sys.executable, "-c", KILLED, str(cache.folder), str(tmp_path / "plan")]
    assert subprocess.run(command, stdin=subprocess.DEVNULL).returncode == -signal.SIGKILL
    digest = BuildKey({"onnx": "killed"}).digest
    assert any(name.startswith(f".{digest}.partial-") for name in names(cache.folder))
    assert found(cache, BuildKey({"onnx": "killed"})) is None
    keep(cache, key())
    assert names(cache.folder) == [".lock", key().digest]


def test_what_another_run_is_writing_is_neither_cleared_up_nor_counted(cache: EngineCache) -> None:
    with cache._partial(key(onnx="b").digest) as partial:
        (partial / "model.plan").write_bytes(bytes(5_000))
        (partial / "entry.json").write_text("{}")
        keep(cache, key())
        assert names(partial) == ["entry.json", "model.plan"]
    assert found(cache, key()) == b"plan"
    assert names(cache.folder) == [".lock", key().digest]


def work(folder: Path, seed: int) -> None:
    """Store and find a few plans over and over, under a limit that holds two of them."""
    cache, mine = EngineCache(folder / "cache", 3_500), folder / str(seed)
    mine.mkdir()
    for turn in range(25):
        name = "abcd"[(turn + seed) % 4]
        target = mine / f"{turn}.plan"
        content = name.encode() * 1_000
        plan = cache.find(key(onnx=name), target)
        if plan is None:
            target.write_bytes(content)
            assert cache.store(key(onnx=name), target, sha256_file(target), {"name": name})
        else:
            assert plan.details == {"name": name}
        assert target.read_bytes() == content


def test_several_processes_never_see_each_others_halves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(tmp_path, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4, capfd.readouterr().err
    kept = [name for name in names(tmp_path / "cache") if name != ".lock"]
    assert 1 <= len(kept) <= 2 and not any(name.startswith(".") for name in kept)
