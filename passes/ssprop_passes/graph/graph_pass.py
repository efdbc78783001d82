"""GraphPass: what all passes on the joint graph share: identity, guards, lint, log, loud failure.

Private torch: `CustomGraphPass`, and that the cache needs a truthy uuid.
"""

import hashlib
import logging
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.pattern_matcher import stable_topological_sort

from ssprop_passes.errors import SsPropCompileError
from ssprop_passes.fingerprint import sources_hash

__all__ = ["GraphPass", "PassList", "PassSummary", "is_joint_graph"]

logger = logging.getLogger(__name__)


@dataclass
class PassSummary:
    """What one run of a pass did to a graph.

    Attributes:
        matched: number of nodes, or groups of nodes, that the pass recognised.
        rewritten: number of these that it rewrote.
        left: reason -> number of these that it left unchanged.
    """

    matched: int = 0
    rewritten: int = 0
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Return a line such as `21 matched, 20 rewritten, 1 left dense (the classifier: 1)`."""
        text = f"{self.matched} matched, {self.rewritten} rewritten"
        if not self.left:
            return text
        reasons = "; ".join(f"{reason}: {count}" for reason, count in self.left.most_common())
        return f"{text}, {self.left.total()} left dense ({reasons})"


class GraphPass(CustomGraphPass):
    """A transformation of the AOTAutograd joint graph.

    Subclasses implement `transform` and `identity`. An instance serves one compilation. Each run is
    logged at level INFO.

    Attributes:
        ran: whether the pass saw a joint graph; False after a hit in the compile cache.
        summary: what the last run did.
    """

    def __init__(self) -> None:
        self.ran = False
        self.summary = PassSummary()

    @abstractmethod
    def transform(self, graph: fx.Graph) -> PassSummary:
        """Rewrite a joint graph in place; return what was done."""

    @abstractmethod
    def identity(self) -> str | None:
        """Return a text of what the rewrite depends on besides the graph and our sources.

        None if no text can identify it.
        """

    def __call__(self, graph: fx.Graph) -> None:
        """Transform a joint graph; leave other graphs unchanged."""
        if not is_joint_graph(graph):
            return
        self.ran = True
        start = time.perf_counter()
        name = type(self).__name__
        try:
            self.summary = self.transform(graph)
            # A replacement may come after a user of the node it replaces.
            stable_topological_sort(graph)
            graph.lint()
        except Exception as error:
            raise SsPropCompileError(f"{name} failed on the joint graph: {error}") from error
        logger.info("%s: %s, %.0f ms", name, self.summary, 1e3 * (time.perf_counter() - start))

    def uuid(self) -> str | None:
        """Return the cache identity; None turns the caches off."""
        identity = self.identity()
        if identity is None:
            return None
        return _digest(type(self).__name__, sources_hash(), identity)


class PassList(CustomGraphPass):
    """Several passes as one, run in order.

    Args:
        passes: the passes. Plain functions of a graph also work, but have no cache identity.
    """

    def __init__(self, passes: Sequence[Callable[[fx.Graph], None]]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        """Run all passes on a graph."""
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> str | None:
        """Return the cache identity, None if any pass has none; None turns the caches off."""
        ids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return _digest(*map(str, ids)) if all(ids) else None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_joint_graph(graph: fx.Graph) -> bool:
    """Say whether a graph has a backward, that is, takes gradients of outputs ("tangents")."""
    return any("tangents" in str(n.target) for n in graph.find_nodes(op="placeholder"))
