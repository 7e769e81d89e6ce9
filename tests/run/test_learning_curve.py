"""What a run notes down: would more text help, how far is a block from the original, how long."""

import json

import pytest
import torch

import roundwise as rw
from roundwise.calibration.dataset import unique_share
from roundwise.checkpoint.hub import bundled_model
from roundwise.core.hessian import Hessian
from roundwise.core.solver import round_to_nearest
from roundwise.inference.load import load
from roundwise.run.learning_curve import LearningCurve
from tests.helpers import contents

SETTINGS = rw.QuantizeConfig(bits=3, group_size=32)


def batches(count, tokens=64, seed=0):
    """Inputs [2, tokens, 64] whose channels go together, as those of real layers do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)[:, None]
    return [torch.randn(2, tokens, 64, generator=generator) @ mix for _ in range(count)]


def learning_curve_for(inputs, W, settings=SETTINGS, mask=None):
    watch, hessian = LearningCurve("layer", W, settings, len(inputs)), Hessian(64)
    for x in inputs:
        hessian.add(x, mask)
        watch.add(x, mask, hessian)
    return watch.record(), hessian


def test_each_part_is_solved_and_measured_on_the_last_eighth_only():
    W, inputs = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)), batches(16)
    record, _ = learning_curve_for(inputs, W)
    assert [point["tokens"] for point in record["points"]] == [256, 512, 1024, 1792]
    assert record["held_out_tokens"] == 256
    # The last point by other means: the sum of the fourteen batches, solved, on the two others.
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
    record, _ = learning_curve_for(batches(64, tokens=4), W)
    errors = [point["relative_error"] for point in record["points"]]
    assert errors[0] > 1.05 * errors[-1]
    assert errors[-1] < record["rtn"]
    assert errors[1] / errors[2] < errors[0] / errors[1]


def test_padding_does_not_count_and_sums_go_on():
    W, inputs = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)), batches(8)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[:, 32:] = False
    padded = [x.masked_fill(~mask[..., None], 1e6) for x in inputs]
    record, hessian = learning_curve_for(padded, W, mask=mask)
    short, plain = learning_curve_for([x[:, :32] for x in inputs], W)
    assert record == short
    assert torch.equal(hessian.mean(), plain.mean())  # as if nobody had watched


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_batches_say_nothing(count):
    record, _ = learning_curve_for(batches(count), torch.randn(40, 64))
    assert record is None


def test_rows_are_bounded():
    watch = LearningCurve("layer", torch.randn(1000, 64), SETTINGS, 8)
    assert watch._W.shape == (125, 64)


def test_unique_share():
    once, again = list(range(16)), [7] * 32
    assert unique_share([once]) == 1.0
    assert unique_share([again]) == 0.25
    assert unique_share([[1, 2]]) == 1.0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    source, out = folder / "source", folder / "out"
    # Computes in float32, as what it is compared with.
    load(bundled_model(), dtype=torch.float32)[0].save_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(500, (8, 48), generator=generator).tolist()
    rw.quantize(source, out, rw.QuantizeConfig(bits=3), windows, batch_size=1, seq_len=48)
    return source, out, windows


def test_depth_error_is_that_of_the_hidden_states(made):
    source, out, windows = made
    blocks = json.loads((out / "roundwise.json").read_text())["blocks"]
    states = []
    for folder in (source, out):
        model = load(folder, dtype=torch.float32)[0]
        with torch.no_grad():
            found = model(torch.tensor(windows), output_hidden_states=True).hidden_states
        states.append([h.double() for h in found])
    assert [block["name"] for block in blocks] == [f"model.layers.{i}" for i in range(6)]
    # All but the last, which transformers gives behind the final norm.
    for block, then, now in zip(blocks[:-1], states[0][1:-1], states[1][1:-1], strict=True):
        expected = float((now - then).square().sum() / then.square().sum())
        assert block["depth_error"] == pytest.approx(expected, rel=1e-3)


def test_first_middle_and_last_block_are_watched(made):
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


def test_watching_changes_no_byte(made, tmp_path, monkeypatch):
    source, out, windows = made
    monkeypatch.setattr("roundwise.run.loop.learning_curve_for", lambda *_: None)
    rw.quantize(
        source, tmp_path / "out", rw.QuantizeConfig(bits=3), windows,
        batch_size=1, seq_len=48,
    )  # fmt: skip
    theirs, ours = contents(tmp_path / "out"), contents(out)
    assert theirs.pop("roundwise.json") != ours.pop("roundwise.json")
    assert theirs == ours


def test_timings_add_up_over_a_resumed_run(made, tmp_path):
    source, whole, windows = made

    def stop(progress):
        if progress.block == 2 and progress.layer is None:
            raise KeyboardInterrupt

    arguments = (source, tmp_path / "out", rw.QuantizeConfig(bits=3), windows)
    with pytest.raises(rw.RoundwiseError, match="3 of 6 blocks"):
        rw.quantize(*arguments, batch_size=1, seq_len=48, progress=stop)
    result = rw.quantize(*arguments, batch_size=1, seq_len=48)
    timings = json.loads((tmp_path / "out" / "roundwise-run.json").read_text())
    assert len(timings["blocks"]) == 6
    assert timings["seconds"] == pytest.approx(sum(timings["phases"].values()))
    assert timings["phases"]["solve"] > result.phases["solve"] > 0
    assert result.seconds == pytest.approx(sum(result.phases.values()), rel=0.05)
    assert contents(tmp_path / "out") == contents(whole)
