"""Which calibration tokens pass which expert of a mixture, and how many its router sent there.

With `routed`, an expert's Hessian is that of the tokens the router chose it for; an expert that fewer
than a minimum of tokens reach is given all of them instead, and that is recorded. With `all`, every
token passes every expert while Hessians are summed up. What the model computes is the same either way.

The original model's router may choose otherwise than the quantized one's. Where both are compared, the
original's experts are fed with the tokens that the quantized model chose, besides their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from roundwise.config import Experts, QuantizeConfig
from roundwise.errors import ConfigError
from roundwise.forward.input_groups import InputGroup
from roundwise.model.blocks import Block
from roundwise.model.moe import LinearExperts, Visits
from roundwise.system.distributed import Ranks


@dataclass(frozen=True)
class ExpertCalibration:
    """Which tokens an expert's Hessian is made from."""

    gather: Experts = "routed"
    minimum: int = 0
    """With `routed`: an expert with fewer tokens is given all."""


@dataclass
class RoutedBatch:
    """The tokens of one batch on their way through one module of experts."""

    index: torch.Tensor
    """The router's choice [tokens, k]."""
    rows: list[torch.Tensor | None] = field(default_factory=list)
    """By expert, the tokens that pass it; None: all."""
    shared: list[torch.Tensor | None] = field(default_factory=list)
    """Of an original player: where among them those stand that its twin's router chose; None: all."""

    def visits(self) -> Visits:
        """All experts in order, some with no token, so that batches stay abreast."""
        return list(enumerate(self.rows))


class ExpertRouting:
    """One module of experts, while a block is played.

    Args:
        name: of the module.
        experts: the module.
        groups: of the block.
        policy: which tokens count.
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
            paths[experts.layer(expert, role)]: expert for expert, role in experts.places()
        }
        self.first = next(
            (i for i, group in enumerate(groups) if self.expert_of.keys() & set(group.names)),
            len(groups),
        )
        """Number of the first group that reads what the router sent here."""
        self.tokens = torch.zeros(experts.count, dtype=torch.int64)
        """By expert, how many tokens the router chose it for; padding does not count."""
        self._total = 0
        self._joined = False
        self._short: set[int] = set()

    def count(self, index: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Counts a batch's choices."""
        chosen = index if mask is None else index[mask.reshape(-1)]
        self._total += len(chosen)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.tokens))
        self.tokens += counts[: len(self.tokens)].to(self.tokens.device)

    def join(self, ranks: Ranks) -> None:
        """Makes the counts those of all ranks, once their batches are counted."""
        if not self._joined:
            ranks.sum(self.tokens)
            self._total = int(ranks.sum(torch.tensor([self._total])))
            self._joined = True

    def decide(self, groups: Sequence[InputGroup], ranks: Ranks) -> None:
        """Settles, once all batches are counted, which experts are given all tokens."""
        if self.policy.gather == "all":
            return
        self.join(ranks)
        self._short = {e for e, n in enumerate(self.tokens.tolist()) if n < self.policy.minimum}
        for group in groups:
            for expert in {self.expert_of.get(name) for name in group.names} & self._short:
                group.fallback = (
                    f"{int(self.tokens[expert])} of {self._total} calibration tokens were routed to "
                    f"this expert, fewer than {self.policy.minimum}: its Hessian is that of all tokens"
                )

    def send(self, passing: RoutedBatch, reference: RoutedBatch | None) -> None:
        """Fills in which tokens pass; `reference`: of the quantized model, if `expert_tokens` is the original's."""
        for expert in range(self.experts.count):
            rows = shared = None
            if self.policy.gather == "routed" and expert not in self._short:
                rows = _chosen(passing.index, expert)
                if reference is not None:
                    wanted = _chosen(reference.index, expert)
                    rows = torch.unique(torch.cat([rows, wanted]))
                    shared = torch.searchsorted(rows, wanted)
            passing.rows.append(rows)
            passing.shared.append(shared)


def check_experts(block: Block, config: QuantizeConfig) -> None:
    """Refuses to quantize some of a block's experts and leave others, which nobody could load.

    Raises:
        ConfigError: naming one of each kind.
    """
    for path in block.experts:
        names = [name for name in block.linears if name.startswith(f"{path}.")]
        left = {name: config.for_module(name) is None for name in names}
        if len({*left.values()}) > 1:
            kept, taken = (next(n for n in names if left[n] is side) for side in (True, False))
            raise ConfigError(
                f"{kept} is left as it is, {taken} is not: experts of a block are quantized all or none"
            )


def expert_routings(
    block: Block, groups: Sequence[InputGroup], policy: ExpertCalibration
) -> list[ExpertRouting]:
    """One for each module of experts in a block, in the order in which they are reached."""
    found = [
        ExpertRouting(name, experts, groups, policy) for name, experts in block.experts.items()
    ]
    return sorted(found, key=lambda routing: routing.first)


def _chosen(index: torch.Tensor, expert: int) -> torch.Tensor:
    return (index == expert).any(-1).nonzero()[:, 0]
