"""Learning curves: errors on held-out tokens, by the number of calibration tokens."""

import json

import pytest
import torch

import roundwise as rw
from roundwise.core.hessian import Hessian
from roundwise.core.solver import round_to_nearest
from roundwise.inference.load import load
from roundwise.run.learning_curve import LearningCurve
from roundwise.system.hub import bundled_model
from tests.helpers import contents

SETTINGS = rw.QuantizeConfig(bits=3, group_size=32)


def batches(count, tokens=64, seed=0):
    """Inputs [2, tokens, 64] with correlated channels, like those of real layers."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)[:, None]
    return [torch.randn(2, tokens, 64, generator=generator) @ mix for _ in range(count)]


def observe(inputs, W, settings=SETTINGS, mask=None):
    """The record of a learning curve over some inputs, and their Hessian."""
    curve, hessian = LearningCurve("layer", W, settings, len(inputs)), Hessian(64)
    for x in inputs:
        hessian.add(x, mask)
        curve.add(x, mask, hessian)
    return curve.record(), hessian


def test_each_part_is_solved_and_measured_on_the_last_eighth():
    W, inputs = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)), batches(16)
    record, _ = observe(inputs, W)
    assert [point["tokens"] for point in record["points"]] == [256, 512, 1024, 1792]
    assert record["held_out_tokens"] == 256
    # The last point, computed directly: solved with 14 batches, measured on the 2 others.
    X, held = (torch.cat(part).reshape(-1, 64).double() for part in (inputs[:14], inputs[14:]))
    quick = SETTINGS.merged({"grid_candidates": 1, "refine": 0})
    for q, error in (
        (rw.solve(W, (X.T @ X / len(X)).float(), quick), record["points"][-1]["relative_error"]),
        (round_to_nearest(W, quick), record["rtn"]),
    ):
        E = q.dequantize().double() - W
        expected = float((held @ E.T).square().sum() / (held @ W.double().T).square().sum())
        assert error == pytest.approx(expected, rel=1e-4)


def test_more_text_helps_until_it_does_not():
    W = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    record, _ = observe(batches(64, tokens=4), W)
    errors = [point["relative_error"] for point in record["points"]]
    assert errors[0] > 1.05 * errors[-1]
    assert errors[-1] < record["rtn"]
    assert errors[1] / errors[2] < errors[0] / errors[1]


def test_padding_does_not_count_and_the_hessian_is_unchanged():
    W, inputs = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)), batches(8)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[:, 32:] = False
    padded = [x.masked_fill(~mask[..., None], 1e6) for x in inputs]
    record, hessian = observe(padded, W, mask=mask)
    short, plain = observe([x[:, :32] for x in inputs], W)
    assert record == short
    assert torch.equal(hessian.mean(), plain.mean())


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_batches_give_no_record(count):
    record, _ = observe(batches(count), torch.randn(40, 64))
    assert record is None


def test_rows_are_bounded():
    curve = LearningCurve("layer", torch.randn(1000, 64), SETTINGS, 8)
    assert curve._W.shape == (125, 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    source, out = folder / "source", folder / "out"
    load(bundled_model(), dtype=torch.float32)[0].save_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(500, (8, 48), generator=generator).tolist()
    rw.quantize(source, out, rw.QuantizeConfig(bits=3), windows, batch_size=1, seq_len=48)
    return source, out, windows


def test_the_first_middle_and_last_block_have_a_curve(made):
    blocks = json.loads((made[1] / "roundwise.json").read_text())["blocks"]
    assert [bool(block["saturation"]) for block in blocks] == [
        True,
        False,
        False,
        True,
        False,
        True,
    ]
    assert blocks[3]["saturation"]["name"] == "model.layers.3.self_attn.q_proj"


def test_curves_do_not_change_the_weights(made, tmp_path, monkeypatch):
    source, out, windows = made
    monkeypatch.setattr("roundwise.run.loop.learning_curve_for", lambda *_: None)
    rw.quantize(
        source, tmp_path / "out", rw.QuantizeConfig(bits=3), windows,
        batch_size=1, seq_len=48,
    )  # fmt: skip
    without, with_curves = contents(tmp_path / "out"), contents(out)
    assert without.pop("roundwise.json") != with_curves.pop("roundwise.json")
    assert without == with_curves
