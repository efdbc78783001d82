#!/usr/bin/env bash
# torch 2.14: in channels last, a compiled depthwise backward copies its operands twice.
#
# Inductor gives the operands of a convolution's backward the order of dimensions that the gradient
# of the weight has. A depthwise weight in channels last, [C, 1, 3, 3], has the strides
# (9, 1, 3, 1): two are 1, and Inductor takes the width, not the channels, as the innermost
# dimension. So it copies an input that is in channels last to the order [N, H, C, W], which nobody
# uses, and ATen copies that back. A 3x3 convolution that is not depthwise gets its operands as
# they are.
#
# Expected: strides (8192, 1, 512, 32) reach both backwards, those of channels last.
# Seen:     (8192, 1, 512, 32) reach that of the full one, (8192, 16, 512, 1) the depthwise one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/case.py" <<'PY'
import sys

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

seen = []


class Record(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.convolution_backward.default:
            seen.append(tuple(args[1].stride()))
        return op(*args, **(kwargs or {}))


print("torch", torch.__version__)
found = {}
for name, groups in (("full", 1), ("depthwise", 32)):
    torch._dynamo.reset()
    layers = nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=groups)
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    output = torch.compile(model)(x)
    seen.clear()
    with Record():
        output.sum().backward()
    # The last layer comes first.
    found[name] = seen[0]
    print(f"{name}: the backward gets an input with strides {seen[0]}")
expected = {"full": (8192, 1, 512, 32), "depthwise": (8192, 16, 512, 1)}
sys.exit(found != expected)
PY
"$folder/venv/bin/python" "$folder/case.py"
