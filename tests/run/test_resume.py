"""A stopped run resumes, however it was stopped, and gives the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

import roundwise as rw
from roundwise import QuantizeConfig
from roundwise.checkpoint import sharding, writer
from roundwise.checkpoint.manifest import Fingerprint, GivenNames, SavedActivations
from roundwise.errors import CheckpointError, Interrupted, OutputError, RunError
from roundwise.model.blocks import Block
from roundwise.run import finalize, resume
from roundwise.run.journal import Journal, block_file, read_journal
from roundwise.run.resume import Checkpointer, WritePace
from roundwise.system.distributed import Ranks
from roundwise.verify import audit
from tests.conftest import BEST, QUICK
from tests.helpers import LLAMA, Commands, Stop, contents, journal_blocks, stop_after, windows
from tests.run.test_journal import record

KILLS = 20
#: Bytes of a shard that takes two of three blocks of `text_model`.
SHARDS_OF_THREE_BLOCKS = 50_000
#: Bytes of a shard that make four of the small Llama: one per block, then the tensors outside.
SHARD_BYTES = 35_000
#: Number of calls of `progress` for the layers and blocks of the small Llama.
EVENTS = 2 * (7 + 1)


def quantize(model: Path, out: Path, **changes: Any) -> rw.QuantizeResult:
    settings = {"config": QUICK, "calibration": windows(), "samples": 4, "seq_len": 32}
    return rw.quantize(model, out, **{**settings, **changes})


def finished_files(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the files that the journal names and the run still has, by path in `out`.

    Those are the shards, and the blocks that are in none.
    """
    found = read_journal(out)
    joined = {index for record in found.shards for index in record.shard.blocks}
    names = [f".roundwise/{block_file(b.block)}" for b in found.blocks if b.block not in joined]
    names += [record.shard.name for record in found.shards]
    states = {name: (out / name).stat() for name in names}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in states.items()}


def quantize_rest(model: Path, out: Path, **changes: Any) -> None:
    """Resumes; nothing that was finished is computed or written again."""
    before, blocks = finished_files(out), journal_blocks(out)
    steps: list[int] = []
    quantize(model, out, progress=lambda step: steps.append(step.block), **changes)
    assert blocks == [*range(len(blocks))]
    assert not {*steps} & {*blocks}
    shards = {name: state for name, state in before.items() if not name.startswith(".")}
    after = {name: (out / name).stat() for name in shards}
    assert {n: (state.st_ino, state.st_mtime_ns) for n, state in after.items()} == shards


def flip_last_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(llama, out)
    return out


