"""GraphPass: what every pass on the joint graph shares: identity, guards, lint, log, loud failure.

Private torch: `CustomGraphPass` and the cache's demand for a truthy uuid.
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
        matched: nodes, or groups of nodes, that the pass looks for.
        rewritten: how many of them it rewrote.
        left: reason -> how many of the others it left as they are.
    """

    matched: int = 0
    rewritten: int = 0
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Such as `21 matched, 20 rewritten, 1 left dense (the classifier: 1)`."""
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
        """Return what the rewrite depends on besides the graph and this package's sources.

        None where that cannot be told in words.
        """

    def __call__(self, graph: fx.Graph) -> None:
        """Transform a graph that has a backward; leave others as they are."""
        if not is_joint_graph(graph):
            return
        self.ran = True
        start = time.perf_counter()
        name = type(self).__name__
        try:
            self.summary = self.transform(graph)
            # A replacement may stand after a user of what it replaces.
            stable_topological_sort(graph)
            graph.lint()
        except Exception as error:
            raise SsPropCompileError(f"{name} failed on the joint graph: {error}") from error
        logger.info("%s: %s, %.0f ms", name, self.summary, 1e3 * (time.perf_counter() - start))

    def uuid(self) -> str | None:
        """Return the cache identity; None, which turns the caches off, if the pass has none."""
        identity = self.identity()
        if identity is None:
            return None
        return _digest(type(self).__name__, sources_hash(), identity)


class PassList(CustomGraphPass):
    """Several passes as one, run in order.

    Args:
        passes: the passes; functions of a graph as well, which have no cache identity.
    """

    def __init__(self, passes: Sequence[Callable[[fx.Graph], None]]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        """Run all passes on a graph."""
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> str | None:
        """Return the cache identity; None, which turns the caches off, if a pass has none."""
        ids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return _digest(*map(str, ids)) if all(ids) else None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_joint_graph(graph: fx.Graph) -> bool:
    """Say whether a graph holds a backward: it takes gradients of outputs ("tangents")."""
    return any("tangents" in str(n.target) for n in graph.find_nodes(op="placeholder"))
