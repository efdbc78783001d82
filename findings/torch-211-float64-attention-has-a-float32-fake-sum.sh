#!/usr/bin/env bash
# torch 2.11: attention of float64 on a CPU returns its log-sum-exp as float64, its fake kernel says
# float32.
#
# A compiler that trusts the fake kernel and copies that result reads float64 numbers as float32.
# torch 2.14.1 says float64.
#
# Expected: the fake kernel has the dtype of the real one.
# Seen:     real torch.float64, fake torch.float32 (torch 2.11.0).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy
cat > "$folder/case.py" <<'PY'
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

print("torch", torch.__version__)
attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
q = torch.randn(2, 2, 5, 4, dtype=torch.float64)
real = attention(q, q, q)[1].dtype
with FakeTensorMode() as mode:
    fake_q = mode.from_tensor(q)
    fake = attention(fake_q, fake_q, fake_q)[1].dtype
print("real", real, "fake", fake)
sys.exit((real, fake) != (torch.float64, torch.float32))
PY
"$folder/venv/bin/python" "$folder/case.py"
