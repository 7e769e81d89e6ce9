"""Command-line options: those of settings, made from the fields of `roundwise.config`, and shared ones.

A command asks for settings by type, `config: QuantizeConfig`, and `settings_as_options` replaces such a
parameter by one option per field. A new field is a new option of every command that takes its class.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand
from typer.models import ArgumentInfo, OptionInfo

from roundwise.config import DEPENDENT_DEFAULTS, RECIPES
from roundwise.errors import ConfigError
from roundwise.settings import Flags, Panel, Settings


@dataclass(frozen=True)
class Expand:
    """Marker of a settings parameter: which fields become options, and texts that differ here."""

    without: tuple[str, ...] = ()
    """Fields that do not become options."""
    help: dict[str, str] = field(default_factory=dict)
    """Field -> help text, instead of its description."""


class SettingsCommand(TyperCommand):
    """Command whose --help option is shown in the last panel, not in one of its own."""

    def get_help_option(self, ctx: Any) -> Any:
        """Returns the --help option."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = Panel.RUN
        return option


@dataclass(frozen=True)
class SettingOption:
    """Command-line option that sets a setting, or a part of it."""

    parameter: str
    """Parameter of the command's function."""
    names: str
    """As typer declares them: "--bits", "--sym/--asym"."""
    help: str


def settings_as_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: replaces each parameter whose type is a settings class by one option per field.

    Options are sorted by panel; those of the function itself are in the panel Run unless they name
    another one. typer reads the new signature; `function` is called with complete settings objects.
    """
    kinds: dict[str, tuple[type[Settings], Expand]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind, *markers = _split_annotated(parameter.annotation)
        if isinstance(kind, type) and issubclass(kind, Settings):
            expand = next((m for m in markers if isinstance(m, Expand)), Expand())
            kinds[name] = kind, expand
            parameters += _setting_parameters(kind, expand)
        else:
            parameters.append(_in_panel(parameter))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        settings = {name: _collect(*kind, values) for name, kind in kinds.items()}
        function(**values, **settings)

    parameters.sort(key=_panel_index)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def setting_options(kind: type[Settings], name: str) -> list[SettingOption]:
    """Returns the command-line options of one setting: one, or several if its field has `Flags`."""
    info = kind.model_fields[name]
    flags = next((marker for marker in info.metadata if isinstance(marker, Flags)), None)
    texts = flags.options if flags else {f"--{name.replace('_', '-')}": ""}
    return [
        SettingOption(
            name if len(texts) == 1 else names.removeprefix("--"),
            names,
            text or info.description or "",
        )
        for names, text in texts.items()
    ]


def parse_dynamic(overrides: list[str], skips: list[str]) -> dict[str, dict[str, Any] | None]:
    """Returns `QuantizeConfig.dynamic`.

    Args:
        overrides: texts such as "REGEX=bits:8,group_size:32".
        skips: regular expressions of modules that are not quantized.

    Raises:
        ConfigError: an override is written in another way.
    """
    dynamic: dict[str, dict[str, Any] | None] = dict.fromkeys(skips)
    for text in overrides:
        pattern, equals, changes = text.rpartition("=")
        pairs = [re.fullmatch(r"\s*(\w+)\s*:\s*([\w-]+)\s*", part) for part in changes.split(",")]
        if not equals or not all(pairs):
            raise ConfigError(f"--override {text!r}: write it as 'REGEX=bits:8,group_size:32'")
        dynamic[pattern] = {pair[1]: _override_value(pair[2]) for pair in pairs if pair}
    return dynamic


def parse_number(text: str) -> int | float | str:
    """Returns the number that `text` is; other text unchanged, for the config to check."""
    try:
        value = float(text)
        return int(value) if value.is_integer() else value
    except ValueError:
        return text


def split_names(text: str | None) -> list[str]:
    """Returns the parts of a list such as "arc_easy,hellaswag", without spaces and empty parts."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def at_least(least: int) -> Callable[[typer.CallbackParam, int], int]:
    """Returns a callback of an option that refuses smaller values in one sentence."""

    def check(parameter: typer.CallbackParam, value: int) -> int:
        if value < least:
            raise ConfigError(f"{parameter.opts[0]} {value}: must be at least {least}")
        return value

    return check


#: Environment variable with the API key of a server.
API_KEY_VARIABLE = "ROUNDWISE_API_KEY"

# Arguments and options that several commands share.
SOURCE = typer.Argument(help="Model folder, or id on the Hugging Face hub.")
ModelArgument = Annotated[
    str, typer.Argument(help="Model, quantized or not: folder or Hugging Face hub id.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DtypeOption = Annotated[
    str, typer.Option(help="Data type to compute in: auto, float32, bfloat16 or float16.")
]
DeviceOption = Annotated[str, typer.Option(help="Device to compute on: auto, cpu or cuda.")]
TextOption = Annotated[
    str | None, typer.Option(help="Evaluation text: a file, python-stdlib, wikitext2, c4 …")
]
WindowOption = Annotated[
    int, typer.Option(help="Tokens the model sees at once.", callback=at_least(2))
]
SpecialTokensOption = Annotated[
    bool,
    typer.Option(
        "--special-tokens/--no-special-tokens",
        help="Put the special tokens that the tokenizer adds to a text, such as <bos>, around every "
        "window.",
    ),
]
StrideOption = Annotated[
    int,
    typer.Option(help="Tokens from one perplexity window to the next.", callback=at_least(1)),
]
MaxTokensOption = Annotated[
    int | None, typer.Option(help="Evaluate only the first tokens of the text.")
]
TasksOption = Annotated[
    str | None, typer.Option(help="Tasks of lm-eval, such as arc_easy,hellaswag.")
]
IncludePathOption = Annotated[
    Path | None, typer.Option(help="Folder with additional task files (YAML).")
]
ShotsOption = Annotated[
    int | None, typer.Option(help="Examples before each question (default: the task's).", min=0)
]
LimitOption = Annotated[
    int | None, typer.Option(help="Evaluate only the first documents of each task.", min=1)
]
BatchSizeOption = Annotated[int, typer.Option(help="Sequences per forward pass.", min=1)]
ServedModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="Model, quantized or not: folder or hub id; with --endpoint, the one it serves."
    ),
]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        help="Measure through this server with OpenAI's API, such as http://127.0.0.1:8000."
    ),
]
ApiKeyOption = Annotated[
    str | None, typer.Option(envvar=API_KEY_VARIABLE, help="API key of the server (--endpoint).")
]
ChatTemplateOption = Annotated[
    Path | None, typer.Option(help="Jinja file to use instead of the model's own chat template.")
]


