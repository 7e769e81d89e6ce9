"""Settings: defaults that depend on others, overrides by module name, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

import roundwise as rw
from roundwise.config import (
    DEPENDENT_DEFAULTS,
    RECIPES,
    CalibrationConfig,
    QuantizeConfig,
    RunConfig,
)
from roundwise.errors import ConfigError
from roundwise.settings import Panel, Settings

KINDS = (QuantizeConfig, CalibrationConfig, RunConfig)


@pytest.mark.parametrize("kind", KINDS)
class TestEverySetting:
    def test_has_a_description_and_a_panel(self, kind: type[Settings]) -> None:
        for name, field in kind.model_fields.items():
            assert field.description and field.description.endswith((".", ")")), name
            assert field.description[0].isupper(), name
            assert sum(isinstance(marker, Panel) for marker in field.metadata) == 1, name

    def test_is_frozen(self, kind: type[Settings]) -> None:
        config = kind()
        with pytest.raises(ValueError, match="frozen"):
            config.__setattr__(next(iter(kind.model_fields)), None)

    def test_has_a_name_that_is_known(self, kind: type[Settings]) -> None:
        names = ", ".join(kind.model_fields)
        with pytest.raises(ConfigError, match=rf"there is no setting 'bit'; settings are {names}$"):
            kind(bit=4)


class TestDefaults:
    def test_the_lane_that_every_engine_serves(self) -> None:
        config = QuantizeConfig()
        assert (config.bits, config.group_size, config.sym, config.desc_act) == (
            4,
            128,
            True,
            False,
        )
        assert (config.format, config.recipe, config.method) == ("gptq", "best", "gptq")

    def test_textbook(self) -> None:
        textbook = QuantizeConfig(recipe="textbook")
        assert textbook.model_dump(include=set(RECIPES["textbook"])) == RECIPES["textbook"]
        assert not textbook.needs_gradients
        assert not textbook.needs_reference
        assert QuantizeConfig(recipe="textbook", grid="mse").grid == "mse"

    def test_asymmetric_files_are_v2(self) -> None:
        assert QuantizeConfig(sym=False).format == "gptq_v2"
        assert QuantizeConfig(sym=False, format="gptq").format == "gptq"
        assert QuantizeConfig(format="gptq_v2").sym

    def test_which_depend_on_others(self) -> None:
        usual = QuantizeConfig().model_dump()
        changed = [QuantizeConfig(recipe="textbook"), QuantizeConfig(sym=False)]
        changed += [QuantizeConfig(format="compressed-tensors")]
        given = {"recipe", "sym"}
        differing = {
            name
            for config in changed
            for name, value in config.model_dump().items()
            if value != usual[name]
        }
        assert differing - given == DEPENDENT_DEFAULTS - {"group_size"}  # that is the model's

    def test_a_group_size_that_is_not_given_is_chosen_for_the_model(self) -> None:
        assert QuantizeConfig().chooses_group_size
        assert QuantizeConfig(sym=False, recipe="textbook").chooses_group_size
        assert not QuantizeConfig(group_size=128).chooses_group_size
        assert not QuantizeConfig(group_size=-1).chooses_group_size

    def test_they_are_those_of_quantize(self) -> None:
        import inspect

        arguments = inspect.signature(rw.quantize).parameters
        for kind in (CalibrationConfig, RunConfig):
            for name, field in kind.model_fields.items():
                assert arguments[name].default == field.default


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"bits": 9}, "bits=9 is not supported: use 2, 3, 4, 5, 6, 7 or 8"),
            ({"group_size": 12}, "group_size=12: must be -1"),
            ({"group_size": 0}, "group_size=0: must be -1"),
            ({"damp_percent": "much"}, "damp_percent='much': must be a number"),
            ({"damp_percent": 11}, "damp_percent=11: must be a number from 0 to 10"),
            ({"order": "best"}, "order='best' is not supported: use 'natural', 'static' or"),
            ({"alpha": 2}, "alpha=2"),
            ({"target_bpw": 0}, "target_bpw=0"),
            ({"target_widths": ()}, r"target_widths=\(\)"),
            ({"method": "rtn", "target_bpw": 4}, "target_bpw needs activations, .*: use method=gptq"),
            ({"method": "awq"}, "method='awq' is not supported: use 'gptq' or 'rtn'"),
            ({"dynamic": {"(": None}}, r"'\(' is not a regular expression"),
            ({"dynamic": {"q": {"alpha": 1}}}, "'q' changes alpha; an override may change bits"),
            ({"dynamic": {"q": {"bits": 1}}}, "bits=1 is not supported"),
            ({"bits": 9, "group_size": 12}, "bits=9 .*; group_size=12"),
        ],
    )  # fmt: skip
    def test_in_one_sentence(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            QuantizeConfig(**settings)

    def test_a_mode(self) -> None:
        with pytest.raises(
            ConfigError, match="mode='fast' is not supported: use 'true_sequential'"
        ):
            RunConfig(mode="fast")  # type: ignore[arg-type]


class TestModules:
    def test_the_first_pattern_decides(self) -> None:
        config = QuantizeConfig(
            dynamic={"lm_head": None, "down_proj": {"bits": 8}, "proj": {"group_size": 32}}
        )
        assert config.for_module("lm_head") is None
        down, up = config.for_module("mlp.down_proj"), config.for_module("mlp.up_proj")
        assert down is not None
        assert up is not None
        assert (down.bits, down.group_size) == (8, 128)
        assert (up.bits, up.group_size) == (4, 32)
        assert down.dynamic == {}
        assert config.for_module("mlp.gate") == config
        assert config.is_overridden("mlp.up_proj")
        assert not config.is_overridden("mlp.gate")

    def test_an_override_keeps_all_other_settings(self) -> None:
        config = QuantizeConfig(sym=False, recipe="textbook", dynamic={"q": {"bits": 3}})
        assert config.for_module("q") == config.merged({"bits": 3})
        assert config.merged({}).model_dump(exclude={"dynamic"}) == config.model_dump(
            exclude={"dynamic"}
        )


@pytest.mark.parametrize(
    ("group_size", "columns", "size", "groups"),
    [(128, 256, 128, 2), (128, 200, 128, 2), (-1, 200, 200, 1)],
)
def test_groups(group_size: int, columns: int, size: int, groups: int) -> None:
    config = QuantizeConfig(group_size=group_size)
    assert config.columns_per_group(columns) == size
    assert config.groups(columns) == groups


def test_widths_to_choose_from_depend_on_the_format() -> None:
    assert QuantizeConfig().target_widths == QuantizeConfig(sym=False).target_widths == (2, 3, 4, 8)
    packed = QuantizeConfig(format="compressed-tensors")
    assert packed.target_widths == (2, 3, 4, 5, 6, 8)
    assert packed.merged({"bits": 3}).target_widths == packed.target_widths
    given = QuantizeConfig(format="compressed-tensors", target_widths=(4,))
    assert given.target_widths == (4,)


def test_codes() -> None:
    largest = [QuantizeConfig(bits=bits).maxq for bits in (2, 3, 4, 5, 6, 7, 8)]
    assert largest == [3, 7, 15, 31, 63, 127, 255]
