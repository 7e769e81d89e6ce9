"""Reads the quantization config of a checkpoint, whichever tool wrote it and wherever it is.

Tools use several names and spellings for the same setting: `format` and `checkpoint_format`, `method`
and `quant_method`, numbers as strings, capitals. Everything that reads a checkpoint gets one record with
one meaning from here. What only says how the file was made (dataset, damping, order of the modules) is
carried along unread. Values that change how tensors are read and that are not known are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from roundwise.checkpoint import compressed_tensors
from roundwise.checkpoint.config_values import (
    ALIASES,
    LayerConfig,
    check_pattern,
    flag,
    matches,
    unknown_value,
    whole_number,
    word,
)
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.untrusted import read_json
from roundwise.config import OVERRIDABLE
from roundwise.core.quantized_weight import WIDTHS
from roundwise.errors import CheckpointError, quoted

GptqVersion = Literal["gptq", "gptq_v2"]
Format = Literal["gptq", "gptq_v2", "compressed-tensors"]

#: Files of older tools that hold the settings if config.json does not.
OLD_FILE = "quantize_config.json"
#: File in which ModelOpt keeps its settings; newer versions write them to config.json too.
MODELOPT, MODELOPT_FILE = "modelopt", "hf_quant_config.json"
#: Names of AutoRound for itself, and its names of the layouts that are GPTQ's.
AUTO_ROUND = ("auto-round", "auto_round", "autoround", "intel/auto-round")
AUTO_ROUND_FORMATS: dict[str, GptqVersion] = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
MARLIN_ADVICE = (
    "is in Marlin's layout, which is made for one kernel and is not the GPTQ format: use the checkpoint "
    "that it was made from, engines with Marlin kernels repack that one while they load it"
)


@dataclass(frozen=True)
class QuantizationConfig:
    """The quantization config of a checkpoint in the GPTQ or the compressed-tensors format."""

    checkpoint_format: Format
    """gptq: zero points are stored minus one; gptq_v2: unchanged; compressed-tensors."""
    default: LayerConfig
    rules: tuple[tuple[str, LayerConfig | None], ...]
    """(pattern, settings) in order, the first that matches from the start of a name wins; None: layers
    that match are not quantized."""
    raw: dict[str, Any]
    """The config as JSON under the usual names and spellings, with all other entries unchanged."""
    names: Mapping[str, LayerConfig | None] = field(default_factory=dict)
    """Settings of layers that are named without a pattern, which come before all rules."""

    def as_json(self, checkpoint_format: GptqVersion | None = None) -> dict[str, Any]:
        """Returns the config as every reader understands it.

        Args:
            checkpoint_format: format of the tensors it is written for; None: unchanged.
        """
        if self.checkpoint_format == compressed_tensors.METHOD:
            return {**self.raw}
        return {**self.raw, "checkpoint_format": checkpoint_format or self.checkpoint_format}

    def overrides(self) -> dict[str, dict[str, Any] | None]:
        """Returns the `dynamic` rules as `QuantizeConfig.dynamic` has them.

        Returns:
            Pattern -> changed settings; None: layers that match are not quantized.
        """
        rules: dict[str, dict[str, Any] | None] = {}
        for rule, changes in self.raw.get("dynamic", {}).items():
            pattern = rule.removeprefix("-:").removeprefix("+:")
            # In files, patterns match from the start of a name; roundwise writes its own as `.*(?:…)`.
            ours = pattern.startswith(".*(?:") and pattern.endswith(")")
            pattern = pattern[5:-1] if ours else f"^(?:{pattern})"
            known = {key: changes[key] for key in OVERRIDABLE if key in (changes or {})}
            rules[pattern] = None if rule.startswith("-:") else known
        return rules | self._overrides_of_names()

    def _overrides_of_names(self) -> dict[str, dict[str, Any] | None]:
        """Returns overrides for the layers and patterns of a compressed-tensors config."""
        patterns: dict[LayerConfig | None, list[str]] = {}
        for name, settings in self.names.items():
            patterns.setdefault(settings, []).append(rf"(?:^|\.){re.escape(name)}$")
        if self.checkpoint_format == compressed_tensors.METHOD:
            for pattern, settings in self.rules:
                patterns.setdefault(settings, []).append(f"^(?:{pattern})")
        return {
            "|".join(parts): None if settings is None else settings.known()
            for settings, parts in patterns.items()
        }

    def for_layer(self, name: str) -> list[LayerConfig | None]:
        """Returns the settings that the config may mean for a layer; None: it is not quantized.

        Tools name layers as modules of their model, and files may have other names (experts above all).
        If no pattern matches the name in the files, a pattern that matches it without its first parts
        may be meant, or the default, or any other rule.

        Args:
            name: name of the layer in the files.

        Raises:
            CheckpointError: a pattern takes too long.
        """
        if self.names:
            named = next((alias for alias in _aliases(name) if alias in self.names), None)
            if named is not None:
                return [self.names[named]]
        rules = [self._rule_for(alias) for alias in _aliases(name)] if self.rules else []
        if rules and rules[0] is not None:
            return [rules[0][1]]
        others = [settings for _, settings in self.rules if settings is not None]
        return [*(rule[1] for rule in rules if rule is not None), self.default, *others]

    def _rule_for(self, name: str) -> tuple[str, LayerConfig | None] | None:
        return next((rule for rule in self.rules if matches(rule[0], name)), None)


def _aliases(name: str) -> Iterator[str]:
    """Yields a layer's name, then its ends, each also behind `model.`."""
    yield name
    parts = name.split(".")
    for start in range(1, len(parts)):
        end = ".".join(parts[start:])
        yield end
        yield f"model.{end}"
    yield f"model.{name}"


