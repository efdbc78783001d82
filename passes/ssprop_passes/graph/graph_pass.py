"""GraphPass: what every pass on the joint graph shares: identity, guards, lint, loud failure.

Private torch: `CustomGraphPass` and the cache's demand for a truthy uuid.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.pattern_matcher import stable_topological_sort

from ssprop_passes.errors import SsPropCompileError
from ssprop_passes.fingerprint import sources_hash

__all__ = ["GraphPass", "Previous"]

# What may already sit in `torch._inductor.config.joint_custom_pre_pass`.
Previous = Callable[[fx.Graph], None] | Sequence[Callable[[fx.Graph], None]] | None


class GraphPass(CustomGraphPass):
    """A transformation of the AOTAutograd joint graph.

    Subclasses implement `transform` and `identity`. An instance serves one compilation.

    Args:
        previous: pass or passes that run first, such as one that the user put in
            `torch._inductor.config.joint_custom_pre_pass`.

    Attributes:
        ran: whether the pass saw a joint graph; False after a hit in the compile cache.
    """

    def __init__(self, previous: "Previous" = None) -> None:
        passes = previous if isinstance(previous, (list, tuple)) else (previous,)
        self.previous = tuple(p for p in passes if p is not None)
        self.ran = False

    @abstractmethod
    def transform(self, graph: fx.Graph) -> None:
        """Rewrite a joint graph in place."""

    @abstractmethod
    def identity(self) -> str | None:
        """Return what the rewrite depends on besides the graph and this package's sources.

        None where that cannot be told in words.
        """

    def __call__(self, graph: fx.Graph) -> None:
        """Run the previous passes, then transform a graph that has a backward."""
        for previous in self.previous:
            previous(graph)
        if not is_joint_graph(graph):
            return
        self.ran = True
        try:
            self.transform(graph)
            # A replacement may stand after a user of what it replaces.
            stable_topological_sort(graph)
            graph.lint()
        except Exception as error:
            raise SsPropCompileError(
                f"{type(self).__name__} failed on the joint graph: {error}"
            ) from error

    def uuid(self) -> str | None:
        """Return the cache identity.

        None, which turns the caches off, if this pass or a previous one has none.
        """
        previous = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.previous]
        identity = self.identity()
        if identity is None or not all(previous):
            return None
        parts = (type(self).__name__, sources_hash(), identity, repr(previous))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_joint_graph(graph: fx.Graph) -> bool:
    """Say whether a graph holds a backward: it takes gradients of outputs ("tangents")."""
    return any("tangents" in str(n.target) for n in graph.find_nodes(op="placeholder"))
