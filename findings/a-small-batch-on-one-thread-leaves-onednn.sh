#!/usr/bin/env bash
# torch: on one thread, a 1x1 convolution of fewer than 16 images does not use oneDNN.
#
# With 16 images it runs oneDNN's kernel, with 15 ATen's own. A 3x3 convolution runs oneDNN's with
# both, and so does a 1x1 convolution on two threads. So on one thread, fewer images may cost more
# for each image.
#
# Expected: the batch size does not decide which library computes a convolution.
# Seen:     1x1 on one thread: 16 images oneDNN, 15 images ATen; all others: oneDNN.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/case.py" <<'PY'
import sys

import torch
from torch.profiler import ProfilerActivity, profile

print("torch", torch.__version__)
found = {}
for threads in (1, 2):
    torch.set_num_threads(threads)
    for kernel in (1, 3):
        for images in (15, 16):
            layer = torch.nn.Conv2d(32, 32, kernel, padding=kernel // 2)
            layer = layer.to(memory_format=torch.channels_last)
            x = torch.randn(images, 32, 14, 14).to(memory_format=torch.channels_last)
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                layer(x)
            names = {event.key for event in seen.key_averages()}
            library = "oneDNN" if "aten::mkldnn_convolution" in names else "ATen"
            found[threads, kernel, images] = library
            print(f"{threads} threads, {kernel}x{kernel}, {images} images: {library}")
expected = {key: "ATen" if key == (1, 1, 15) else "oneDNN" for key in found}
sys.exit(found != expected)
PY
"$folder/venv/bin/python" "$folder/case.py"
