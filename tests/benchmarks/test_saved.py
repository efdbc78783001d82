"""Pruned activations: the pass against an oracle in eager PyTorch, and what the graphs save."""

import copy
from pathlib import Path

import pytest
import torch
from bench_runs import parse, rows_of
from torch import Tensor, fx, nn
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn import functional

from benchmarks import machine
from benchmarks.results import save
from benchmarks.saved.command import SavedRow
from benchmarks.saved.operators import GRAD_WEIGHT, PRUNE, filled
from benchmarks.saved.prune_pass import PruneSavedPass
from benchmarks.saved.shares import BytesRow, graphs_backend, measure_bytes
from benchmarks.workload import Workload


def pruned(x: Tensor, kept: int) -> Tensor:
    """The oracle's pruning: zeros but for the `kept` largest of every eight numbers of a row."""
    blocks = x.reshape(-1, 8)
    order = torch.sort(blocks.abs(), dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(blocks).scatter(1, order, blocks.gather(1, order)).view(x.shape)


class PrunedProduct(torch.autograd.Function):
    """y = x W^T, its weight gradient from the pruned x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, kept: int) -> Tensor:
        ctx.save_for_backward(pruned(x, kept), weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        grad_weight = grad_output.reshape(-1, len(weight)).t() @ x.reshape(-1, x.shape[-1])
        return grad_output @ weight, grad_weight, None


class Pair(nn.Module):
    """A convolution, two 1x1 convolutions with batch norms, two linear layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.narrow, self.wide = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 24, 1, stride=2, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(24)
        self.norm = nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 5, bias=False)
        self.kept = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.bn1(self.product(x, self.narrow)))
        x = self.norm(self.bn2(self.product(x, self.wide)).flatten(2).transpose(1, 2))
        return self.product(functional.gelu(self.product(x, self.up)), self.down)

    def product(self, x: Tensor, layer: nn.Module) -> Tensor:
        if self.kept is None:
            return layer(x)
        weight = layer.weight.flatten(1)
        if isinstance(layer, nn.Linear):
            y = PrunedProduct.apply(x, weight, self.kept)
        else:
            step = layer.stride[0]
            rows = x[:, :, ::step, ::step].movedim(1, -1)
            y = PrunedProduct.apply(rows, weight, self.kept).movedim(-1, 1)
        if layer.bias is None:
            return y
        return y + (layer.bias if isinstance(layer, nn.Linear) else layer.bias[:, None, None])


