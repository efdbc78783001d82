#!/usr/bin/env bash
# torch.compile on a CPU: a batch that was marked dynamic is compiled anew three samples later,
# because Inductor guards on the length of a reduction over it.
#
# Inductor sums up to 4096 values in another way than more of them, and asks which it is while it
# writes the code. A batch norm sums over batch and space, here 15 x 15 positions a sample: the code
# compiled at 16 samples holds for 225 * batch <= 4096, that is up to 18.
#
# Expected: one compile serves every batch size, as `maybe_mark_dynamic` asks for.
# Seen:     18 samples run in the code of 16; 19 compile again, with "225*s <= 4096" as the reason.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1
cat > "$folder/case.py" <<'PY'
import sys

import torch
from torch import nn
from torch._dynamo.utils import counters, guard_failures

torch.set_num_threads(1)
print("torch", torch.__version__)
model = nn.Sequential(
    nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2), nn.BatchNorm2d(64)
)
step = torch.compile(model)
graphs = {}
for batch in (16, 18, 19):
    x = torch.randn(batch, 3, 32, 32)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    step(x).square().sum().backward()
    graphs[batch] = counters["stats"]["unique_graphs"]
print("graphs compiled after batches of 16, 18 and 19:", *graphs.values())
reasons = [str(reason) for found in guard_failures.values() for reason in found]
print("reasons:", *reasons, sep="\n  ")
sys.exit(0 if list(graphs.values()) == [1, 1, 2] else "the batch is no longer bounded, or otherwise")
PY
OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR="$folder/cache" \
  "$folder/venv/bin/python" -W ignore "$folder/case.py"
