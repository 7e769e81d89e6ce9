"""ExpertRouting: which calibration tokens an expert's Hessian is made from, in a mixture of experts.

With `routed` these are the tokens that the router sends to the expert; an expert that gets fewer than a
minimum is given all tokens instead, and the result says so. With `all`, every token passes every expert
while Hessians are summed up. The model's output is the same either way.

The router of the original model may choose differently from that of the quantized one. Where both run,
the original model's experts also get the tokens that the quantized model chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from roundwise.config import Experts, QuantizeConfig
from roundwise.errors import ConfigError
from roundwise.forward.input_groups import InputGroup
from roundwise.model.blocks import Block
from roundwise.model.moe import ExpertDispatch, LinearExperts
from roundwise.system.distributed import Ranks


@dataclass(frozen=True)
class ExpertCalibration:
    """The rule for an expert's calibration tokens."""

    gather: Experts = "routed"
    minimum: int = 0
    """With `routed`: an expert that gets fewer tokens is given all."""


@dataclass
class RoutedBatch:
    """The tokens of one batch in one module of experts."""

    index: torch.Tensor
    """The router's choice, int64 [tokens, k]."""
    rows: list[torch.Tensor | None] = field(default_factory=list)
    """By expert: numbers of the tokens that pass it; None: all."""
    shared: list[torch.Tensor | None] = field(default_factory=list)
    """By expert, for a reference: positions in `rows` of the tokens that the quantized model's router
    chose; None: all."""

    def dispatch(self) -> ExpertDispatch:
        """All experts in order, some without a token, so that every batch reaches every group."""
        return list(enumerate(self.rows))


class ExpertRouting:
    """The routing in one module of experts while its block runs.

    Args:
        name: full name of the module.
        experts: the module.
        groups: the block's groups.
        policy: the rule for calibration tokens.
    """

    def __init__(
        self,
        name: str,
        experts: LinearExperts,
        groups: Sequence[InputGroup],
        policy: ExpertCalibration,
    ) -> None:
        self.name, self.experts, self.policy = name, experts, policy
        paths = {linear: n for n, linear in experts.named_modules(prefix=name)}
        self.expert_of = {
            paths[experts.layer(expert, role)]: expert for expert, role in experts.projections()
        }
        """Full name of a linear -> number of its expert."""
        self.first = next(
            (i for i, group in enumerate(groups) if self.expert_of.keys() & set(group.names)),
            len(groups),
        )
        """Number of the first group that reads what the router sent here."""
        self.tokens = torch.zeros(experts.count, dtype=torch.int64)
        """By expert: how many tokens the router sent to it; padding does not count."""
        self._total = 0
        self._reduced = False
        self._short: set[int] = set()

    def count(self, index: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Counts a batch's choices `index` [tokens, k]; False in `mask` marks padding."""
        chosen = index if mask is None else index[mask.reshape(-1)]
        self._total += len(chosen)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.tokens))
        self.tokens += counts[: len(self.tokens)].to(self.tokens.device)

    def all_tokens(self, ranks: Ranks) -> list[int]:
        """`tokens` summed over all ranks, once their batches are counted."""
        if not self._reduced:
            ranks.all_reduce_sum(self.tokens)
            self._total = int(ranks.all_reduce_sum(torch.tensor([self._total])))
            self._reduced = True
        return self.tokens.tolist()

    def decide(self, groups: Sequence[InputGroup], ranks: Ranks) -> None:
        """Decides which experts are given all tokens; all batches are counted by then.

        Writes the reason into `InputGroup.fallback` of their groups.
        """
        if self.policy.gather == "all":
            return
        counts = self.all_tokens(ranks)
        self._short = {e for e, n in enumerate(counts) if n < self.policy.minimum}
        for group in groups:
            for expert in self._short & {self.expert_of.get(name, -1) for name in group.names}:
                group.fallback = (
                    f"{counts[expert]} of {self._total} calibration tokens were routed to "
                    f"this expert, fewer than {self.policy.minimum}: its Hessian is that of all tokens"
                )

    def assign(self, routed: RoutedBatch, quantized: RoutedBatch | None) -> None:
        """Fills in which tokens of a batch pass which expert.

        Args:
            routed: the batch.
            quantized: the same batch in the quantized model, if `routed` is in the original one.
        """
        for expert in range(self.experts.count):
            rows = shared = None
            if self.policy.gather == "routed" and expert not in self._short:
                rows = _tokens_of(routed.index, expert)
                if quantized is not None:
                    wanted = _tokens_of(quantized.index, expert)
                    rows = torch.unique(torch.cat([rows, wanted]))
                    shared = torch.searchsorted(rows, wanted)
            routed.rows.append(rows)
            routed.shared.append(shared)


def check_experts(block: Block, config: QuantizeConfig) -> None:
    """Refuses to quantize only some of a block's experts: no engine loads that.

    Raises:
        ConfigError: naming one expert of each kind.
    """
    for path in block.experts:
        names = [name for name in block.linears if name.startswith(f"{path}.")]
        skipped = {name: config.for_module(name) is None for name in names}
        if len({*skipped.values()}) > 1:
            kept, taken = (next(n for n in names if skipped[n] is side) for side in (True, False))
            raise ConfigError(
                f"{kept} is skipped and {taken} is not: quantize all experts of a block, or none"
            )


def expert_routings(
    block: Block, groups: Sequence[InputGroup], policy: ExpertCalibration
) -> list[ExpertRouting]:
    """One `ExpertRouting` per module of experts in a block, in the order in which they are reached."""
    routings = [ExpertRouting(name, m, groups, policy) for name, m in block.experts.items()]
    return sorted(routings, key=lambda routing: routing.first)


def _tokens_of(index: torch.Tensor, expert: int) -> torch.Tensor:
    """Numbers of the tokens whose choices `index` [tokens, k] include an expert."""
    return (index == expert).any(-1).nonzero()[:, 0]
