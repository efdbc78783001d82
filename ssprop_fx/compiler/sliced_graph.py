"""SlicedBackward: a compiled backward that runs on the kept samples."""

from collections.abc import Callable, Sequence
from typing import Any

import sympy
from ssprop_passes.graph.batch_dims import BatchDim
from ssprop_passes.selection.samples import scatter_samples
from ssprop_passes.transforms.sliced_backward import SlicedInputs, slice_backward
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
        compile_graph: compiles a graph for example inputs.
        gm: the backward, as the partitioner made it.
        inputs: its example inputs.
        batch: the symbol of the batch size.
    """
    found = slice_backward(gm, inputs, batch)
    if found is None:
        return compile_graph(gm, list(inputs))
    examples, how = found
    return SlicedBackward(compile_graph(gm, examples), how)


class SlicedBackward:
    """A compiled backward of the kept samples, called like the backward of the whole batch.

    Args:
        compiled: takes the inputs, the batch size and the kept samples, as one list.
        how: which inputs and results depend on the batch.
    """

    def __init__(self, compiled: Callable[..., Any], how: SlicedInputs) -> None:
        self._compiled = compiled
        self._how = how
        # AOTAutograd passes one list, which the callee empties: it frees saved tensors early. An
        # attribute of the instance, because torch's wrappers copy those alone.
        self._boxed_call = True

    def __call__(self, args: list[Any]) -> Any:
        """Run the backward.

        Args:
            args: inputs of the whole backward; the list is emptied.
        """
        how = self._how
        choice = SampleChoice.find(args[how.choice])
        if choice.indices is None:
            tangents = [args[i] for i in how.tangents]
            dims = [position.dim for position in how.tangents.values()]
            for i, tangent in zip(how.tangents, choice.make(tangents, dims), strict=True):
                args[i] = tangent
        indices, size = choice.indices, choice.size
        assert indices is not None
        for i in how.sizes:
            args[i] = args[i] // size * choice.kept
        args += [size, indices]
        results = self._compiled(args)
        if not how.scattered:
            return results
        return [
            self._whole(result, indices, size, how.scattered[i]) if i in how.scattered else result
            for i, result in enumerate(results)
        ]

    @staticmethod
    def _whole(rows: Tensor, indices: Tensor, size: int, position: BatchDim) -> Tensor:
        whole = position.inner * position.outer
        inner = (
            int(position.inner)
            if position.inner.is_Integer
            else (rows.shape[position.dim] // len(indices))
        )
        assert position.inner.is_Integer or whole == position.inner
        return scatter_samples(rows, indices, size, position.dim, inner)
