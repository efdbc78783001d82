"""Memorized sparse back-propagation against a step-by-step eager reference in float64."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from blocks import Block
from memory_reference import loss, memories, reference, train
from oracle import gradients, relative_error
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.runtime.module import SsPropModule

ETA = 0.9
DROP_RATE = 0.75


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 8)
    )


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 12, 3, stride=2), nn.Tanh()
    )


# name -> model, shape of its input without the batch
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (3, 6)),
    "conv": (conv_net, (3, 8, 8)),
}


def compile_model(
    model: nn.Module, backend: str = "aot_eager", drop_rate: float = DROP_RATE, **options: object
) -> SsPropModule:
    options = {"memory": ETA, **options}
    config = SparsityConfig(channel_multiple=1, min_channels=1, **options)
    return ssprop_compile(
        model, SparsityScheduler(constant(drop_rate)), config=config, backend=backend
    )


def make_batches(shape: tuple[int, ...], steps: int, size: int = 4) -> list[Tensor]:
    return list(torch.randn(steps, size, *shape, dtype=torch.float64))


def ramp(size: int, resolution: int) -> Tensor:
    return torch.linspace(-2, 3, size * 3 * resolution**2).double().view(size, 3, resolution, -1)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {f"{i}": parameter.detach() for i, parameter in enumerate(model.parameters())}


def assert_same(compiled: SsPropModule, expected: nn.Module, bound: float) -> None:
    """Compare parameters and memories of a compiled model with the reference's."""
    assert relative_error(parameters(compiled), parameters(expected)) < bound
    assert relative_error(compiled.ssprop.memory.state_dict(), memories(expected)) < bound


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("mlp", "aot_eager"),
        ("conv", "aot_eager"),
        pytest.param("conv", "inductor", marks=pytest.mark.slow),
    ],
)
def test_fifty_steps_equal_the_reference(name: str, backend: str) -> None:
    make, shape = MODELS[name]
    model = make().double()
    batches = make_batches(shape, 50)
    expected = reference(model, eta=ETA, drop_rate=DROP_RATE)
    plain = reference(model, eta=0.0, drop_rate=DROP_RATE)
    compiled = compile_model(model, backend)
    for one in (compiled, expected, plain):
        train(one, batches)
    assert_same(compiled, expected, 1e-8)
    assert relative_error(parameters(compiled), parameters(plain)) > 1e-2, "memory does something"


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 12, 3), (3, 7)),
    "grouped": (lambda: nn.Conv2d(6, 12, 3, stride=2, groups=2), (6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (6, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 12, 2, groups=2, bias=False), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 12, 2), (2, 3, 3, 3)),
    "linear": (lambda: nn.Linear(7, 12), (2, 7)),
}


