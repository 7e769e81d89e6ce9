"""Every way in which llama.cpp's converter makes tensors is found, and nothing that is not proven."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from roundwise.checkpoint.reader import read_header
from roundwise.gguf.origins import HEAD, find_origins

IN = 64


@pytest.fixture
def originals(tmp_path: Path):
    """Writes tensors in bfloat16 and returns where they are."""

    def write(**tensors: torch.Tensor):
        file = tmp_path / "model.safetensors"
        stored = {
            name.replace("__", "."): tensor.to(torch.bfloat16).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(stored, file)
        return stored, read_header(file)

    return write


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().half()


def assert_makes(origin, tensors, target):
    made = origin.assemble(lambda name: half(origin.read(tensors[name])))
    assert torch.equal(made, target.reshape(made.shape))


def test_every_way(originals):
    values, infos = originals(
        model__0__q__weight=torch.randn(32, IN), model__0__fused__weight=torch.randn(96, IN),
        model__0__conv__weight=torch.randn(IN, 96), model__0__o__weight=torch.randn(32, 96),
        experts__0__weight=torch.randn(16, IN), experts__1__weight=torch.randn(16, IN),
        stacked__weight=torch.randn(3, 48, IN), other__weight=torch.randn(8, 8),
        turned__weight=torch.randn(2, 40, 24),
    )  # fmt: skip
    heads = torch.arange(32).reshape(4, 2, 4).swapaxes(1, 2).reshape(-1)
    columns = torch.arange(96).reshape(3, 32).flip(0).reshape(-1)
    get = {name: half(tensor) for name, tensor in values.items()}
    experts = torch.stack([get["experts.0.weight"], get["experts.1.weight"]])
    targets = {
        "same": get["other.weight"],
        "rows permuted": get["model.0.q.weight"][heads],
        "part": get["model.0.fused.weight"][32:64],
        "every other row": get["stacked.weight"][:, ::2],
        "joined": experts,
        "transposed": get["model.0.conv.weight"].T,
        "all transposed": get["turned.weight"].transpose(1, 2),
        "columns permuted": get["model.0.o.weight"][:, columns],
        "unknown": get["other.weight"] * 2,
    }
    origins = find_origins(targets, infos)
    kinds = {name: origin.kind() for name, origin in origins.items()}
    assert kinds == {
        "same": "the same rows", "rows permuted": "rows permuted", "part": "the same rows",
        "every other row": "rows permuted", "joined": "joined", "transposed": "transposed",
        "all transposed": "transposed", "columns permuted": "columns permuted",
    }  # fmt: skip
    for name, origin in origins.items():
        assert_makes(origin, values, targets[name])
    assert torch.equal(origins["rows permuted"].row, heads)
    assert torch.equal(origins["columns permuted"].columns, columns)


def test_vectors(originals):
    values, infos = originals(norm__weight=torch.randn(64), bias=torch.randn(32))
    norm = values["norm.weight"].float() + 1
    heads = torch.arange(32).reshape(4, 2, 4).swapaxes(1, 2).reshape(-1)
    targets = {"norm": norm, "bias": values["bias"].float()[heads], "other": norm + 1}
    origins = find_origins(targets, infos)
    assert {name: origin.kind() for name, origin in origins.items()} == {
        "norm": "plus 1", "bias": "columns permuted",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_compared_after_the_rounding_of_the_file(dtype, originals):
    W = torch.randn(8, IN) * 1e-6  # some are too small for float16
    values, infos = originals(w=W)
    target = values["w"].float().to(dtype)
    assert [*find_origins({"w": target}, infos)] == ["w"]
    target[3, 5] *= 1.5
    assert find_origins({"w": target}, infos) == {}


def test_layers_with_equal_values_are_told_apart_by_their_number(originals):
    W = torch.randn(16, IN)
    values, infos = originals(
        model__layers__5__q__weight=W, model__layers__13__q__weight=W, lm_head__weight=W,
        model__embed__weight=W,
    )  # fmt: skip
    target = half(values["lm_head.weight"])
    targets = {
        "blk.13.attn_q.weight": target, "blk.5.attn_q.weight": target.flip(0), HEAD: target,
        "token_embd.weight": target,
    }  # fmt: skip
    found = {name: origin.sources for name, origin in find_origins(targets, infos).items()}
    assert found == {
        "blk.13.attn_q.weight": ("model.layers.13.q.weight",),
        "blk.5.attn_q.weight": ("model.layers.5.q.weight",),
        HEAD: ("lm_head.weight",), "token_embd.weight": ("model.embed.weight",),
    }  # fmt: skip


def test_equal_rows_may_be_exchanged_only_if_that_makes_no_difference(originals):
    W = torch.randn(8, IN)
    W[2] = W[5] = 0
    values, infos = originals(w=W)
    target = half(values["w"])[torch.arange(8).reshape(2, 4).T.reshape(-1)]
    origin = find_origins({"w": target}, infos)["w"]
    codes = torch.randint(0, 9, (8, 32), dtype=torch.int16)
    assert not origin.is_certain(target, lambda: codes[origin.row])
    codes[5] = codes[2]
    assert origin.is_certain(target, lambda: codes[origin.row])
    in_order = find_origins({"w": half(values["w"])}, infos)["w"]
    assert in_order.is_certain(half(values["w"]), lambda: torch.arange(32).reshape(8, 4).short())


def test_a_matrix_with_equal_columns_is_not_put_in_order_by_guessing(originals):
    W = torch.randn(8, IN)
    W[:, 3] = W[:, 40]
    values, infos = originals(w=W)
    assert find_origins({"w": half(values["w"]).flip(1)}, infos) == {}
