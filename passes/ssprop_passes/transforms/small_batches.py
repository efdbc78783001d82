"""keep_onednn: 1x1 convolutions of a few samples stay with oneDNN on one thread.

ATen computes a float32 1x1 convolution by its own code if it has fewer than 16 images and one
thread, and that code is slower on large images. It does not if the convolution is dilated, and
dilation does not change a 1x1 convolution.
"""

from typing import Any, cast

import torch
from torch import fx

__all__ = ["keep_onednn"]

aten = torch.ops.aten

# With fewer positions ATen's own code is as fast for a few images.
_FEWEST_POSITIONS = 100

# Position of the first of input, weight, and of the dilation, among the arguments.
_CONVOLUTIONS = {aten.convolution.default: (0, 5), aten.convolution_backward.default: (1, 6)}


def keep_onednn(graph: fx.Graph) -> int:
    """Give 1x1 convolutions on a CPU a dilation of 2, in place; return how many.

    Args:
        graph: a graph whose batch may be smaller than 16.
    """
    count = 0
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return count
    for target, (first, position) in _CONVOLUTIONS.items():
        for node in graph.find_nodes(op="call_function", target=target):
            if _may_leave_onednn(node, first):
                args = list(node.args)
                args[position] = [2, 2]
                node.args = tuple(args)
                count += 1
    return count


def _may_leave_onednn(node: fx.Node, first: int) -> bool:
    input_, weight = (cast(fx.Node, node.args[i]).meta["val"] for i in (first, first + 1))
    stride, padding, dilation, transposed, _, groups = cast(Any, node.args[first + 3 : first + 9])
    space = input_.shape[2:]
    return bool(
        input_.device.type == "cpu"
        and input_.dtype == torch.float32
        and tuple(weight.shape[2:]) == (1, 1)
        and (tuple(stride), tuple(padding), tuple(dilation)) == ((1, 1), (0, 0), (1, 1))
        and not transposed
        and groups == 1
        and all(isinstance(size, int) for size in space)
        and space[0] * space[1] >= _FEWEST_POSITIONS
    )
