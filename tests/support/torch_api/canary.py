"""A canary: a check of what the packages rely on in torch."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

__all__ = ["CANARIES", "Canary", "explanation", "find", "relies_on"]


@dataclass(frozen=True)
class Canary:
    """A check of private names, and a text of what the packages rely on."""

    names: tuple[str, ...]
    relied_on: str
    check: Callable[[], None]


CANARIES: list[Canary] = []


def relies_on(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(check: Callable[[], None]) -> Callable[[], None]:
        CANARIES.append(Canary(names, inspect.cleandoc(check.__doc__ or ""), check))
        return check

    return register


def explanation(canary: Canary, users: Sequence[str]) -> str:
    return (
        f"torch {torch.__version__} has changed {', '.join(canary.names)}."
        f" {', '.join(users)} rely on this: {' '.join(canary.relied_on.split())}"
    )


def find(graph: fx.Graph, target: object) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=target)