def _split_annotated(annotation: Any) -> tuple[Any, ...]:
    """Returns the type inside `Annotated`, followed by its markers."""
    return get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)


def _setting_parameters(kind: type[Settings], expand: Expand) -> Iterator[inspect.Parameter]:
    """Yields one parameter per option of a settings class."""
    for name, info in kind.model_fields.items():
        if name in expand.without:
            continue
        value_type, default = _value_type(info.annotation), _default(name, info)
        for option in setting_options(kind, name):
            typer_option = typer.Option(
                option.names,
                help=expand.help.get(name, option.help),
                show_default=_default_text(name, info) or True,
                rich_help_panel=next(m for m in info.metadata if isinstance(m, Panel)),
                autocompletion=_completion(info.annotation),
            )
            optional_type = value_type | None if default is None else value_type
            yield inspect.Parameter(
                option.parameter,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[optional_type, typer_option],
            )


def _value_type(annotation: Any) -> Any:
    """Returns the type of an option's value: what typer parses; other types are read from text."""
    members = _union_members(annotation)
    if len(members) > 1:
        return str
    if get_origin(members[0]) is Literal:
        return type(get_args(members[0])[0])
    return {dict: list[str], tuple: str}.get(get_origin(members[0]), members[0])


def _completion(annotation: Any) -> Callable[[str], list[str]] | None:
    """Returns what completes an option's value in the shell; None: any value may follow."""
    members = _union_members(annotation)
    if get_origin(members[0]) is not Literal:
        return None
    values = [str(value) for value in get_args(members[0])]
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def _union_members(annotation: Any) -> list[Any]:
    """Returns the types of a union, without None."""
    is_union = get_origin(annotation) in (Union, UnionType)
    return [m for m in (get_args(annotation) if is_union else [annotation]) if m is not NoneType]


def _default(name: str, info: FieldInfo) -> Any:
    """Returns an option's default; None: not given, so that the config decides."""
    if name in DEPENDENT_DEFAULTS or info.default_factory is not None or info.default is None:
        return None
    if isinstance(info.default, tuple):
        return ",".join(map(str, info.default))
    return str(info.default) if _value_type(info.annotation) is str else info.default


def _default_text(name: str, info: FieldInfo) -> str | None:
    """Returns a default that depends on recipe or model in words; None: the option's default says it."""
    if name == "group_size":
        return "the model's"
    recipes = {recipe: values[name] for recipe, values in RECIPES.items() if name in values}
    if not recipes:
        return None
    return "; ".join([str(info.default), *(f"{key}: {value}" for key, value in recipes.items())])


def _collect(kind: type[Settings], expand: Expand, values: dict[str, Any]) -> Settings:
    """Takes a settings class's options out of `values` and returns the settings that were given."""
    given = {}
    for name, info in kind.model_fields.items():
        if name in expand.without:
            continue
        parts = [values.pop(option.parameter) for option in setting_options(kind, name)]
        if get_origin(info.annotation) is dict:
            given[name] = parse_dynamic(*(part or [] for part in parts))
        elif parts[0] is not None:
            given[name] = _parse(info.annotation, parts[0])
    return kind(**given)


def _parse(annotation: Any, value: Any) -> Any:
    """Returns a value in the field's type where typer cannot read it: "2,3,4,8", or "auto" and 0.01."""
    members = _union_members(annotation)
    if get_origin(members[0]) is tuple:
        return tuple(parse_number(part) for part in value.split(","))
    if isinstance(value, str) and float in members and str not in members:
        return parse_number(value)
    return value


def _in_panel(parameter: inspect.Parameter) -> inspect.Parameter:
    """Returns a function's own parameter as keyword-only, in a panel: Run unless it names another."""
    base, *markers = _split_annotated(parameter.annotation)
    for index, marker in enumerate(markers):
        if isinstance(marker, ArgumentInfo | OptionInfo) and marker.rich_help_panel is None:
            markers[index] = copy(marker)
            markers[index].rich_help_panel = (
                Panel.MODEL if isinstance(marker, ArgumentInfo) else Panel.RUN
            )
    annotation = Annotated[base, *markers] if markers else base
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation)


def _panel_index(parameter: inspect.Parameter) -> int:
    """Returns the place of a parameter's panel; typer's context comes first."""
    markers = _split_annotated(parameter.annotation)[1:]
    panels = [m.rich_help_panel for m in markers if isinstance(m, ArgumentInfo | OptionInfo)]
    return list(Panel).index(Panel(panels[0] or Panel.RUN)) if panels else -1


def _override_value(text: str) -> int | bool | str:
    """Returns the value of one setting in --override."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text
