"""What a module costs a device: bytes on the wire, FLOPs, training memory (paper section 5.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce

from rich.table import Table

from eclm_flower.modular.selection import Selection

#: What a budget limits.
RESOURCES = ("communication_bytes", "computation_flops", "memory_bytes")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a part of a model, or a budget's worth of it.

    Attributes
    ----------
    communication_bytes : float
        Bytes of one transfer, one way, framing included.
    computation_flops : float
        FLOPs of a training step (forward and backward) for one sample.
    memory_bytes : float
        Peak bytes while training: parameters, gradients, one optimiser state (momentum) and the
        activations kept for the backward pass of one batch. All at once, as in a loop that calls
        ``zero_grad`` between forward and backward; one that calls it first needs less.
    forward_flops : float
        FLOPs of inference for one sample; no budget limits them.
    """

    communication_bytes: float
    computation_flops: float
    memory_bytes: float
    forward_flops: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)}
        )

    def __mul__(self, factor: float) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) * factor for f in fields(Cost)})


@dataclass(frozen=True)
class CostTable:
    """Cost of the shared part and of one module of each layer; modules of a layer cost the same.

    Attributes
    ----------
    shared : Cost
        What every device pays: stem, skips, norms that span modules, head.
    per_module : dict[str, Cost]
        Layer name -> cost of one of its modules.
    modules : dict[str, int]
        Layer name -> number of modules N.
    batch_size : int (default: 16)
        Samples of a batch in `memory_bytes`.
    framing_bytes : int (default: 0)
        What of the shared part's `communication_bytes` the transport adds.
    """

    shared: Cost
    per_module: Mapping[str, Cost]
    modules: Mapping[str, int]
    batch_size: int = 16
    framing_bytes: int = 0

    def of(self, selection: Selection) -> Cost:
        """Cost of the sub-model of a selection."""
        return reduce(
            Cost.__add__,
            (self.per_module[name] * len(numbers) for name, numbers in selection.items()),
            self.shared,
        )

    def sent_at(self, bytes_per_value: float) -> CostTable:
        """Return the costs if every value, float32 before, took so many bytes of a transfer."""
        factor = bytes_per_value / 4

        def cheaper(cost: Cost, framing: int) -> Cost:
            sent = framing + (cost.communication_bytes - framing) * factor
            return replace(cost, communication_bytes=sent)

        per_module = {name: cheaper(cost, 0) for name, cost in self.per_module.items()}
        return replace(self, shared=cheaper(self.shared, self.framing_bytes), per_module=per_module)

    @property
    def least_share(self) -> float:
        """Smallest share of the modules that pays for one in every layer, rounding included."""
        return (1 + 1e-9) * max(1 / number for number in self.modules.values())

    @property
    def whole(self) -> Cost:
        """Cost of the whole cloud model."""
        return self.of({name: range(number) for name, number in self.modules.items()})

    def __rich__(self) -> Table:
        """Show it: ``rich.print(model.costs)``."""
        rows = [((name, str(self.modules[name])), cost) for name, cost in self.per_module.items()]
        return cost_table(
            ("one module of", "modules"),
            [*rows, (("shared part", ""), self.shared), (("whole model", ""), self.whole)],
        )


def cost_table(about: Sequence[str], rows: Iterable[tuple[Sequence[str], Cost]]) -> Table:
    """Lay out some costs.

    Parameters
    ----------
    about : sequence of str
        Headings of the columns that say what a row is about.
    rows : iterable of (sequence of str, Cost)
        Those columns' cells, and the cost.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, heading in enumerate(about):
        table.add_column(heading, justify="right" if number else "left")
    for heading in ("MB to send", "forward MFLOP", "training MFLOP", "training MB"):
        table.add_column(heading, justify="right")
    for cells, cost in rows:
        numbers = (
            cost.communication_bytes,
            cost.forward_flops,
            cost.computation_flops,
            cost.memory_bytes,
        )
        table.add_row(*cells, *(f"{number / 1e6:,.3f}" for number in numbers))
    return table
