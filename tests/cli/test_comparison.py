"""Comparisons in words: tables that fit a terminal, and answers to prompts."""

from __future__ import annotations

from typing import Any

import pytest

from roundwise.cli.comparison import print_agreement, print_comparisons
from roundwise.evaluation.compare import Comparison, Pair, SpeedSummary
from roundwise.evaluation.reference_prompts import Parting, PromptAgreement, PromptResult
from roundwise.evaluation.verdict import TaskChange


def comparison(**changes: Any) -> Comparison:
    fields = {
        "name": "out", "perplexity": Pair(30.0, 36.0), "kl_divergence": 0.1, "top1_agreement": 0.9,
        "kl_by_position": [(0, 0.01), (128, 0.02)], "bytes": Pair(10**9, 3 * 10**8),
        "tasks": [TaskChange("arc_easy", "acc", 0.6, 0.55)],
        "speed": Pair(SpeedSummary(1.0, 2.0, 10**9, 3.0), SpeedSummary(4.0, 5.0, 10**8, 6.0)),
        "warnings": ["flattered"], "advice": "try --bits 4",
    }  # fmt: skip
    return Comparison(**{**fields, **changes})


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparisons([comparison(), comparison(name="rtn", advice=None, warnings=[])])
    out, err = capsys.readouterr()
    assert "30.0000" in out
    assert out.count("36.0000") == 2
    assert "0.5500 (-5.0 !)" in out
    assert "out: failed: perplexity rose by 6.00 (limit 1.5)" in out
    assert "out: try --bits 4" in out
    assert "rtn: try" not in out
    assert err == "out: flattered\n"
    assert max(map(len, out.splitlines())) <= 80


def test_no_text_and_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = {"perplexity": None, "kl_divergence": None, "top1_agreement": None, "speed": None}
    print_comparisons([comparison(**nothing, kl_by_position=[])])
    out = capsys.readouterr().out
    assert "arc_easy (acc)" in out
    assert "perplexity" not in out
    assert "tokens/s" not in out


def test_answers(capsys: pytest.CaptureFixture[str]) -> None:
    parting = Parting(' the "end"\n', " a", 0.625)
    results = [PromptResult("same", 4, 4, None), PromptResult("one\ntwo", 6, 1, parting)]
    print_agreement(PromptAgreement("out", results))
    assert capsys.readouterr().out.splitlines() == [
        "out: 1 of 2 answers the same, 50.0% of the tokens before they part",
        '"one\\ntwo"',
        "  parts at token 2 of 6, which the original gave 62%",
        '  original   " the \\"end\\"\\n"',
        '  quantized  " a"',
    ]
