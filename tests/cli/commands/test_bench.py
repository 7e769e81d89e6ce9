"""`roundwise bench`: speeds, latencies, memory and kernels."""

from __future__ import annotations

import re
from pathlib import Path

from tests.cli.outputs import only_json
from tests.helpers import Commands, Ended


class TestBench:
    def test_json(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        found = only_json(
            commands.run(
                "bench", made[0], "--prompt-tokens", 8, "--generated-tokens", 4, "--repetitions", 2,
                "--batch-size", 2, "--dtype", "float32", "--threads", 1, "--json",
            )
        )  # fmt: skip
        assert found.keys() >= {
            "prompt_tokens_per_second", "generation_tokens_per_second", "latency_ms",
            "peak_rss_bytes", "kernels", "load_seconds", "threads", "dtype", "device",
        }  # fmt: skip
        assert found["latency_ms"].keys() == {"first_token", "mean", "p50", "p90", "p99"}
        assert found["dtype"] == "float32"
        assert sum(found["kernels"].values()) == 22

    def test_words_and_a_kernel_by_name(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        ended = commands.run(
            "bench", made[0], "--prompt-tokens", 4, "--generated-tokens", 3, "--repetitions", 1,
            "--kernel", "reference",
        )  # fmt: skip
        assert ended.code == 0
        assert re.search(r"^kernels +reference 21, torch 1$", ended.stdout, re.MULTILINE)
        assert re.search(r"^generation +\d+\.\d tokens/s  \(1 x 3\)$", ended.stdout, re.MULTILINE)

    def test_a_kernel_that_is_not_there(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        ended = commands.run("bench", made[0], "--kernel", "magic")
        assert ended.code == 2
        assert "there is no kernel 'magic'" in ended.sentence
