"""State inputs: what a compiled graph takes besides the model's own inputs.

A sparse graph reads and writes state that Dynamo did not capture. The state arrives as extra
inputs after all others. Only this file defines their order:

    the graph's own inputs, telemetry table, memories, keep counts, choice of samples
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
        table: telemetry table that the backward writes, float32 [slots, 3]; None without telemetry.
        memories: what the last backward left out, one per call of a layer; empty without memory.
        keep_counts: the runtime sparsity tensor, int64 [slots]; None if keep counts are constants.
        choice: numbers of the choice of samples and of the call, int64 [2]; None if the batch stays
            whole.

    Examples:
        >>> layout = StateInputs(table="table", keep_counts="counts")
        >>> layout.pack()
        ['table', 'counts']
        >>> layout.split(["x", "weight", "a", "b"])
        (['x', 'weight'], StateInputs(table='a', memories=(), keep_counts='b', choice=None))
    """

    table: T | None = None
    memories: tuple[T, ...] = ()
    keep_counts: T | None = None
    choice: T | None = None

    def pack(self) -> list[T]:
        """Return the state inputs in the order in which a graph takes them."""
        table = [] if self.table is None else [self.table]
        keep_counts = [] if self.keep_counts is None else [self.keep_counts]
        choice = [] if self.choice is None else [self.choice]
        return [*table, *self.memories, *keep_counts, *choice]

    def split(self, inputs: Sequence[U]) -> tuple[list[U], "StateInputs[U]"]:
        """Split a graph's inputs into its own inputs and state inputs laid out like these.

        Args:
            inputs: all inputs of the graph, in order; at least as many as `pack()` returns.

        Raises:
            ValueError: there are too few inputs.
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
        choice = None if self.choice is None else next(rest)
        return list(inputs[:own]), StateInputs(table, memories, keep_counts, choice)