@pytest.fixture(scope="module")
def best(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the default recipe, which runs the original model too."""
    out = tmp_path_factory.mktemp("best") / "out"
    quantize(llama, out, config=BEST)
    return out


@pytest.mark.sampled(3)
@pytest.mark.parametrize("count", range(1, EVENTS + 1))
def test_stopped_after_any_layer_or_block(
    count: int, llama: Path, best: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        quantize(llama, tmp_path / "out", config=BEST, progress=stop_after(count))
    assert not (tmp_path / "out" / "config.json").exists()
    steps: list[int] = []
    quantize(llama, tmp_path / "out", config=BEST, progress=lambda step: steps.append(step.block))
    finished = count // 8
    assert set(steps) == set(range(finished, 2))
    assert contents(tmp_path / "out") == contents(best)


def test_stopped_at_any_write(
    llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every file appears by one rename; the run is stopped right before and right after each of them.
    real = writer.os.replace
    stops = 0

    def stop_at(number: int, *, after: bool) -> Callable[..., None]:
        calls = iter(range(number + 1))

        def replace(*paths: Any) -> None:
            last = next(calls) == number
            if last and not after:
                raise Stop
            real(*paths)
            if last:
                raise Stop

        return replace

    for number in range(100):
        for after in (False, True):
            out = tmp_path / f"{number}-{after}"
            with monkeypatch.context() as patched:
                patched.setattr(writer.os, "replace", stop_at(number, after=after))
                try:
                    quantize(llama, out)
                    break
                except Stop:
                    stops += 1
            if (out / "config.json").exists():  # the last rename: only the cleanup was left
                assert after
                assert audit(out).failures == []
            quantize_rest(llama, out)
            assert contents(out) == contents(whole)
            shutil.rmtree(out)
        else:
            continue
        break
    assert stops > 2 * len(contents(whole)) - 4


@pytest.mark.sampled(5)
@pytest.mark.parametrize("mode", ["true_sequential", "block"])
@pytest.mark.parametrize("name", ["gemma3", "gpt2", "opt", "gpt_neox", "falcon", "bloom"])
def test_every_architecture_resumes_from_its_saved_activations(
    name: str, mode: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = folder_of(name)
    # Windows of several lengths: padded batches are saved and loaded too.
    rows = [row[:length] for row, length in zip(windows(), (32, 20, 32, 9), strict=True)]
    quantize(model, tmp_path / "whole", config=BEST, calibration=rows, batch_size=2, mode=mode)

    def after_first_block(step: Any) -> None:
        if step.layer is None:
            raise Stop

    with pytest.raises(Stop):
        quantize(
            model, tmp_path / "out", config=BEST, calibration=rows, batch_size=2, mode=mode,
            progress=after_first_block,
        )  # fmt: skip
    assert journal_blocks(tmp_path / "out") == [0]
    quantize(model, tmp_path / "out", config=BEST, calibration=rows, batch_size=2, mode=mode)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{}, {"format": "compressed-tensors", "sym": False}])
def test_rounding_to_nearest_resumes_too(
    changes: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    config = QUICK.merged({"method": "rtn", **changes})
    quantize(llama, tmp_path / "whole", config=config, calibration=None)
    with pytest.raises(Stop):
        quantize(
            llama, tmp_path / "out", config=config, calibration=None, progress=stop_after(9)
        )  # fmt: skip
    quantize(llama, tmp_path / "out", config=config, calibration=None)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def in_shards(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of an uninterrupted run in several shards."""
    out = tmp_path_factory.mktemp("in-shards") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharding, "SHARD_BYTES", SHARD_BYTES)
        quantize(llama, out)
    assert len([*out.glob("*.safetensors")]) == 4
    return out


class TestStoppedWhileShardsAreMade:
    """All blocks are finished: shards are made of them, and then the rest of the checkpoint."""

    @pytest.fixture
    def blocks_done(self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The output folder of a run that was stopped after its last block."""
        monkeypatch.setattr(sharding, "SHARD_BYTES", SHARD_BYTES)
        with pytest.raises(Stop):
            quantize(llama, tmp_path / "done", progress=stop_after(EVENTS))
        assert journal_blocks(tmp_path / "done") == [0, 1]
        return tmp_path / "done"

    @pytest.fixture
    def one_shard(self, blocks_done: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The output folder of a run that was stopped after its first shard."""

        def stop(*_: Any) -> None:
            raise Stop

        with monkeypatch.context() as patched:
            patched.setattr(Journal, "remove_joined", stop)
            with pytest.raises(Stop):
                quantize(llama, blocks_done)
        assert [each.shard.blocks for each in read_journal(blocks_done).shards] == [[0]]
        return blocks_done

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize(
        ("owner", "name", "after"),
        [
            (os, "replace", False), (os, "replace", True), (os, "fsync", True),
            (Path, "unlink", False), (Path, "unlink", True), (os, "rmdir", False),
        ],
    )  # fmt: skip
    def test_at_any_file_operation(
        self,
        owner: Any,
        name: str,
        after: bool,
        llama: Path,
        blocks_done: Path,
        in_shards: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        real, stops = getattr(owner, name), 0
        for number in range(100):
            out = Path(shutil.copytree(blocks_done, tmp_path / f"{number}"))
            calls = iter(range(100))

            def operation(*given: Any, **options: Any) -> Any:
                last = next(calls) == number  # noqa: B023
                if last and not after:
                    raise Stop
                result = real(*given, **options)
                if last:
                    raise Stop
                return result

            with monkeypatch.context() as patched:
                patched.setattr(owner, name, operation)
                try:
                    quantize(llama, out)
                    break
                except Stop:
                    stops += 1
            if (out / "config.json").exists():
                assert audit(out).failures == []
            quantize_rest(llama, out)
            assert contents(out) == contents(in_shards)
            shutil.rmtree(out)
        assert contents(out) == contents(in_shards)
        expected = {"replace": len(contents(in_shards)), "fsync": 20, "unlink": 2, "rmdir": 1}
        assert stops >= expected[name]

    def test_blocks_whose_shard_is_recorded_are_removed(
        self, one_shard: Path, llama: Path, in_shards: Path
    ) -> None:
        assert (one_shard / ".roundwise" / block_file(0)).exists()
        quantize_rest(llama, one_shard)
        assert contents(one_shard) == contents(in_shards)

    def test_a_shard_that_is_not_recorded_makes_room_first(
        self, blocks_done: Path, llama: Path, in_shards: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = "model-00001-of-00004.safetensors"
        shutil.copy(in_shards / name, blocks_done)  # whole, or not: nobody knows
        real, there = finalize.write_safetensors, []

        def write(path: Path, tensors: Any) -> str:
            there.append(path.exists())
            return real(path, tensors)

        monkeypatch.setattr(finalize, "write_safetensors", write)
        quantize(llama, blocks_done)
        assert there == [False] * 4
        assert contents(blocks_done) == contents(in_shards)

    @pytest.mark.parametrize("remove", [False, True])
    def test_a_shard_that_was_changed(self, remove: bool, one_shard: Path, llama: Path) -> None:
        shard = one_shard / "model-00001-of-00004.safetensors"
        shard.unlink() if remove else flip_last_bit(shard)
        with pytest.raises(RunError, match=r"model-00001-.* was changed or removed.*--restart"):
            quantize(llama, one_shard)

    @pytest.mark.parametrize("key", ["name", "blocks", "others", "twice", "early"])
    def test_a_line_that_does_not_match_the_blocks(
        self, key: str, one_shard: Path, llama: Path
    ) -> None:
        path = one_shard / ".roundwise" / "journal.jsonl"
        *lines, last = [json.loads(line) for line in path.read_text().splitlines()]
        changes = {"name": "model.safetensors", "blocks": [0, 1], "others": ["lm_head.weight"]}
        if key in changes:
            last["shard"][key] = changes[key]
        else:
            lines.insert(len(lines), last)
        if key == "early":
            lines = [lines[0], lines[-1]]  # before there are blocks
        path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, last]))
        with pytest.raises(OutputError, match=r"the journal in .* is damaged.*--restart"):
            quantize(llama, one_shard)

    def test_shards_of_another_size(
        self, one_shard: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sharding, "SHARD_BYTES", 10**9)
        with pytest.raises(OutputError, match=r"the journal in .* is damaged.*--restart"):
            quantize(llama, one_shard)

    def test_restart_starts_again(self, one_shard: Path, llama: Path, in_shards: Path) -> None:
        quantize(llama, one_shard, restart=True)
        assert contents(one_shard) == contents(in_shards)


