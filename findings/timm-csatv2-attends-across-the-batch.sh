#!/usr/bin/env bash
# timm: the spatial attention of csatv2 attends to the samples of the batch, not to positions.
#
# q, k and v of `SpatialTransformerBlock` are matrices [B, N], because they have one channel. Their
# product q @ k.transpose(-1, -2) is therefore [B, B]. The output of the model does not show it:
# before q, k and v stands a LayerNorm over the one channel, which returns its bias for every input.
# So all samples have the same q, k and v, and the attention adds the same map to every image.
#
# Expected: attention "over spatial positions", as the block's docstring says: for 4 images with 49
#           positions each, weights of shape [4, 49, 49] and a result that depends on the image.
# Seen:     weights of shape [4, 4], one for each pair of images, and one result for all images.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cat > "$folder/case.py" <<'PY'
import sys

import timm
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

torch.set_num_threads(1)


class Products(TorchFunctionMode):
    """Records the results of all matrix products written as `a @ b`."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (Tensor.matmul, Tensor.__matmul__):
            self.results.append(result)
        return result


torch.manual_seed(0)
print("timm", timm.__version__, "torch", torch.__version__)
model = timm.create_model("csatv2").eval()
blocks = [m for m in model.modules() if type(m).__name__ == "SpatialTransformerBlock"]
for parameter in blocks[0].parameters():
    torch.nn.init.normal_(parameter)
shapes = []
hook = blocks[0].register_forward_pre_hook(lambda block, args: shapes.append(args[0].shape))
with torch.no_grad():
    model(torch.randn(4, 3, 512, 512))
    hook.remove()
    inputs = torch.randn(shapes[0])
    with Products() as products:
        blocks[0](inputs)
weights, result = products.results
spread = (result - result[0]).abs().max().item()
print("input of the block:", list(inputs.shape))
print("attention weights before the softmax:", list(weights.shape))
print("result of the attention:", list(result.shape))
print(f"its largest value: {result.abs().max().item():.2g}")
print(f"its largest difference between images: {spread:.2g}")
is_seen = list(weights.shape) == [4, 4] and spread < 1e-5
sys.exit(0 if is_seen else "the attention is no longer across the batch, or depends on the image")
PY
"$folder/venv/bin/python" -W ignore "$folder/case.py"
