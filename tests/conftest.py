"""Fixtures: small models on disk, each built once, and their quantized checkpoints."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings

import roundwise as rw
from roundwise.system.hub import bundled_model
from tests.helpers import ARCHITECTURES, LLAMA, Commands, contents, random_model, windows
from tests.mixtures import MIXTURES

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# The same examples each time; `tests/fuzz` searches for new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

#: Settings of most tests: the quick recipe, and the default one.
QUICK = rw.QuantizeConfig(group_size=32, recipe="textbook")
BEST = rw.QuantizeConfig(group_size=32)


@pytest.hookimpl(tryfirst=True)  # before cases are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks all cases of a test but about every n-th as slow, if the test is marked `sampled(n)`."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None:
            test = item.nodeid.partition("[")[0]
            # Steps of the golden ratio: every n-th of a grid could have one value in common.
            if seen[test] * 0.6180339887 % 1 >= 1 / mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Random numbers of a test do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the small model of an architecture or mixture. Do not change it: see `copy_of`."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            config = {**ARCHITECTURES, **MIXTURES}[name].config()
            random_model(config).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture
def copy_of(folder_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the small model of an architecture, for a test that damages it."""
    return lambda name: Path(shutil.copytree(folder_of(name), tmp_path / name))


@pytest.fixture(scope="session")
def llama(folder_of: Callable[[str], Path]) -> Path:
    """Folder of the small Llama."""
    return folder_of("llama")


@pytest.fixture(scope="session")
def quantized(
    folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A small model quantized with some settings; each is made once. Do not change it."""
    made: dict[str, Path] = {}

    def quantize(name: str, **settings: Any) -> Path:
        key = repr((name, sorted(settings.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / name
            config = rw.QuantizeConfig(**{"group_size": 32, **settings})
            rw.quantize(folder_of(name), made[key], config, windows(), samples=4, seq_len=32)
        return made[key]

    return quantize


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the bundled model, trained and with a tokenizer. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    yield Path(shutil.copytree(bundled_model(), folder))
    # A file that one test leaves here would change what other tests see, or not, by their order.
    assert contents(folder) == contents(bundled_model())


@pytest.fixture(scope="session")
def text_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with the tokenizer of the bundled model, for commands: they start from text."""
    folder = tmp_path_factory.mktemp("text-model")
    config = transformers.LlamaConfig(**{**LLAMA, "vocab_size": 4096, "num_hidden_layers": 3})
    random_model(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of a few thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text(Path(shutil.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def commands(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs `roundwise` commands as processes."""
    running = Commands(tmp_path_factory.mktemp("commands"), tiny)
    yield running
    running.close()