@pytest.mark.slow
class TestKilled:
    """The command, on the trained model, killed with SIGKILL at random moments."""

    def test_the_same_bytes_and_no_block_is_computed_twice(
        self, commands: Commands, tiny: Path, text: Path, tmp_path: Path
    ) -> None:
        def command(out: Path) -> tuple[object, ...]:
            return (
                "quantize", tiny, out, "--calibration", text, "--group-size", 64,
                "--samples", 2, "--seq-len", 32, "--recipe", "textbook",
            )  # fmt: skip

        assert commands.run(*command(tmp_path / "whole")).code == 0
        begun = time.monotonic()
        assert commands.run(*command(tmp_path / "whole"), "--restart").code == 0
        duration = time.monotonic() - begun
        expected = contents(tmp_path / "whole")
        moments = random.Random(20)
        kills, folders, out = 0, 0, tmp_path / "out"
        seen: dict[str, tuple[int, int]] = {}
        finished = 0
        while kills < KILLS or out.exists():
            running = commands.start(*command(out))
            if kills < KILLS:
                time.sleep(moments.uniform(0, duration))
                ended = running.stop(signal.SIGKILL)
            else:
                ended = running.wait()
            assert ended.code in (0, -signal.SIGKILL), ended.stderr
            kills += ended.code == -signal.SIGKILL
            if ended.code:
                if not (out / "config.json").exists():
                    blocks = journal_blocks(out)
                    assert blocks == list(range(len(blocks)))  # each once
                    now = finished_files(out)
                    assert {n: s for n, s in now.items() if n in seen} == {
                        n: s for n, s in seen.items() if n in now
                    }  # none written again
                    assert len(blocks) >= finished
                    seen, finished = now, len(blocks)
                continue
            assert contents(out) == expected
            shutil.rmtree(out)
            folders, seen, finished = folders + 1, {}, 0
        assert kills == KILLS
        assert folders > 1


