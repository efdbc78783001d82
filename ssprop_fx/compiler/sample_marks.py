"""Samples: where a graph has its batch, and which layers' samples are known."""

from collections.abc import Sequence
from typing import Any

from ssprop_passes.sites.site import layer_name
from ssprop_passes.transforms.sample_axis import SAMPLES_KEY
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional

from ssprop_fx.compiler.backward_state import LAYER_CALLS

__all__ = ["find_batch_maybe", "mark_samples"]


def find_batch_maybe(
    gm: fx.GraphModule, example_inputs: Sequence[Any], model: nn.Module
) -> int | None:
    """Return the position of the input whose leading dimension is the batch.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        model: the model; its parameters and buffers are inputs as well, and not meant.

    Returns:
        That of the first tensor that has a dimension, None where there is none.
    """
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for position, value in enumerate(example_inputs):
        if isinstance(value, Tensor) and value.ndim and id(value) not in own:
            return position
    return None


def mark_samples(gm: fx.GraphModule, batch: int) -> None:
    """Write into the metadata of each layer's calls whether its rows can be told by sample.

    Args:
        gm: the graph that Dynamo captured; subgraphs are marked as well.
        batch: samples of the batch; may be a SymInt.
    """
    for graph_module in gm.modules():
        for node in graph_module.graph.nodes if isinstance(graph_module, fx.GraphModule) else ():
            value = node.meta.get("example_value")
            is_call = node.target in LAYER_CALLS and layer_name(node) is not None
            if is_call and isinstance(value, Tensor):
                reason = _why_unknown(node.target, value, batch)
                node.meta["custom"] = {**node.meta["custom"], SAMPLES_KEY: reason}


def _why_unknown(call: object, output: Tensor, batch: int) -> str:
    """Return why the samples of a call's output are not known, "" if they are.

    Args:
        call: the function called.
        output: its fake value; of the dimensions of the input but for the last, or for channels
            and space.
        batch: samples of the batch.
    """
    if call is functional.linear:
        outer = output.shape[:-1]
    else:
        spatial = next(n for n in (1, 2, 3) if f"{n}d" in getattr(call, "__name__", ""))
        outer = output.shape[: -1 - spatial]
    if not outer:
        return "it is called for a single sample"
    if statically_known_true(outer[0] == batch):
        return ""
    if any(statically_known_true(size == batch) for size in outer[1:]):
        return f"the batch of {batch} may be another dimension than the leading one of its input"
    if not statically_known_true(outer[0] % batch == 0):
        return (
            f"the leading dimension of its input, {outer[0]}, is not made of the batch of {batch}"
        )
    return ""
