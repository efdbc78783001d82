"""SlicedBackward: a compiled backward that runs on the kept samples."""

from collections.abc import Callable, Sequence
from typing import Any

import sympy
from ssprop_passes.errors import SsPropCompileError
from ssprop_passes.graph.batch_dim import BatchDim
from ssprop_passes.selection.samples import reaches_others, scatter_samples
from ssprop_passes.transforms.sliced_backward import SlicedGraph, slice_backward
from torch import Tensor, fx

from ssprop_fx.compiler.sample_choice import SampleChoice

__all__ = ["SlicedBackward", "compile_sliced"]


def compile_sliced(
    compile_graph: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]],
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    batch: sympy.Symbol,
) -> Callable[..., Any]:
    """Compile a backward graph for the kept samples; as it is if it has no marker.

    Args:
        compile_graph: compiles a graph for example inputs. What it returns takes one list.
        gm: the backward, as the partitioner made it.
        inputs: its example inputs.
        batch: the symbol of the batch size.
    """
    sliced = slice_backward(gm, inputs, batch)
    if sliced is None:
        return compile_graph(gm, list(inputs))
    head = None if sliced.head is None else compile_graph(sliced.head, list(inputs))
    return SlicedBackward(head, compile_graph(gm, sliced.examples), sliced)


class SlicedBackward:
    """A compiled backward of the kept samples, called like the backward of the whole batch.

    Args:
        head: the compiled head of the graph; None if it has none.
        compiled: the compiled graph.
        graph: how to call it.
    """

    def __init__(
        self, head: Callable[..., Any] | None, compiled: Callable[..., Any], graph: SlicedGraph
    ) -> None:
        self._head = head
        self._compiled = compiled
        self._graph = graph
        # AOTAutograd passes one list, which the callee empties: it frees saved tensors early. An
        # attribute of the instance, because torch's wrappers copy those alone.
        self._boxed_call = True

    def __call__(self, args: list[Any]) -> Any:
        """Run the backward.

        Args:
            args: inputs of the whole backward; the list is emptied.

        Raises:
            SsPropCompileError: another graph has chosen the samples, and a gradient of samples that
                it left out reaches this one.
        """
        graph = self._graph
        choice, call = SampleChoice.find(args[graph.choice])
        if self._head is not None:
            args.extend(self._head(list(args)))
        gradients = [args[i] for i in graph.gradients]
        places = [
            (position.dim, _inner(gradient, position, choice.size))
            for gradient, position in zip(gradients, graph.gradients.values(), strict=True)
        ]
        # A second backward through the graph that chose, with `retain_graph`, chooses again.
        if choice.indices is None or choice.maker == call:
            made = choice.make(gradients, places, call)
            for i, gradient in zip(graph.gradients, made, strict=True):
                args[i] = gradient
        elif any(
            reaches_others(gradient, choice.indices, choice.size, *place)
            for gradient, place in zip(gradients, places, strict=True)
        ):
            raise SsPropCompileError(
                "a graph of the model gets a gradient of samples that later graphs have left out:"
                " the loss reads a tensor from before a graph break, or the code at the break mixes"
                ' samples. Remove the graph break, or use axis="channel"'
            )
        indices, size = choice.indices, choice.size
        assert indices is not None
        for i in graph.sizes:
            args[i] = args[i] // size * choice.kept
        args += [size, indices]
        results = list(self._compiled(args))
        for i, position in graph.scattered.items():
            inner = _inner(results[i], position, choice.kept)
            results[i] = scatter_samples(results[i], indices, size, position.dim, inner)
        return results


def _inner(x: Tensor, position: BatchDim, samples: int) -> int:
    """Return `inner` of a tensor with this many samples; the expression may have other symbols."""
    if position.inner.is_Integer:
        return int(position.inner)
    return x.shape[position.dim] // samples // int(position.outer)