@pytest.mark.slow
def test_killed_at_each_file_operation(
    commands: Commands, text_model: Path, tmp_path: Path
) -> None:
    """The command with several shards, killed with SIGKILL right before each change on the disk."""

    def run(out: Path, **options: Any) -> int:
        command = ("quantize", text_model, out, "--method", "rtn", "--group-size", 32)
        return commands.run(*command, shard_bytes=SHARDS_OF_THREE_BLOCKS, **options).code

    assert run(tmp_path / "whole") == 0
    whole = contents(tmp_path / "whole")
    shards = sorted(name for name in whole if name.endswith(".safetensors"))
    tensors = [{*load_file(tmp_path / "whole" / name)} for name in shards]
    blocks = [{n.split(".")[2] for n in names if "layers" in n} for names in tensors]
    assert blocks[:3] == [{"0", "1"}, {"2"}, set()]
    out, shards_kept = tmp_path / "out", 0
    for number in range(1, 200):
        code = run(out, kill_at=(number, out))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if not (out / "config.json").exists():
            shards_kept = max(shards_kept, len(read_journal(out).shards))
        else:
            assert audit(out).failures == []
        assert run(out) == 0
        assert contents(out) == whole, number
        shutil.rmtree(out)
    assert number > 40
    assert shards_kept == len(shards)
    assert contents(out) == whole


class TestInterrupted:
    """Ctrl-C and SIGTERM end a run with everything that is finished kept."""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_run_can_be_resumed(
        self,
        number: signal.Signals,
        commands: Commands,
        tiny: Path,
        text: Path,
        tmp_path: Path,
    ) -> None:
        out = tmp_path / "out"
        command = (
            "quantize", tiny, out, "--calibration", text, "--group-size", 64,
            "--samples", 2, "--seq-len", 32, "--recipe", "textbook",
        )  # fmt: skip
        running = commands.start(*command)
        running.reach(lambda: bool(journal_blocks(out)))
        ended = running.stop(number)
        assert ended.code == 1
        assert re.search(r"\d of \d+ blocks are finished and kept", ended.sentence)
        assert str(out) in ended.sentence
        assert "run the same command again" in ended.stderr
        assert f"resume with: roundwise quantize {tiny} {out}" in ended.stderr
        assert not (out / "config.json").exists()
        kept = [float(sum(block.seconds.values())) for block in read_journal(out).blocks]
        assert kept
        assert commands.run(*command).code == 0
        timings = json.loads((out / "roundwise-run.json").read_text())
        assert timings["blocks"][: len(kept)] == kept  # of the first run

    def test_python_code_gets_its_own_error(self, llama: Path, tmp_path: Path) -> None:
        def press(step: Any) -> None:
            if step.layer is None:
                raise KeyboardInterrupt

        with pytest.raises(Interrupted, match="1 of 2 blocks are finished"):
            quantize(llama, tmp_path / "out", progress=press)


