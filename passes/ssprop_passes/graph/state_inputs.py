"""State inputs: what a compiled graph takes besides the model's own inputs.

A sparse graph reads and writes state that Dynamo has not captured. It arrives as further inputs,
after all others, in one order that is written down here and nowhere else:

    the graph's own inputs, telemetry table, memories, keep counts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["StateInputs"]

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class StateInputs(Generic[T]):
    """The state inputs of one graph: tensors, graph nodes, or anything that stands for them.

    Attributes:
        table: what the backward reports of its sites, float32 [slots, 3]; None without telemetry.
        memories: what the last backward left out, one a call of a layer; empty without memory.
        keep_counts: the runtime sparsity tensor, int64 [slots]; None where keep counts are
            constants.

    Examples:
        >>> layout = StateInputs(table="table", keep_counts="counts")
        >>> layout.pack()
        ['table', 'counts']
        >>> layout.split(["x", "weight", "a", "b"])
        (['x', 'weight'], StateInputs(table='a', memories=(), keep_counts='b'))
    """

    table: T | None = None
    memories: tuple[T, ...] = ()
    keep_counts: T | None = None

    def pack(self) -> list[T]:
        """Return them in the order in which a graph takes them."""
        table = [] if self.table is None else [self.table]
        keep_counts = [] if self.keep_counts is None else [self.keep_counts]
        return [*table, *self.memories, *keep_counts]

    def split(self, inputs: Sequence[U]) -> tuple[list[U], "StateInputs[U]"]:
        """Split a graph's inputs into its own and state inputs of the same form as these.

        Args:
            inputs: all inputs of the graph, in order; at least as many as `pack()` returns.

        Raises:
            ValueError: there are fewer inputs.
        """
        own = len(inputs) - len(self.pack())
        if own < 0:
            raise ValueError(
                f"inputs must end with {len(self.pack())} state inputs, got {len(inputs)} in all"
            )
        rest = iter(inputs[own:])
        table = None if self.table is None else next(rest)
        memories = tuple(next(rest) for _ in self.memories)
        keep_counts = None if self.keep_counts is None else next(rest)
        return list(inputs[:own]), StateInputs(table, memories, keep_counts)