class Branches(nn.Module):
    """Each kind of layer, with its own input, in a single compile."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({name: nn.Tanh() for name in LAYERS})
        self.layers = nn.ModuleDict({name: make() for name, (make, _) in LAYERS.items()})

    def forward(self, inputs: list[Tensor]) -> Tensor:
        layers = zip(self.layers.values(), inputs, strict=True)
        return torch.stack([loss(layer(x.tanh())) for layer, x in layers])


def weighted(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    indices = torch.topk(scores, k).indices
    return indices, torch.full_like(indices, 0.75, dtype=scores.dtype)


@pytest.mark.parametrize(
    ("options", "as_reference"),
    [
        ({}, {}),
        ({"gradients": "weight"}, {"gradients": "weight"}),
        ({"gradients": "input"}, {"gradients": "input"}),
        ({"block": 2}, {"block": 2}),
        ({"select": weighted}, {"weight": 0.75}),
    ],
    ids=["default", "weight", "input", "block", "weighted"],
)
def test_every_kind_of_layer_and_selection_has_a_memory(options: dict, as_reference: dict) -> None:
    model = Branches().double()
    expected = reference(model, eta=ETA, drop_rate=0.3, **as_reference)
    compiled = compile_model(model, drop_rate=0.3, **options)
    for _ in range(3):
        found = []
        for one in (compiled, expected):
            torch.manual_seed(1)
            inputs = [make_batches(shape, 1)[0].requires_grad_() for _, shape in LAYERS.values()]
            one.zero_grad()
            one(inputs).sum().backward()
            kept = {f"input {i}": x.grad for i, x in enumerate(inputs)}
            kept.update({f"{i}": p.grad for i, p in enumerate(one.parameters())})
            found.append(kept)
        assert relative_error(*found) < 1e-10
    assert relative_error(compiled.ssprop.memory.state_dict(), memories(expected)) < 1e-10
    assert {site.reason for site in report(compiled).sites} == {""}


def test_random_selection_remembers_what_it_leaves_out() -> None:
    layer = nn.Linear(7, 12).double()
    compiled = compile_model(layer, drop_rate=0.5, select="random")
    memory = torch.zeros(12, dtype=torch.float64)
    drawn = set()
    for x in make_batches((7,), 5):
        upstream = torch.randn(4, 12, dtype=torch.float64)
        layer.zero_grad()
        compiled(x).backward(upstream)
        wanted = upstream + ETA * memory
        was_drawn = layer.weight.grad.count_nonzero(1) > 0
        kept = wanted * was_drawn
        torch.testing.assert_close(layer.weight.grad, kept.T @ x)
        torch.testing.assert_close(layer.bias.grad, kept.sum(0))
        assert was_drawn.sum() == 6
        memory = (wanted - kept).mean(0)
        torch.testing.assert_close(*compiled.ssprop.memory.state_dict().values(), memory)
        drawn.add(tuple(was_drawn.tolist()))
    assert len(drawn) > 1


def test_no_memory_is_plain_selection_bit_for_bit() -> None:
    model = conv_net()
    x = torch.randn(4, 3, 8, 8)
    grads = []
    for options in ({"memory": 0.0}, {"memory": ETA}):
        twin = copy.deepcopy(model)
        compiled = compile_model(twin, **options)
        loss(compiled(x)).backward()
        grads.append([p.grad for p in twin.parameters()])
        assert bool(compiled.ssprop.memory.state_dict()) == bool(options["memory"])
    # The memory of a first step is empty, too.
    assert all(map(torch.equal, *grads))
    assert SparsityConfig(memory=0).selection == SparsityConfig().selection


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_forwards_precede_two_backwards(backend: str) -> None:
    """Both backwards update the memory, in their order, and the gradients accumulate."""
    model = mlp().double()
    expected = reference(model, eta=ETA, drop_rate=DROP_RATE)
    compiled = compile_model(model, backend)
    batches = make_batches((3, 6), 4)
    for one in (compiled, expected):
        for first, second in (batches[:2], batches[2:]):
            losses = [loss(one(first)), loss(one(second))]
            losses[1].backward()
            losses[0].backward()
    actual = {f"{i}": p.grad for i, p in enumerate(compiled.parameters())}
    wanted = {f"{i}": p.grad for i, p in enumerate(expected.parameters())}
    assert relative_error(actual, wanted) < 1e-10
    assert_same(compiled, expected, 1e-10)


def test_a_checkpoint_in_the_middle_goes_on_bit_for_bit() -> None:
    batches = make_batches((3, 8, 8), 10)
    compiled = compile_model(conv_net().double())
    train(compiled, batches[:5])
    file = io.BytesIO()
    memory = compiled.ssprop.memory
    torch.save((compiled.state_dict(), memory.state_dict()), file)
    train(compiled, batches[5:])
    file.seek(0)
    weights, remembered = torch.load(file, weights_only=True)
    assert set(weights) == {f"_orig_mod.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}
    # Load into a model that has not run yet, and into one that has.
    for warm_up in ([], batches[:2]):
        resumed = compile_model(conv_net().double())
        train(resumed, warm_up)
        resumed.load_state_dict(weights)
        resumed.ssprop.memory.load_state_dict(remembered)
        train(resumed, batches[5:])
        assert all(map(torch.equal, resumed.parameters(), compiled.parameters()))
        end = resumed.ssprop.memory.state_dict()
        assert end.keys() == memory.state_dict().keys()
        assert all(torch.equal(end[name], tensor) for name, tensor in memory.state_dict().items())


def test_blocks_behind_a_graph_break_have_memories_of_their_own() -> None:
    model = nn.Sequential(*[Block(16) for _ in range(3)]).double()
    expected = reference(model, eta=ETA, drop_rate=DROP_RATE)
    compiled = compile_model(model)
    batches = make_batches((16,), 4)
    for one in (compiled, expected):
        train(one, batches)
    assert len(compiled.ssprop.backend.instances) < 6, "one graph serves several blocks"
    assert_same(compiled, expected, 1e-10)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 1)
        self.head = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        small = nn.functional.avg_pool2d(x, 2)
        return self.head(x).mean((2, 3)) + self.head(small).square().mean((2, 3))


def test_each_call_of_a_layer_has_a_memory() -> None:
    model = Twice().double()
    batches = make_batches((2, 4, 4), 3)
    expected = reference(model, eta=ETA, drop_rate=DROP_RATE)
    compiled = compile_model(model)
    for one in (compiled, expected):
        train(one, batches)
    shapes = {name: t.shape for name, t in compiled.ssprop.memory.state_dict().items()}
    assert shapes == {"stem": (8, 4, 4), "head": (8, 4, 4), "head@1": (8, 2, 2)}
    assert_same(compiled, expected, 1e-10)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_a_memory_of_its_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    batches = make_batches((3, 6), 4)
    compiled = compile_model(mlp().double())
    train(compiled, batches[:2])
    other = duplicate(compiled)
    held = {name: t.clone() for name, t in compiled.ssprop.memory.state_dict().items()}
    train(other, batches[2:])
    assert all(torch.equal(t, held[n]) for n, t in compiled.ssprop.memory.state_dict().items())
    # The original takes the same steps from the same weights and memory.
    train(compiled, batches[2:])
    assert all(map(torch.equal, compiled.parameters(), other.parameters()))


def test_memory_outlives_another_batch_size_and_not_another_resolution() -> None:
    compiled = compile_model(conv_net().double())
    memory = compiled.ssprop.memory
    expected = reference(compiled._orig_mod, eta=ETA, drop_rate=DROP_RATE)
    for one in (compiled, expected):
        train(one, [ramp(size, 8) for size in (4, 3, 5)])
    assert_same(compiled, expected, 1e-10)
    assert len(compiled.ssprop.backend.graphs) == 2, "the second size compiles a dynamic graph"

    fresh = copy.deepcopy(compiled)
    fresh.ssprop.memory.reset()
    for one in (compiled, fresh):
        train(one, [ramp(4, 10)])
    assert memory.state_dict()["0"].shape == (8, 10, 10)
    assert relative_error(parameters(compiled), parameters(fresh)) == 0
    assert relative_error(memory.state_dict(), fresh.ssprop.memory.state_dict()) == 0


def test_memory_follows_dtype_and_layout() -> None:
    compiled = compile_model(conv_net().double())
    memory = compiled.ssprop.memory
    train(compiled, [ramp(2, 8)])
    single = copy.deepcopy(compiled).float()
    channels_last = copy.deepcopy(compiled).to(memory_format=torch.channels_last)
    train(compiled, [ramp(2, 8)])
    train(channels_last, [ramp(2, 8).to(memory_format=torch.channels_last)])
    train(single, [ramp(2, 8).float()])
    other = channels_last.ssprop.memory.state_dict()
    assert relative_error(other, memory.state_dict()) < 1e-10
    assert other["2"].stride() == (1, 36, 12)
    other = single.ssprop.memory.state_dict()
    assert relative_error(other, memory.state_dict()) < 1e-4
    assert {tensor.dtype for tensor in other.values()} == {torch.float32}


def test_low_precision_gradients_have_a_memory_in_float32() -> None:
    compiled = compile_model(conv_net())
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            output = compiled(torch.randn(4, 3, 8, 8))
        loss(output.float()).backward()
    state = compiled.ssprop.memory.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(tensor.abs().sum() > 0 for tensor in state.values())


def test_an_overflow_is_not_remembered() -> None:
    compiled = compile_model(mlp())
    x = torch.randn(4, 3, 6)
    (loss(compiled(x)) * float("inf")).backward()
    assert not gradients(compiled, x)["_orig_mod.0.weight"].isfinite().all(), "a GradScaler sees it"
    assert all(t.isfinite().all() for t in compiled.ssprop.memory.state_dict().values())
    compiled.zero_grad()
    loss(compiled(x)).backward()
    assert all(p.grad.isfinite().all() for p in compiled.parameters())


def test_dense_steps_leave_the_memory_as_it_is() -> None:
    scheduler = SparsityScheduler(lambda step: (0.5, 0.0)[step % 2])
    config = SparsityConfig(channel_multiple=1, min_channels=1, memory=ETA)
    compiled = ssprop_compile(mlp().double(), scheduler, config=config, backend="aot_eager")
    batches = make_batches((3, 6), 2)
    train(compiled, batches[:1])
    held = {name: t.clone() for name, t in compiled.ssprop.memory.state_dict().items()}
    scheduler.step()
    train(compiled, batches[1:])
    assert all(torch.equal(t, held[n]) for n, t in compiled.ssprop.memory.state_dict().items())


def test_products_without_a_layer_call_stay_dense() -> None:
    class Product(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

    compiled = compile_model(nn.Sequential(nn.Linear(4, 8), Product(8, 8)))
    loss(compiled(torch.randn(2, 4))).backward()
    reasons = {site.name: site.reason for site in report(compiled).sites}
    assert reasons["0"] == ""
    assert "so it has no memory" in reasons["1"]


def test_a_memory_of_another_model_is_refused() -> None:
    state = {"0": torch.zeros(16), "head": torch.zeros(3)}
    compiled = compile_model(mlp())
    with pytest.raises(ValueError, match=r"same model and SparsityConfig: .* none for 'head'"):
        compiled.ssprop.memory.load_state_dict(state)
    without = compile_model(mlp(), memory=0.0)
    with pytest.raises(ValueError, match="none for '0', 'head'"):
        without.ssprop.memory.load_state_dict(state)
