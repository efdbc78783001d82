"""SampleAxis: rewrites the sites of a joint graph to keep the same samples, chosen once.

`ssprop_passes.selection.samples` is the plain torch part; this file handles the graph. The first
site that is rewritten, nearest the loss, chooses the samples. The nodes of its choice are inputs of
every other site's replacement.
"""

from typing import Any, cast

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ssprop_passes.graph.rewrite import Replacer
from ssprop_passes.selection.gather_scatter import dims_order, with_order
from ssprop_passes.selection.policy import Selection
from ssprop_passes.selection.samples import Samples, choose_samples
from ssprop_passes.sites.flops import size_hint
from ssprop_passes.sites.match import SiteMatch
from ssprop_passes.transforms.keep_count_input import read_keep_count

__all__ = ["SAMPLES_KEY", "SampleAxis"]

# Key in `node.meta["custom"]`, which AOTAutograd copies from a forward node to its backward
# nodes. The value is "" if the samples are consecutive in the leading dimension of the layer's
# input, else the reason why this is not known.
SAMPLES_KEY = "ssprop_samples"


class SampleAxis:
    """Replaces the sites of one joint graph with backwards of shared samples.

    Args:
        batch_size: number of samples in the batch, N; may be a SymInt.
        selection: how samples are chosen.
        replacer: inserts the choice and the sites' backwards into the graph.
    """

    def __init__(
        self,
        batch_size: int,
        selection: Selection,
        replacer: Replacer,
    ) -> None:
        self.batch_size = batch_size
        self.selection = selection
        self._replacer = replacer
        self._chosen: tuple[fx.Node, ...] = ()

    @property
    def typical_batch_size(self) -> int:
        """Batch size that the graph is compiled with."""
        return size_hint(self.batch_size)

    def why_dense(self, match: SiteMatch) -> str:
        """Return why a site cannot keep samples, "" if it can."""
        unknown = "no convolution or linear call gives its output, so its samples are not known"
        reason: str = (match.node.meta.get("custom") or {}).get(SAMPLES_KEY, unknown)
        if not reason and not self._rows_maybe(match):
            return "how many rows a sample has in its input changes from call to call"
        return reason

    def rewrite(self, match: SiteMatch, keep_counts: fx.Node, slot: int) -> None:
        """Compute the gradients of a site from the samples that all sites share.

        Args:
            match: the site.
            keep_counts: the runtime sparsity tensor.
            slot: slot of the site's layer; the first site's holds the number of samples to keep.
        """
        rows = self._rows_maybe(match)
        assert rows
        if not self._chosen:
            self._choose(match, keep_counts, slot, rows)
        orders = [None if dense is None else dims_order(dense) for dense in match.dense_gradients]

        def replacement(*tensors: Tensor) -> Any:
            chosen = tensors[len(match.inputs) :]
            weights = chosen[1] if len(chosen) > 1 else None
            samples = Samples.of_rows(chosen[0], weights, rows)
            gradients = match.backward_of_samples(
                samples, self.selection, *tensors[: len(match.inputs)]
            )
            # Views that follow in the graph may need the layout of the dense gradient.
            return tuple(
                gradient if gradient is None or order is None else with_order(gradient, order)
                for gradient, order in zip(gradients, orders, strict=True)
            )

        inputs = [*match.inputs, *self._chosen]
        match.replace(self._replacer.insert(match.node, replacement, inputs))

    def _choose(self, match: SiteMatch, keep_counts: fx.Node, slot: int, rows: int) -> None:
        def choice(keep_counts: Tensor, grad_output: Tensor, input_: Tensor) -> tuple[Tensor, ...]:
            k = read_keep_count(keep_counts, slot, grad_output.shape[0] // rows)
            indices, weights = choose_samples(self.selection, grad_output, input_, k, rows)
            return (indices,) if weights is None else (indices, weights)

        chosen = self._replacer.insert(match.node, choice, [keep_counts, *match.inputs[:2]])
        self._chosen = cast(tuple[fx.Node, ...], chosen)

    def _rows_maybe(self, match: SiteMatch) -> int:
        """Return how many rows of grad_output each sample has, 0 if that is not known."""
        leading = match.inputs[0].meta["val"].shape[0]
        rows = size_hint(leading) // self.typical_batch_size
        return rows if statically_known_true(leading == rows * self.batch_size) else 0
