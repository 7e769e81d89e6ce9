"""Settings: what every config class has in common."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from roundwise.config import CalibrationConfig, QuantizeConfig, RunConfig
from roundwise.errors import ConfigError
from roundwise.settings import Panel, Settings


class Oven(Settings):
    """A config class with one setting of each kind."""

    degrees: Annotated[int, Panel.RUN] = Field(180, ge=0, description="Heat.")
    mode: str = "fan"


def test_they_cannot_be_changed() -> None:
    oven = Oven(degrees=200)
    with pytest.raises(ValidationError, match="frozen"):
        oven.degrees = 100
    assert oven.degrees == 200
    assert oven == Oven(degrees=200) != Oven()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"degree": 1}, r"there is no setting 'degree'; settings are degrees, mode"),
        ({"degrees": -1}, r"degrees=-1: .*greater than or equal to 0"),
        ({"degrees": "hot"}, r"degrees='hot': .*valid integer"),
    ],
)
def test_a_wrong_value_is_named_in_one_sentence(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Oven(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [QuantizeConfig, CalibrationConfig, RunConfig])
def test_every_setting_is_described_and_has_a_panel(kind: type[Settings]) -> None:
    for name, field in kind.model_fields.items():
        assert field.description, name
        assert [mark for mark in field.metadata if isinstance(mark, Panel)], name
