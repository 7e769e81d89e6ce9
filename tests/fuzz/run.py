"""Feeds the targets from a coverage-guided fuzzer: scripts/fuzz [SECONDS] [TARGET ...]

Each target runs in a process of its own for its share of the time. An exception that is no
`RoundwiseError` is written down once for each place it comes from, with its input; so is an input that
takes too long or too much memory. Findings and what the fuzzer learned are left under build/fuzz; an
input that was worth a fix goes to tests/fuzz/corpus. Exit code 1 if anything was found.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
WORK = Path("build/fuzz")
#: Seconds and bytes that one input may take: a bound on hanging and on allocation, not on speed.
SECONDS, MEMORY = 20, 3 << 30
#: Bytes of an input.
LENGTH = 8192


def main() -> None:
    """Runs all targets, or those named, one after another."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    WORK.mkdir(parents=True, exist_ok=True)
    targets = sys.argv[2:] or sorted(path.name for path in CORPUS.iterdir())
    print(f"{seconds:.0f} s for {', '.join(targets)}; findings go to {WORK}", flush=True)
    total: dict[str, tuple[int, int]] = {}
    for target in targets:
        runs, deaths = 0, 0
        end = time.monotonic() + seconds / len(targets)
        while (left := end - time.monotonic()) > 5:
            with tempfile.NamedTemporaryFile() as count:
                command = [
                    sys.executable,
                    "-m",
                    "tests.fuzz.run",
                    "--one",
                    target,
                    str(left),
                    count.name,
                ]
                with (WORK / f"{target}.log").open("ab") as log:
                    ended = subprocess.run(command, stdout=log, stderr=log, check=False)
                runs += int(Path(count.name).read_text() or 0)
            deaths += ended.returncode != 0
            if ended.returncode != 0 and deaths > 20:
                print(
                    f"{target}: its process died {deaths} times, see {WORK}/{target}.log",
                    flush=True,
                )
                break
        found = len(list(WORK.glob(f"finding-{target}-*"))) + deaths
        total[target] = (runs, found)
        print(f"{target:18} {runs:9,} executions, {found} findings", flush=True)
    print(f"{'all':18} {sum(runs for runs, _ in total.values()):9,} executions")
    sys.exit(any(found for _, found in total.values()))


def one(target: str, seconds: float, count: Path) -> None:
    """Fuzzes one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["roundwise"]):
        from tests.fuzz.targets import Targets
    from tests.fuzz.mutate import mutate

    scratch = Path(tempfile.mkdtemp(prefix="roundwise-fuzz-"))
    targets = Targets(scratch)
    learned = WORK / "corpus" / target
    learned.mkdir(parents=True, exist_ok=True)
    (learned / "seed").write_bytes(targets.seed(target))
    for file in (CORPUS / target).iterdir():
        shutil.copy(file, learned)
    runs, seen = 0, set[str]()
    bound_memory()

    def test(data: bytes) -> None:
        nonlocal runs
        runs += 1
        count.write_text(str(runs))
        try:
            targets.run(target, data)
        except (Exception, BaseExceptionGroup) as error:
            _write_down(target, data, error, seen)

    def mutated(data: bytes, limit: int, seed: int) -> bytes:
        return mutate(data, limit, seed, atheris.Mutate)

    options = [
        f"-max_total_time={int(seconds)}", f"-timeout={SECONDS}", f"-max_len={LENGTH}",
        f"-rss_limit_mb={MEMORY >> 20}", f"-artifact_prefix={WORK}/finding-{target}-",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(learned)], test, custom_mutator=mutated)
    atheris.Fuzz()


def bound_memory() -> None:
    """From here on an allocation beyond MEMORY fails instead of driving the machine into swap."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _write_down(target: str, data: bytes, error: BaseException, seen: set[str]) -> None:
    """Once for each kind of error and place in the package that it went through last."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/roundwise/" in f.filename] or frames
    place = f"{type(error).__name__}-{Path(ours[-1].filename).stem}-{ours[-1].lineno}"
    if place in seen:
        return
    seen.add(place)
    (WORK / f"finding-{target}-{place}").write_bytes(data)
    text = "".join(traceback.format_exception(error))
    (WORK / f"trace-{target}-{place}.txt").write_text(text)
    print(f"FINDING {target} {place}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], float(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
