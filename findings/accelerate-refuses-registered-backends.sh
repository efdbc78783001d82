#!/usr/bin/env bash
# Hugging Face: a torch.compile backend that torch itself knows by name is accepted by
# TrainingArguments and refused by accelerate, which keeps a list of its own.
#
# Expected: `torch_compile_backend="mine"` runs the backend that `register_backend` made known, or
#           TrainingArguments refuses it at once.
# Seen:     TrainingArguments takes it; `Trainer(...)` raises "'MINE' is not a valid DynamoBackend".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/case.py" <<'PY'
import sys
import tempfile
from importlib.metadata import version

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x=None, labels=None):
        return {"loss": nn.functional.cross_entropy(self.layer(x), labels)}


torch._dynamo.register_backend(lambda gm, inputs: gm.forward, name="mine")
assert "mine" in torch._dynamo.list_backends()
print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")), sep=", ")
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    torch_compile=True,
    torch_compile_backend="mine",
    max_steps=1,
    report_to=[],
    use_cpu=True,
)
print("TrainingArguments accepts the backend:", arguments.torch_compile_backend)
try:
    Trainer(Net(), arguments, train_dataset=[{"x": torch.zeros(4), "labels": 0}] * 8)
except ValueError as error:
    print("Trainer refuses it:", error)
    sys.exit(0 if "'MINE' is not a valid DynamoBackend" in str(error) else 1)
sys.exit("Trainer accepts it now")
PY
"$folder/venv/bin/python" -W ignore "$folder/case.py"