def raw_quantization_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Returns the quantization config as it is in the folder; None: nothing says that it is quantized.

    It is in config.json, there for the whole model or for its text part, or alone in
    hf_quant_config.json, or in quantize_config.json if tensors are packed.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, dict) else {}):
        settings = config.get("quantization_config")
        if settings is not None and not isinstance(settings, dict):
            raise CheckpointError(
                f"quantization_config in {checkpoint.folder}/config.json is not a JSON object"
            )
        if settings:
            return settings
    if (checkpoint.folder / MODELOPT_FILE).is_file():
        settings = read_json(checkpoint.folder / MODELOPT_FILE).get("quantization")
        if isinstance(settings, dict) and settings.get("quant_algo"):
            return {"quant_method": MODELOPT, **settings}
    if (checkpoint.folder / OLD_FILE).is_file() and is_packed(checkpoint.tensors):
        return read_json(checkpoint.folder / OLD_FILE)
    return None


def without_quantization_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json without the quantization config of the model and of its text part."""
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(rest.get("text_config"), dict):
        rest["text_config"] = without_quantization_config(rest["text_config"])
    return rest


def is_packed(tensors: Mapping[str, object]) -> bool:
    """Tells whether some tensors hold packed codes: GPTQ, compressed-tensors or Marlin's layout."""
    return any(
        name.endswith((".qweight", f".{compressed_tensors.PACKED}"))
        or (name.endswith(".B") and f"{name[:-1]}s" in tensors)
        for name in tensors
    )


def quantization_method(raw: Mapping[str, Any]) -> str:
    """Returns the method that a quantization config names, in small letters; gptq if it names none.

    Checkpoints of AutoRound in the GPTQ format count as gptq.

    Raises:
        CheckpointError: it is not a text, or the config names two.
    """
    method = word(raw, "quant_method", "gptq")
    if method not in AUTO_ROUND:
        return method
    packing = _auto_round_packing(raw)
    return "gptq" if packing in AUTO_ROUND_FORMATS else f"{method} ({packing})"


def _auto_round_packing(raw: Mapping[str, Any]) -> str:
    return word(raw, "packing_format", "auto_round:auto_gptq")


def read_quantization_config(checkpoint: Checkpoint) -> QuantizationConfig:
    """Returns the quantization config of a checkpoint in the GPTQ or the compressed-tensors format.

    Raises:
        CheckpointError: the checkpoint is not quantized or in another format, or a value is not known.
        ConfigError: it is in another format of compressed-tensors.
    """
    raw = raw_quantization_config(checkpoint)
    if raw is None:
        packed = is_packed(checkpoint.tensors)
        raise CheckpointError(
            f"{checkpoint.folder} {'has packed weights' if packed else 'is not quantized'}: "
            f"it has no quantization_config{' that says how to read them' if packed else ''}"
        )
    return parse_quantization_config(raw, str(checkpoint.folder))