def gradients(model: nn.Module, module: nn.Module, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    images = images.clone().requires_grad_()
    module(images).square().mean().backward()
    return [images.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("kept", [1, 3, 8])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_are_those_of_the_oracle(kept: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = Pair().double().to(memory_format=layout)
    oracle = copy.deepcopy(model)
    oracle.kept = kept
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64).to(memory_format=layout)
    prune = PruneSavedPass(kept)
    torch._dynamo.reset()
    backend = graphs_backend(min_cut_rematerialization_partition, [prune])
    found = gradients(model, torch.compile(model, backend=backend), images)
    assert (prune.summary.matched, prune.summary.rewritten) == (4, 4)
    torch.testing.assert_close(found, gradients(oracle, oracle, images))
    dense = copy.deepcopy(model)
    assert (kept == 8) == all(map(torch.allclose, found, gradients(dense, dense, images)))


def test_the_pruned_form_is_saved_in_place_of_the_input() -> None:
    saved = []

    def partition(gm: fx.GraphModule, inputs, **kwargs):
        forward, backward = min_cut_rematerialization_partition(gm, inputs, **kwargs)
        outputs = forward.graph.output_node().args[0][kwargs["num_fwd_outputs"] :]
        saved.extend(tuple(node.meta["val"].shape) for node in outputs)
        assert not backward.graph.find_nodes(op="call_function", target=PRUNE)
        assert len(backward.graph.find_nodes(op="call_function", target=GRAD_WEIGHT)) == 2
        # It runs where its input is computed, not at the end of the forward.
        names = [node.target for node in forward.graph.nodes if node.op == "call_function"]
        assert names.index(PRUNE) < names.index(torch.ops.aten.addmm.default)
        return forward, backward

    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    torch._dynamo.reset()
    x = torch.randn(10, 64, requires_grad=True)
    torch.compile(model, backend=graphs_backend(partition, [PruneSavedPass(2)]))(x)
    assert {(10, 16), (10, 8), (10, 64), (10, 32)} <= set(saved)
    assert saved.count((10, 256)) == 1


def test_inputs_that_are_saved_anyway_stay_dense() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(torch.tanh(x)).view(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            y = functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).reshape(2, 6, 16))

    prune = PruneSavedPass(2)
    torch._dynamo.reset()
    backend = graphs_backend(min_cut_rematerialization_partition, [prune])
    torch.compile(Attention(), backend=backend)(torch.randn(2, 6, 16))
    assert prune.summary.rewritten == 1
    assert prune.summary.left == {"its input is saved anyway": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", range(1, 9))
def test_prune_keeps_the_largest_of_every_eight(kept: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(37, 64, dtype=dtype)
    # Of equal magnitudes the first are kept.
    x[3], x[5, :10] = 0, -2
    values, masks = PRUNE(x, kept)
    assert values.shape == (37, 8 * kept)
    assert torch.equal(filled(values, masks), pruned(x, kept))


def test_prune_of_numbers_that_are_none() -> None:
    values, masks = PRUNE(torch.full((1, 8), torch.nan), 3)
    assert values.isnan().all()
    assert masks.item() == 0b111


def test_kept_must_fit() -> None:
    with pytest.raises(ValueError, match="kept must be from 1 to 8, got 9"):
        PruneSavedPass(9)


def test_bytes() -> None:
    workload = Workload(model="test_vit", batch_size=2, img_size=32)
    default, budget = measure_bytes(workload, [1.0, 0.5])
    assert default.without_mib < default.pruned_mib < default.saved_mib
    assert budget.saved_mib < default.saved_mib
    assert default.sites > 0
    assert 0 < default.freed_by_all < 1


def row(method: str, setting: str, time: float, memory: float) -> SavedRow:
    return SavedRow(
        model="model 8 b2 fp32 channels_last",
        batch_size=2,
        img_size=8,
        method=method,
        setting=setting,
        step_ms=100 * time,
        low_ms=99 * time,
        high_ms=101 * time,
        time=time,
        time_low=0.9 * time,
        time_high=1.1 * time,
        peak_mib=10 * memory,
        memory=memory,
        error=memory / 10,
        clock="wall time",
    )


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [row("dense", "", 1, 1), row("budget", "0.5", 1.1, 0.5)]
    save(rows, machine.environment("cpu"), tmp_path, "saved-model")
    counted = BytesRow(
        model="model",
        budget=1.0,
        saved_mib=8,
        without_mib=6,
        freed_by_all=0.25,
        pruned_mib=7,
        kept=2,
        sites=3,
    )
    save([counted], machine.environment("cpu"), tmp_path, "bytes-model")
    args = parse(["memory", str(tmp_path), "--picture", str(tmp_path / "memory.png")])
    args.run(args)
    assert capsys.readouterr().out.splitlines() == [
        "| model, resolution, batch | method | setting | step ms | time | peak MiB | memory"
        " | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| model 8 b2 fp32 channels_last | dense |  | 100 | 1 | 10 | 1.00 | 1e-01 |",
        "| model 8 b2 fp32 channels_last | budget | 0.5 | 110 | 1.10 (0.99 to 1.21) | 5 | 0.50 |"
        " 5e-02 |",
        "",
        "| model, resolution, batch | budget | saved MiB | pruned MiB |"
        " without weight gradients MiB |",
        "| --- | --- | --- | --- | --- |",
        "| model | 1 | 8 | 7 | 6 |",
    ]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_results(tmp_path: Path) -> None:
    args = parse(["memory", str(tmp_path)])
    with pytest.raises(ValueError, match="has no result of `saved`"):
        args.run(args)


@pytest.mark.slow
def test_rows(tmp_path: Path) -> None:
    sizes = ["--img-size", "32", "--batch-size", "4", "--rounds", "2", "--device", "cpu"]
    settings = ["--budgets", "0.5", "--drop-rates", "0.5", "--kept", "8", "2"]
    args = parse(["saved", "--model", "test_vit", *sizes, *settings, "--output", str(tmp_path)])
    args.run(args)
    rows = {(row["method"], row["setting"]): row for row in rows_of(tmp_path, SavedRow)}
    assert list(rows) == [
        ("dense", ""),
        ("budget", "0.5"),
        ("checkpoint", "every block"),
        ("two passes", "drop 0.5"),
        ("bf16", "autocast"),
        ("pruned", "8 of 8"),
        ("pruned", "2 of 8"),
    ]
    errors = {key: row["error"] for key, row in rows.items()}
    exact = ("budget", "0.5"), ("checkpoint", "every block"), ("pruned", "8 of 8")
    assert all(errors[key] < 1e-5 for key in exact)
    assert 0.001 < errors["pruned", "2 of 8"] < 1
    assert rows["budget", "0.5"]["peak_mib"] < rows["dense", ""]["peak_mib"]