class TestRefused:
    """A run does not resume with different input."""

    @pytest.fixture
    def stopped(self, copy_of: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
        """A model and the output folder of a run that was stopped after the first block."""
        model, out = copy_of("llama"), tmp_path / "out"
        with pytest.raises(Stop):
            quantize(model, out, progress=stop_after(8))
        return model, out

    @pytest.mark.parametrize(
        ("changes", "differs"),
        [
            ({"config": QUICK.merged({"bits": 8})}, r"config.bits \(4 -> 8\)"),
            ({"config": QUICK.merged({"sym": False})}, r"config.sym \(True -> False\)"),
            (
                {"config": QuantizeConfig(**{**QUICK.model_dump(), "dynamic": {"k_proj": None}})},
                "dynamic",
            ),
            ({"calibration": windows(seed=1)}, "calibration.sha256"),
            ({"samples": 3}, r"calibration.samples \(4 -> 3\)"),
            ({"seed": 1}, r"calibration.seed \(0 -> 1\)"),
            ({"config": BEST}, r"config.recipe \(textbook -> best\)"),
            ({"mode": "block"}, r"mode \(true_sequential -> block\)"),
        ],
    )
    def test_other_settings(
        self, changes: dict[str, Any], differs: str, stopped: tuple[Path, Path]
    ) -> None:
        model, out = stopped
        before = contents(out)
        with pytest.raises(OutputError, match=f"differs in .*{differs}.*--restart"):
            quantize(model, out, **changes)
        assert contents(out) == before
        quantize(model, out)

    def test_overrides_in_another_order(self, llama: Path, tmp_path: Path) -> None:
        # The first pattern that matches wins, so their order is a setting.
        pairs: list[tuple[str, Any]] = [("k_proj", None), ("self_attn", {"bits": 8})]
        there, back = (
            rw.QuantizeConfig(group_size=32, dynamic=dict(order)) for order in (pairs, pairs[::-1])
        )
        with pytest.raises(Stop):
            quantize(llama, tmp_path / "out", config=there, progress=stop_after(7))
        with pytest.raises(OutputError, match=r"differs in config\.dynamic"):
            quantize(llama, tmp_path / "out", config=back)

    def test_another_model(self, stopped: tuple[Path, Path]) -> None:
        model, out = stopped
        flip_last_bit(model / "model.safetensors")
        with pytest.raises(OutputError, match=r"differs in model.files.model.safetensors"):
            quantize(model, out)

    def test_another_model_of_the_same_age(self, stopped: tuple[Path, Path]) -> None:
        model, out = stopped
        file = model / "model.safetensors"
        data, times = bytearray(file.read_bytes()), file.stat()
        data[-5] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(OutputError, match=r"differs in model.files.model.safetensors"):
            quantize(model, out)

    def test_a_newer_file_with_the_same_bytes_is_accepted(self, stopped: tuple[Path, Path]) -> None:
        model, out = stopped
        (model / "model.safetensors").touch()
        quantize(model, out)

    def test_a_model_that_changes_while_it_is_read(
        self, stopped: tuple[Path, Path], tmp_path: Path
    ) -> None:
        model, _ = stopped

        def change(step: Any) -> None:
            if step.layer is None and step.block == 1:
                (model / "model.safetensors").touch()

        with pytest.raises(CheckpointError, match="was changed while it was being read"):
            quantize(model, tmp_path / "new", progress=change)
        assert not (tmp_path / "new" / "config.json").exists()

    @pytest.mark.parametrize("change", ["flip", "cut", "remove"])
    def test_activations_that_were_changed(self, change: str, stopped: tuple[Path, Path]) -> None:
        model, out = stopped
        (file,) = (out / ".roundwise").glob("activations-*")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.unlink()
        if change != "remove":
            file.write_bytes(data if change == "flip" else data[:-1])
        with pytest.raises(RunError, match=r"activations-.* was changed or removed.*--restart"):
            quantize(model, out)

    def test_another_version(
        self, stopped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, out = stopped
        monkeypatch.setattr("roundwise.run.environment.__version__", "99")
        with pytest.raises(OutputError, match=r"differs in versions.roundwise \(.* -> 99\)"):
            quantize(model, out)

    def test_a_finished_block_that_was_changed(self, stopped: tuple[Path, Path]) -> None:
        model, out = stopped
        file = out / ".roundwise" / "block-00000.safetensors"
        flip_last_bit(file)
        with pytest.raises(RunError, match=r"block-00000.* was changed.*--restart"):
            quantize(model, out)

    def test_a_finished_block_that_is_missing(self, stopped: tuple[Path, Path]) -> None:
        model, out = stopped
        (out / ".roundwise" / "block-00000.safetensors").unlink()
        with pytest.raises(RunError, match=r"block-00000.*--restart"):
            quantize(model, out)

    def test_a_run_of_the_version_with_a_shard_per_block(self, stopped: tuple[Path, Path]) -> None:
        model, out = stopped
        path = out / ".roundwise" / "journal.jsonl"
        first, line = (json.loads(line) for line in path.read_text().splitlines())
        del first["version"]
        (block,) = line
        del block["nbytes"]
        shard = "model-00001-of-00003.safetensors"
        (out / ".roundwise" / "block-00000.safetensors").rename(out / shard)
        path.write_text(f"{json.dumps(first)}\n{json.dumps([{**block, 'shard': shard}])}\n")
        before = contents(out)
        with pytest.raises(OutputError, match=r"another version of roundwise: .*--restart"):
            quantize(model, out)
        assert contents(out) == before
        quantize(model, out, restart=True)
        assert not (out / shard).exists()
        assert audit(out).failures == []

    def test_a_damaged_journal(self, stopped: tuple[Path, Path]) -> None:
        model, out = stopped
        (out / ".roundwise" / "journal.jsonl").write_text("{]\n")
        with pytest.raises(OutputError, match=r"journal.jsonl is damaged.*--restart"):
            quantize(model, out)

    @pytest.mark.parametrize(
        "change",
        [
            {"activations": None},
            {"nbytes": -1},
            {"block": 1},
            {"name": "model.layers.7"},
            {"layers": [{"name": "model.layers.0.mlp.other"}]},
        ],
    )
    def test_a_journal_that_does_not_match_the_model(
        self, stopped: tuple[Path, Path], change: dict[str, Any]
    ) -> None:
        model, out = stopped
        path = out / ".roundwise" / "journal.jsonl"
        first, blocks = path.read_text().splitlines()
        (block,) = json.loads(blocks)
        if "layers" in change:
            change = {"layers": [block["layers"][0] | change["layers"][0]]}
        path.write_text(f"{first}\n{json.dumps([block | change])}\n")
        with pytest.raises(OutputError, match=r"journal.* is damaged.*--restart"):
            quantize(model, out)

    def test_restart_starts_again(self, stopped: tuple[Path, Path], tmp_path: Path) -> None:
        model, out = stopped
        config = QUICK.merged({"bits": 8})
        quantize(model, out, config=config, restart=True)
        quantize(model, tmp_path / "fresh", config=config)
        assert contents(out) == contents(tmp_path / "fresh")

    def test_an_incomplete_last_line_is_ignored(
        self, stopped: tuple[Path, Path], tmp_path: Path
    ) -> None:
        model, out = stopped
        with (out / ".roundwise" / "journal.jsonl").open("a") as journal:
            journal.write('[{"block": 1, "name": "mod')
        # Lines that are appended must be readable too: stop again after the next block.
        with pytest.raises(Stop):
            quantize(model, out, progress=stop_after(8))
        assert journal_blocks(out) == [0, 1]
        quantize(model, out)
        quantize(model, tmp_path / "fresh")
        assert contents(out) == contents(tmp_path / "fresh")

    def test_the_mode_of_the_first_run_is_kept_when_memory_has_changed(
        self, llama: Path, tmp_path: Path
    ) -> None:
        # The memory chose the mode, not the user: less free memory now is no reason to refuse.
        out = tmp_path / "out"
        with pytest.raises(Stop):
            quantize(llama, out, max_memory="100GB", progress=stop_after(8))
        quantize(llama, out, max_memory="1kB")
        quantize(llama, tmp_path / "fresh", mode="true_sequential")
        assert contents(out) == contents(tmp_path / "fresh")


class TestLock:
    """One process at a time works in a folder."""

    def test_a_second_run_is_refused(self, llama: Path, tmp_path: Path) -> None:
        refusals = []

        def second(_: Any) -> None:
            if not refusals:
                with pytest.raises(OutputError, match="another roundwise process is working in"):
                    quantize(llama, tmp_path / "out")
                refusals.append(True)

        quantize(llama, tmp_path / "out", progress=second)
        assert refusals

    def test_a_second_process_is_refused_even_with_restart(
        self, commands: Commands, text_model: Path, text: Path, tmp_path: Path
    ) -> None:
        command = (
            "quantize", text_model, tmp_path / "out", "--calibration", text, "--group-size", 32,
            "--samples", 2, "--seq-len", 32, "--recipe", "textbook",
        )  # fmt: skip
        ended = []

        def second(_: Any) -> None:
            if not ended:
                ended.extend([commands.run(*command), commands.run(*command, "--restart")])

        quantize(text_model, tmp_path / "out", progress=second)
        for each in ended:
            assert each.code == 2
            assert "another roundwise process is working in" in each.sentence

    def test_the_lock_is_released_with_its_process(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(Stop):
            quantize(llama, tmp_path / "out", progress=stop_after(1))
        quantize(llama, tmp_path / "out")


class TestFinished:
    """A folder that holds a finished checkpoint."""

    @pytest.fixture
    def done(self, llama: Path, tmp_path: Path) -> Path:
        quantize(llama, tmp_path / "out")
        return tmp_path / "out"

    def test_the_same_command_returns_its_result_without_work(
        self, llama: Path, done: Path
    ) -> None:
        before = contents(done)
        steps: list[Any] = []
        result = quantize(llama, done, progress=steps.append)
        assert not steps
        assert len(result.layers) == 14
        assert contents(done) == before

    def test_other_settings_are_refused(self, llama: Path, done: Path) -> None:
        before = contents(done)
        with pytest.raises(OutputError, match=r"finished checkpoint made with other .*--restart"):
            quantize(llama, done, config=QUICK.merged({"bits": 3}))
        assert contents(done) == before

    def test_a_changed_shard(self, llama: Path, done: Path) -> None:
        flip_last_bit(done / "model.safetensors")
        with pytest.raises(OutputError, match=r"model.safetensors was changed; --restart"):
            quantize(llama, done)
        quantize(llama, done, restart=True)
        assert audit(done).failures == []

    def test_other_weights_of_the_same_age(
        self, copy_of: Callable[[str], Path], tmp_path: Path
    ) -> None:
        model, out = copy_of("llama"), tmp_path / "out"
        quantize(model, out)
        file = model / "model.safetensors"
        data, times = bytearray(file.read_bytes()), file.stat()
        data[-5] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(OutputError, match=r"other settings \(model.files.model.safetensors"):
            quantize(model, out)

    def test_restart_replaces_it(self, llama: Path, done: Path) -> None:
        result = quantize(llama, done, config=QUICK.merged({"bits": 8}), restart=True)
        assert {layer["bits"] for layer in result.layers} == {8}

    def test_no_temporary_files_are_left(self, done: Path) -> None:
        assert not list(done.rglob("*.partial"))
        assert not list(done.rglob("*.draft"))
        assert not (done / ".roundwise").exists()

    def test_killed_between_the_last_rename_and_the_cleanup(self, llama: Path, done: Path) -> None:
        before = contents(done)
        (done / ".roundwise").mkdir()
        (done / ".roundwise" / "lock").touch()
        (done / ".roundwise" / "journal.jsonl").write_text("{}\n")
        quantize(llama, done)
        assert contents(done) == before


class TestCheckpointer:
    """Activations are saved, and blocks recorded, when a run can resume after them."""

    def test_a_finished_block_is_recorded(self, llama: Path, tmp_path: Path) -> None:
        def stop(step: rw.Progress) -> None:
            if step.layer is None:
                raise Stop

        config = rw.QuantizeConfig(recipe="textbook", group_size=32)
        with pytest.raises(Stop):
            rw.quantize(llama, tmp_path, config, windows(), progress=stop)
        lines = (tmp_path / ".roundwise" / "journal.jsonl").read_text().splitlines()
        assert [block["block"] for block in json.loads(lines[1])] == [0]

    def test_the_outputs_of_the_last_block_are_not_saved(self, llama: Path, tmp_path: Path) -> None:
        blocks, files = LLAMA["num_hidden_layers"], []

        def stop(step: rw.Progress) -> None:
            if step.layer is None:
                files.append(
                    sorted(p.name for p in (tmp_path / ".roundwise").glob("activations-*"))
                )

        config = rw.QuantizeConfig(recipe="textbook", group_size=32)
        rw.quantize(llama, tmp_path, config, windows(), progress=stop)
        names = [[f"activations-{index:05d}-0.safetensors"] for index in range(blocks - 1)]
        assert files == [*names, []]  # a run that is stopped now has finished all blocks

    def test_finished_blocks_are_recorded_together(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path)
        journal.start(Fingerprint(), GivenNames(model="m", calibration=None))
        blocks = [Block(f"layers.{index}", nn.Module(), {}) for index in range(4)]
        checkpointer = Checkpointer(tmp_path, blocks, [], journal, Ranks())
        saved = SavedActivations(files={"activations-00001-0.safetensors": "0"}, places=None)
        recorded = []
        for index, activations in enumerate([None, saved, None, None]):
            checkpointer.block_finished(record(index, activations), needs_activations=True)
            recorded.append(len(journal.path.read_text().splitlines()) - 1)
            read = [block.block for block in journal.read().blocks]
            assert read == ([], [0, 1], [0, 1], [0, 1, 2, 3])[index]
        assert recorded == [0, 1, 1, 2]  # after the last block nothing is needed to resume
        journal.close()


def test_saving_activations_takes_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 100.0, 0
    monkeypatch.setattr(resume.time, "monotonic", lambda: now)
    pace = WritePace()
    assert pace.due()
    for _ in range(1000):
        now += 1.0  # a block
        if pace.due():
            with pace.writing():
                now += 2.5
            written += 1
    assert written == pytest.approx(1000 / (19 * 2.5), rel=0.05)
    assert 2.5 * written / (now - 100) <= 0.05
