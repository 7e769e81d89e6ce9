"""Options that are made from the fields of the config classes, and options that commands share."""

from __future__ import annotations

import re
from typing import Annotated, Any

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from roundwise.cli.app import app
from roundwise.cli.options import (
    Expand,
    JsonOption,
    SettingsCommand,
    StrideOption,
    parse_dynamic,
    parse_number,
    setting_options,
    settings_as_options,
    split_names,
)
from roundwise.config import DEPENDENT_DEFAULTS, CalibrationConfig, QuantizeConfig, RunConfig
from roundwise.errors import ConfigError
from roundwise.settings import Panel, Settings

KINDS = (QuantizeConfig, CalibrationConfig, RunConfig)
FIELDS = [(kind, name) for kind in KINDS for name in kind.model_fields]


def help_of(command: str) -> str:
    """Returns `roundwise COMMAND --help` on a terminal that is wide enough for a line per option."""
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "500"})
    assert result.exit_code == 0
    return re.sub(r"\x1b\[[\d;]*m", "", result.output)


def panels_of(text: str) -> dict[str, str]:
    """Returns the lines of each panel of a help text."""
    parts = re.split(r"╭─ (.*?) ─+╮", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def given_to_config(*arguments: object, **settings: Any) -> QuantizeConfig:
    """Returns the config that `arguments` of a command line make."""
    seen: list[QuantizeConfig] = []
    small = typer.Typer(add_completion=False)

    @small.command()
    @settings_as_options
    def command(config: QuantizeConfig) -> None:
        seen.append(config)

    result = CliRunner().invoke(small, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    assert seen == [QuantizeConfig(**settings)]
    return seen[0]


@pytest.fixture(scope="module")
def panels() -> dict[str, str]:
    """Panels of `roundwise quantize --help`."""
    return panels_of(help_of("quantize"))


class TestHelp:
    """`quantize --help` says what the fields of the config classes say."""

    def test_panels(self, panels: dict[str, str]) -> None:
        assert list(panels) == [
            "Model and output", "Format", "Calibration", "Recipe (for experts)",
            "Memory and devices", "Run",
        ]  # fmt: skip

    @pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[name for _, name in FIELDS])
    def test_every_field_is_an_option_with_its_description(
        self, kind: type[Settings], name: str, panels: dict[str, str]
    ) -> None:
        field = kind.model_fields[name]
        panel = next(marker for marker in field.metadata if isinstance(marker, Panel))
        options = setting_options(kind, name)
        assert field.description
        assert len(options) > 1 or options[0].help == field.description
        for option in options:
            positive, _, negative = option.names.partition("/")
            row = re.search(rf"^│ +{positive} .*$", panels[panel], re.MULTILINE)
            assert row, f"{positive} is not in the panel {panel}"
            assert option.help and option.help in row[0]
            assert negative in row[0]

    def test_defaults(self, panels: dict[str, str]) -> None:
        assert "[default: (the model's)]" in panels["Format"]
        assert "[default: sym]" in panels["Format"]
        assert "default: 2,3,4,8" in panels["Format"]
        assert "[default: 0.01]" in panels["Recipe (for experts)"]
        assert "[default: (pivot; textbook: minmax)]" in panels["Recipe (for experts)"]

    def test_plan_takes_the_options_that_change_what_happens(self) -> None:
        panels = panels_of(help_of("plan"))
        assert "Device to plan for." in panels["Memory and devices"]
        planned = "".join(panels.values())
        for kind, name in FIELDS:
            for option in setting_options(kind, name):
                listed = re.search(rf"^│ +{option.names.partition('/')[0]} ", planned, re.MULTILINE)
                assert bool(listed) == (name not in ("restart", "strict"))


class TestValues:
    """What is on the command line is what the config is made from, and nothing else."""

    def test_nothing(self) -> None:
        given_to_config()

    @pytest.mark.parametrize("name", sorted(DEPENDENT_DEFAULTS - {"group_size"}))
    def test_a_recipe_sets_what_is_not_given(self, name: str) -> None:
        option = setting_options(QuantizeConfig, name)[0].names
        default = QuantizeConfig.model_fields[name].default
        textbook = {"recipe": "textbook"}
        given_to_config("--recipe", "textbook", **textbook)
        typed = ",".join(map(str, default)) if isinstance(default, tuple) else default
        given_to_config("--recipe", "textbook", option, typed, **textbook, **{name: default})

    def test_the_model_decides_the_group_size_that_is_not_given(self) -> None:
        assert given_to_config().chooses_group_size
        assert not given_to_config("--group-size", 128, group_size=128).chooses_group_size

    def test_the_format_depends_on_sym(self) -> None:
        assert given_to_config("--asym", sym=False).format == "gptq_v2"
        assert (
            given_to_config("--asym", "--format", "gptq", sym=False, format="gptq").format == "gptq"
        )

    def test_a_number(self) -> None:
        given_to_config("--damp-percent", "0.05", damp_percent=0.05)
        given_to_config("--damp-percent", "1", damp_percent=1)

    def test_a_list(self) -> None:
        given_to_config("--target-bpw", 3.5, "--target-widths", "4,8", target_bpw=3.5,
                        target_widths=(4, 8))  # fmt: skip

    def test_overrides_and_skips(self) -> None:
        given_to_config(
            "--override", "down_proj=bits:8,group_size:32", "--skip", "lm_head", "--override",
            "q_proj=sym:false",
            dynamic={
                "lm_head": None, "down_proj": {"bits": 8, "group_size": 32}, "q_proj": {"sym": False}
            },
        )  # fmt: skip

    def test_flags(self) -> None:
        given_to_config("--desc-act", "--lm-head", "--rotate", "--positive-scales", desc_act=True,
                        lm_head=True, rotate=True, positive_scales=True)  # fmt: skip

    def test_a_wrong_value_is_the_configs_error(self) -> None:
        with pytest.raises(ConfigError, match="bits=9 is not supported: use 2, 3, 4, 5, 6, 7 or 8"):
            given_to_config("--bits", 9)
        with pytest.raises(ConfigError, match=r"target_widths\.1='x' is not supported"):
            given_to_config("--target-widths", "4,x")


class Small(Settings):
    """A config class of another program."""

    count: Annotated[int, Panel.FORMAT] = Field(3, description="How many.")
    name: Annotated[str | None, Panel.RUN] = Field(None, description="What it is called.")
    secret: Annotated[bool, Panel.RUN] = Field(False, description="Tell no one.")


class TestDecorator:
    def run(self, *arguments: str) -> tuple[Any, str]:
        """Returns what the command got, and its help."""
        seen: list[Any] = []
        small = typer.Typer(add_completion=False)

        @small.command(cls=SettingsCommand)
        @settings_as_options
        def command(
            context: typer.Context,
            things: Annotated[Small, Expand(without=("secret",), help={"name": "Its name."})],
            where: Annotated[str, typer.Argument(help="A place.")],
            as_json: JsonOption = False,
        ) -> None:
            """Do it."""
            seen.append((context.params, things, where, as_json))

        assert CliRunner().invoke(small, [*arguments]).exit_code == 0
        return seen[0], CliRunner().invoke(small, ["--help"], env={"COLUMNS": "200"}).output

    def test_settings_arrive_as_one_object(self) -> None:
        (params, things, where, as_json), _ = self.run("here", "--count", "5", "--json")
        assert things == Small(count=5)
        assert (where, as_json) == ("here", True)
        assert params == {"count": 5, "name": None, "where": "here", "as_json": True}

    def test_texts_and_fields_can_be_left_out(self) -> None:
        _, text = self.run("here")
        assert "Its name." in text
        assert "What it is called." not in text
        assert "--secret" not in text
        assert "Do it." in text
        assert list(panels_of(text)) == ["Model and output", "Format", "Run"]


class TestParsing:
    @pytest.mark.parametrize(
        ("text", "value"), [("4", 4), ("4.0", 4), ("0.5", 0.5), ("auto", "auto"), ("", "")]
    )
    def test_numbers(self, text: str, value: object) -> None:
        parsed = parse_number(text)
        assert parsed == value
        assert type(parsed) is type(value)

    def test_dynamic(self) -> None:
        assert parse_dynamic([], []) == {}
        assert parse_dynamic(["a=b=bits: 3 , sym:True"], ["c"]) == {
            "c": None, "a=b": {"bits": 3, "sym": True}
        }  # fmt: skip
        with pytest.raises(ConfigError, match=r"--override 'q_proj': write it as 'REGEX=bits:8"):
            parse_dynamic(["q_proj"], [])

    def test_names(self) -> None:
        assert split_names(None) == split_names(" , ") == []
        assert split_names("arc_easy, hellaswag,") == ["arc_easy", "hellaswag"]

    def test_a_value_below_the_least_is_one_sentence(self) -> None:
        small = typer.Typer(add_completion=False)

        @small.command()
        def command(stride: StrideOption = 2) -> None:
            """Do it."""

        error = CliRunner().invoke(small, ["--stride", "0"]).exception
        assert isinstance(error, ConfigError)
        assert str(error) == "--stride 0: must be at least 1"