def parse_quantization_config(raw: Mapping[str, Any], folder: str) -> QuantizationConfig:
    """Returns the record of a quantization config.

    Args:
        raw: the config as a JSON object.
        folder: name of the checkpoint, for error messages.

    Raises:
        CheckpointError: the format is another one, or a value is not known.
        ConfigError: it is another format of compressed-tensors.
    """
    method = quantization_method(raw)
    if method == compressed_tensors.METHOD:
        targets = compressed_tensors.parse_targets(raw, folder)
        return QuantizationConfig(
            "compressed-tensors", targets.default, targets.rules, {**raw}, targets.names
        )
    if method != "gptq":
        raise CheckpointError(
            f"{folder} is quantized with {quoted(method)[1:-1]}, not in the GPTQ format or "
            "compressed-tensors"
        )
    checkpoint_format = _checkpoint_format(raw, folder)
    pack_dtype = word(raw, "pack_dtype", "int32").removeprefix("torch.")
    if pack_dtype != "int32":
        raise CheckpointError(
            f"{folder} packs codes in words of {quoted(pack_dtype)} (pack_dtype): only int32 is "
            "supported, quantize the model again with pack_dtype int32"
        )
    _check_activations(raw, folder)
    dynamic = {**_auto_round_rules(raw), **_dynamic(raw)}
    default = _layer_config(raw)
    other = {*ALIASES, *ALIASES.values(), "packing_format", "extra_config", "dynamic"}
    known = {
        "bits": default.bits, "group_size": default.group_size, "sym": default.sym,
        "desc_act": default.desc_act,
    }  # fmt: skip
    canonical = {
        "quant_method": "gptq",
        **{key: value for key, value in raw.items() if key not in other},
        **{key: value for key, value in known.items() if value is not None},
        **({"lm_head": bool(flag(raw, "lm_head"))} if "lm_head" in raw else {}),
        "checkpoint_format": checkpoint_format,
        **({"dynamic": dynamic} if dynamic else {}),
    }
    rules = tuple(_parse_rule(pattern, changes, raw) for pattern, changes in dynamic.items())
    return QuantizationConfig(checkpoint_format, default, rules, canonical)


def _checkpoint_format(raw: Mapping[str, Any], folder: str) -> GptqVersion:
    """Returns how zero points are stored."""
    auto_round = word(raw, "quant_method", "gptq") in AUTO_ROUND
    default = AUTO_ROUND_FORMATS[_auto_round_packing(raw)] if auto_round else "gptq"
    stated = word(raw, "checkpoint_format", default)
    if "marlin" in stated or flag(raw, "is_marlin_format"):
        raise CheckpointError(f"{folder} {MARLIN_ADVICE}")
    if stated not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"{folder} has tensors in the format {quoted(stated)} (checkpoint_format): only gptq and "
            "gptq_v2 are supported"
        )
    return cast(GptqVersion, stated)


def _check_activations(raw: Mapping[str, Any], folder: str) -> None:
    """Refuses AutoRound's configs that quantize activations, or weights to other types than integers."""
    data_type, act_bits = raw.get("data_type", "int"), raw.get("act_bits")
    if str(data_type or "int").lower() != "int":
        raise CheckpointError(
            f"{folder} quantizes weights to {quoted(str(data_type))} (data_type): only int is supported"
        )
    if act_bits is not None and (whole_number(raw, "act_bits") or 16) < 16:
        raise CheckpointError(
            f"{folder} quantizes activations too (act_bits), which is not supported"
        )


def _auto_round_rules(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns AutoRound's settings of single layers, `extra_config`, as `dynamic` rules."""
    extra = raw.get("extra_config")
    rules: dict[str, dict[str, Any]] = {}
    for name, changes in extra.items() if isinstance(extra, dict) else ():
        if isinstance(changes, dict):
            kept = {key: changes[key] for key in ("bits", "group_size", "sym") if key in changes}
            quantized = (whole_number(kept, "bits") or 0) < 16
            rules[f"{'+' if quantized else '-'}:(?:{name})$"] = kept if quantized else {}
    return rules


def _dynamic(raw: Mapping[str, Any]) -> dict[str, Any]:
    dynamic = raw.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError("dynamic of the quantization config is not a JSON object")
    return dynamic


def _parse_rule(rule: str, changes: Any, raw: Mapping[str, Any]) -> tuple[str, LayerConfig | None]:
    """Returns pattern and settings of a `dynamic` rule.

    Raises:
        CheckpointError: the pattern is not a regular expression, or a setting is not known.
    """
    pattern = rule.removeprefix("-:").removeprefix("+:")
    check_pattern(pattern)
    if rule.startswith("-:"):
        return pattern, None
    if not isinstance(changes, dict | None):
        raise CheckpointError(
            f"dynamic rule {quoted(rule)} of the quantization config has no settings"
        )
    return pattern, _layer_config({**raw, **(changes or {})})


def _layer_config(settings: Mapping[str, Any]) -> LayerConfig:
    bits, group_size = whole_number(settings, "bits"), whole_number(settings, "group_size")
    if bits is not None and bits not in WIDTHS:
        raise unknown_value("bits", settings["bits"], "2, 3, 4, 5, 6, 7 or 8")
    if group_size is not None and group_size != -1 and group_size < 1:
        raise unknown_value(
            "group_size", settings["group_size"], "-1 or a number of input channels"
        )
    return LayerConfig(bits, group_size, flag(settings, "sym"), flag(settings, "desc_act"))
