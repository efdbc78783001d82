#!/usr/bin/env bash
# timm: Lookahead accepts hooks on its steps and never runs them.
#
# `torch.optim.Optimizer.__init__` wraps `step` so that it runs the hooks. Lookahead does not call it,
# and makes the dictionaries of hooks by itself, so registering succeeds. Whoever counts steps, or
# changes gradients or weights around them, by `register_step_pre_hook` or `register_step_post_hook`,
# does nothing with any `lookahead_...` optimizer, and nobody says so. The hooks of the optimizer
# inside, and torch's hooks for all optimizers, do run, but before Lookahead moves the weights.
#
# Expected: each of the four hooks runs once a step, or registering is an error.
# Seen:     the hooks of Lookahead run 0 times in 12 steps; in the twelfth step the weights that the
#           global hook sees are not those after the step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cat > "$folder/case.py" <<'PY'
import sys
from collections import Counter
from importlib.metadata import version

import torch
from timm.optim import create_optimizer_v2
from torch.optim.optimizer import register_optimizer_step_post_hook

print(*(f"{name} {version(name)}" for name in ("torch", "timm")), sep=", ")
runs = Counter()
seen = []


def run(name):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = create_optimizer_v2([weight], opt=name, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: runs.update([(name, "before")]))
    optimizer.register_step_post_hook(lambda *_: runs.update([(name, "after")]))
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(weight.detach().clone()))
    for _ in range(12):
        weight.grad = torch.ones(3)
        optimizer.step()
    handle.remove()
    for when in ("before", "after"):
        print(f"{name}: the hook {when} a step ran {runs[name, when]} times in 12 steps")
    is_last = torch.equal(seen[-1], weight.detach())
    print(f"{name}: the global hook saw the weights of the last step: {is_last}")
    return runs[name, "before"] + runs[name, "after"], is_last


assert run("adamw") == (24, True)
sys.exit(0 if run("lookahead_adamw") == (0, False) else "the hooks run now")
PY
"$folder/venv/bin/python" -W ignore "$folder/case.py"
