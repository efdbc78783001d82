"""Tripwire: checks whether the sparse step that has just run was sparse in every layer.

Dynamo silently runs eagerly, and so dense, whatever it does not compile. The tripwire reports it.
"""

from collections.abc import Collection
from dataclasses import dataclass

from ssprop_passes.sites.match import UNKNOWN

from ssprop_fx.compiler.backend import SparseBackend
from ssprop_fx.compiler.site_cache import GraphRecord
from ssprop_fx.compiler.slots import COMPLEX

__all__ = ["Problem", "Tripwire", "why_no_layer"]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a step.

    Attributes:
        kind: identifies the problem; equal each time it occurs.
        message: the warning for the user.
    """

    kind: str
    message: str


class Tripwire:
    """Checks the steps of a model by the graphs that ran in them.

    Args:
        backend: the backend that compiles the graphs.
    """

    def __init__(self, backend: SparseBackend) -> None:
        self._backend = backend
        self._runs: dict[int, int] = {}
        self._judged: dict[tuple[int, frozenset[int]], list[Problem]] = {}

    def start(self) -> None:
        """Begin a step: graphs that ran before do not count for it."""
        self._runs = {id(graph): graph.runs for graph in self._backend.graphs}

    @property
    def ran(self) -> list[GraphRecord]:
        """The graphs that have run in this step."""
        graphs = self._backend.graphs
        return [graph for graph in graphs if graph.runs != self._runs.get(id(graph), 0)]

    def problems(self) -> list[Problem]:
        """Return what is wrong with a sparse step that ends now."""
        graphs, ran = self._backend.graphs, self.ran
        # Ids are safe keys, because graphs live as long as the backend. Most steps are alike.
        key = len(graphs), frozenset(map(id, ran))
        if key not in self._judged:
            self._judged[key] = _judge(self._backend, graphs, ran)
        return self._judged[key]


def _judge(
    backend: SparseBackend, graphs: list[GraphRecord], ran: list[GraphRecord]
) -> list[Problem]:
    whole = [graph.whole for graph in ran if graph.whole]
    if whole:
        message = (
            f"{len(whole)} of the model's {len(ran)} compiled graphs cannot run on the kept samples"
            f" alone, so their backward is of the whole batch: {'; '.join(dict.fromkeys(whole))}."
        )
        return [Problem(f"whole {whole}", message)]
    if not any(graph.is_sparse for graph in ran):
        return [_why_dense(graphs)]
    present = {site.name for graph in ran for site in graph.sites}
    known = [site.name for graph in graphs for site in graph.sites if not site.reason]
    lost = [name for name in dict.fromkeys(known) if name not in present]
    refused = {
        site.name: site.reason
        for graph in ran
        for site in graph.sites
        if site.reason in (UNKNOWN, COMPLEX)
    }
    problems = []
    if backend.config.patch > 1 and not any(graph.patched for graph in ran):
        message = (
            f"patch={backend.config.patch} has no effect: no 1x1 convolution of stride 1 has more"
            " positions than a patch."
        )
        problems.append(Problem("patch", message))
    if missing := backend.missing:
        message = (
            f"{_layers(missing)} in no sparse graph and so dense: {', '.join(missing)}. Either the"
            " model does not use what is named, or Dynamo runs it eagerly or in the compiled code"
            " of a layer that does not take part: TORCH_LOGS=graph_breaks shows graph breaks, and"
            " fullgraph=True makes them an error."
        )
        problems.append(Problem(f"missing {missing}", message))
    elif lost:
        message = (
            f"{_layers(lost)} sparse in other steps but in no sparse graph in this step:"
            f" {', '.join(lost)}. Either the model did not use what is named, or Dynamo ran it"
            " eagerly and it trained dense: see torch._dynamo.config.recompile_limit and"
            " TORCH_LOGS=recompiles."
        )
        problems.append(Problem(f"lost {lost}", message))
    if refused:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in refused.items())
        message = f"{_layers(refused)} compiled but dense: {reasons}."
        problems.append(Problem(f"refused {list(refused)}", message))
    return problems


def _layers(names: Collection[str]) -> str:
    return "1 layer is" if len(names) == 1 else f"{len(names)} layers are"


def _why_dense(graphs: list[GraphRecord]) -> Problem:
    sites = [site for graph in graphs for site in graph.sites]
    if not graphs or any(not site.reason for site in sites):
        message = (
            "the drop rate is above 0, but no sparse graph ran, so this step trained dense. Likely"
            " causes: Dynamo's recompile limit was hit (see torch._dynamo.config.recompile_limit;"
            " drop_last=True avoids the recompile of a short last batch), compilation is disabled"
            " (torch.compiler.set_stance, TORCHDYNAMO_DISABLE), or an active dispatch mode, such"
            " as FlopCounterMode, makes Dynamo run eagerly."
        )
        return Problem("dense", message)
    reasons = sorted({site.reason for site in sites}) or ["it has no backward"]
    if len(reasons) > 4:
        reasons[4:] = [f"and {len(reasons) - 4} other reasons, see report(model)"]
    message = f"no site of the model was made sparse, so it trains dense: {'; '.join(reasons)}."
    return Problem("no site", message)


def why_no_layer(excluded: dict[str, str]) -> Problem:
    """Return the problem of a model without a participating layer.

    Args:
        excluded: name of each layer -> why it does not take part.
    """
    reasons = sorted(set(excluded.values())) or ["it has no convolution and no linear layer"]
    message = (
        "no layer of the model takes part in sparse back-propagation, so it trains dense:"
        f" {'; '.join(reasons)}. See SparsityConfig(min_channels=..., filter_fn=...)."
    )
    return Problem("no layer", message)
