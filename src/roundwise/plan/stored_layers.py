"""Settings of the quantized layers of a finished checkpoint, as engines see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from roundwise.checkpoint.engines import ServedLayer, conflicting_packed_modules, expert_naming
from roundwise.checkpoint.quantized_layers import QuantizedLayer
from roundwise.model.moe import parse_expert_name

#: Families with Conv1D layers, whose weights are stored as [in, out].
CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def stored_layers(
    layers: list[QuantizedLayer], family: str, *, fused_experts: bool = False, towers: bool = False
) -> Iterator[ServedLayer]:
    """Yields the settings of each quantized layer as engines see them, conflicts between layers too.

    Args:
        layers: the quantized layers of a checkpoint.
        family: `model_type` of the model.
        fused_experts: the files of the original have all experts in one tensor, which a quantized
            checkpoint does not show.
        towers: layers of vision or audio towers are among them.
    """
    served: dict[str, ServedLayer] = {}
    experts: dict[str, set[ServedLayer]] = {}
    for layer in layers:
        settings = ServedLayer(
            bits=layer.bits, group_size=-1 if layer.groups == 1 else layer.group_size,
            sym=layer.config.sym is not False, desc_act=layer.is_act_order(),
            format=layer.checkpoint_format, is_head=layer.name.endswith("head"),
            is_conv1d=family in CONV1D_FAMILIES,
        )  # fmt: skip
        expert = parse_expert_name(layer.name)
        if expert is not None:
            experts.setdefault(expert[0], set()).add(settings)
            naming = expert_naming(expert[1][1], fused=fused_experts, family=family)
            settings = replace(settings, expert_naming=naming)
        served[layer.name] = settings
    yield from served.values()
    last = [*served.values()][-1:]
    yield from (
        replace(layer, conflicting_module=module)
        for layer in last
        for module in conflicting_packed_modules(served.__getitem__, served)
    )
    yield from (replace(layer, is_tower=True) for layer in last if towers)
    yield from (
        replace(layer, expert_naming="mixed")
        for layer in last
        for kinds in experts.values()
        if len(kinds) > 1
    )
