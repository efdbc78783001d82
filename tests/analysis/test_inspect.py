"""inspect_sites and `ssprop-fx inspect` predict what a real step does."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._subclasses.fake_tensor import FakeTensorMode

from ssprop_fx import (
    CaptureError,
    Inspection,
    SparsityConfig,
    SparsityScheduler,
    constant,
    inspect_sites,
    report,
    ssprop_compile,
)
from ssprop_fx.cli.app import main

EXACT = SparsityConfig(channel_multiple=1, min_channels=1)


class Net(nn.Module):
    """A sparse, a grouped, a linear and a small layer, and a linear layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 64, 3, padding=1)
        self.grouped = nn.Conv2d(64, 96, 1, groups=2)
        self.norm = nn.BatchNorm2d(96)
        self.fc = nn.Linear(96, 40)
        self.unused = nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(self.stem(x)).relu())
        return self.fc(self.norm(x).mean((2, 3)))


class Broken(Net):
    """The same in two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x)).relu()
        torch._dynamo.graph_break()
        return self.fc(self.norm(self.grouped(x)).mean((2, 3)))


SLOWER = {"test_resnet", "test_vit", "test_efficientnet"}
MODELS = {
    "plain": (Net, (2, 3, 8, 8)),
    "two graphs": (Broken, (2, 3, 8, 8)),
    "test_resnet": (lambda: timm.create_model("test_resnet"), (2, 3, 32, 32)),
    "test_vit": (lambda: timm.create_model("test_vit"), (2, 3, 160, 160)),
    "test_efficientnet": (lambda: timm.create_model("test_efficientnet"), (2, 3, 32, 32)),
}


@pytest.mark.filterwarnings("ignore::ssprop_passes.errors.NoEffectWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOWER else ()) for n in MODELS],
)
def test_the_sites_are_those_of_a_real_step(name: str) -> None:
    make, shape = MODELS[name]
    model = make()
    inspection = inspect_sites(model, torch.empty(shape, device="meta"))
    compiled = ssprop_compile(model, SparsityScheduler(constant(0.6)), backend="aot_eager")
    compiled.train()
    compiled(torch.randn(shape)).square().sum().backward()
    actual = report(compiled)
    assert [
        (
            site.name,
            site.kind,
            site.channels,
            inspection.kept_at(site, 0.6),
            site.flops,
            site.reason,
        )
        for site in inspection.sites
    ] == [
        (site.name, site.kind, site.channels, site.kept, site.flops, site.reason)
        for site in actual.sites
    ]
    assert inspection.sparse_sites
    assert inspection.backward_flops == actual.backward_flops
    assert inspection.saved_at(0.6) == actual.saved_flops / actual.backward_flops


def test_savings_are_those_computed_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 48, 1, groups=2), nn.Conv2d(48, 16, 1)
    )
    inspection = inspect_sites(model, torch.randn(2, 3, 10, 10))
    # 2 operations a multiply-add; the first layer needs no gradient of its input.
    flops = {
        "0": 2 * (200 * 64) * 27,
        "1": 2 * (200 * 48) * 32 * 2,
        "2": 2 * (200 * 16) * 48 * 2,
    }
    total = sum(flops.values())
    assert {site.name: site.flops for site in inspection.sites} == flops
    assert inspection.backward_flops == total
    assert inspection.covered == pytest.approx((flops["0"] + flops["1"]) / total)
    # 0.8 dropped: 12.8 of 64 -> 16; 4.8 of 24 a group -> 4, so 8 of 48.
    saved = flops["0"] * 48 / 64 + flops["1"] * 40 / 48
    assert inspection.saved_at(0.8) == pytest.approx(saved / total)
    assert inspection.saved_at(0) == 0
    exact = inspect_sites(model, torch.randn(2, 3, 10, 10), config=EXACT)
    saved = flops["0"] * 52 / 64 + flops["1"] * 20 / 24 + flops["2"] * 13 / 16
    assert exact.saved_at(0.8) == pytest.approx(saved / total)
    assert exact.covered == 1
    for rate in (-0.1, 1):
        with pytest.raises(ValueError, match=r"drop_rate must be in \[0, 1\)"):
            inspection.saved_at(rate)


def test_an_inspection_prints_what_it_knows() -> None:
    inspection = inspect_sites(Net(), torch.randn(2, 3, 8, 8))
    assert inspection.uncaptured == ("unused",)
    text = inspection.table([0.5])
    assert "fewer than min_channels=32 output channels" in text
    assert "missing from the total: unused" in text
    assert f"drop rate 0.5: {inspection.saved_at(0.5):.1%} of the backward's FLOPs saved" in text
    assert "3 of 4 sites sparse" in str(inspection)
    assert "conv2d: 3 sites, 2 sparse" in str(inspection)
    assert Inspection((), 0, 16).saved_at(0.5) == 0


@pytest.mark.parametrize("model_kind", ["real", "fake", "meta"])
@pytest.mark.parametrize("input_kind", ["real", "fake", "meta", "keyword"])
def test_tensors_may_be_real_fake_or_meta(model_kind: str, input_kind: str) -> None:
    mode = FakeTensorMode()

    def make(kind: str, factory):
        with mode if kind == "fake" else torch.device("meta" if kind == "meta" else "cpu"):
            return factory()

    model = make(model_kind, Net)
    x = make(input_kind, lambda: torch.ones(2, 3, 8, 8))
    inspection = inspect_sites(model, {"x": x} if input_kind == "keyword" else (x,))
    assert inspection == inspect_sites(Net(), torch.ones(2, 3, 8, 8))


class Counter:
    """A torch.compile backend that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gm, example_inputs):
        self.calls += 1
        return gm


@pytest.mark.parametrize("make", [Net, Broken])
def test_nothing_is_left_behind(make) -> None:
    def state():
        return (
            torch._dynamo.config.get_config_copy(),
            torch._functorch.config.joint_custom_pass,
            torch._dynamo.convert_frame._bytecode_hooks.copy(),
            torch.is_grad_enabled(),
        )

    model = make().eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    identities = {name: id(value) for name, value in model.named_parameters()}
    state_before, rng_before = state(), torch.get_rng_state()
    inspect_sites(model, torch.ones(2, 3, 8, 8))
    assert state() == state_before
    assert torch.equal(torch.get_rng_state(), rng_before)
    assert not model.training
    assert {name: id(value) for name, value in model.named_parameters()} == identities
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert _debug_get_cache_entry_list(make.forward) == []

    # The user's own graphs stay, and their sizes are still static.
    counter = Counter()
    compiled = torch.compile(model, backend=counter)
    compiled(torch.ones(2, 3, 8, 8))
    calls = counter.calls
    assert calls > 0
    for size in range(9, 11):
        inspect_sites(model, torch.ones(2, 3, size, size))
    compiled(torch.ones(2, 3, 8, 8))
    assert counter.calls == calls


class Reader(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.sum())


class Refusing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("x is too small\nby far")


def test_errors_are_one_clear_line() -> None:
    x = torch.ones(2, 3, 8, 8)
    with pytest.raises(CaptureError, match=r"^the model cannot be traced on fake.*local_scalar"):
        inspect_sites(Reader(), x)
    with pytest.raises(CaptureError, match=r"fake tensors: ValueError: x is too small$"):
        inspect_sites(Refusing(), x)
    with pytest.raises(CaptureError, match=r"ValueError: Expected more than 1 value per channel"):
        inspect_sites(nn.BatchNorm1d(4), torch.ones(1, 4))
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(CaptureError, match="captured no graph"),
    ):
        inspect_sites(Net(), x)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        inspect_sites("resnet50", x)
    with pytest.raises(TypeError, match="config must be a SparsityConfig or None, got dict"):
        inspect_sites(Net(), x, config={})
    with pytest.raises(ValueError, match="lazy layer"):
        inspect_sites(nn.LazyLinear(4), x)


def test_json_holds_what_the_help_says(capsys) -> None:
    flags = ["--img-size", "48", "--batch-size", "3", "--in-chans", "1", "--num-classes", "7"]
    flags += ["--min-channels", "48", "--channel-multiple", "8", "--drop-rates", "0.25", "0.75"]
    assert main(["inspect", "test_resnet", "--json", *flags]) == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert err == ""
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    documented = capsys.readouterr().out
    for keys in (content, content["sites"][0], content["saved"][0], content["kinds"][0]):
        assert all(key in documented for key in keys)

    model = timm.create_model("test_resnet", in_chans=1, num_classes=7)
    config = SparsityConfig(min_channels=48, channel_multiple=8)
    expected = inspect_sites(model, torch.ones(3, 1, 48, 48), config=config)
    assert content["parameters"] == sum(p.numel() for p in model.parameters())
    assert (content["input_size"], content["batch_size"]) == ([1, 48, 48], 3)
    assert content["backward_flops"] == expected.backward_flops
    assert content["saved"] == [
        {"drop_rate": rate, "share": expected.saved_at(rate)} for rate in (0.25, 0.75)
    ]
    assert [site["name"] for site in content["sites"]] == [site.name for site in expected.sites]
    assert sum(kind["sites"] for kind in content["kinds"]) == len(expected.sites)
    site = next(site for site in content["sites"] if site["sparse"])
    assert site["kept"] == [site["channels"] * 3 // 4, site["channels"] // 4]
    assert {site["reason"] for site in content["sites"] if not site["sparse"]} == {
        "the classifier",
        "fewer than min_channels=48 output channels",
    }


@pytest.mark.slow
def test_one_gradient_alone_saves_half(capsys) -> None:
    saved = {}
    for gradients in ("both", "weight", "input"):
        flags = ["--img-size", "32", "--min-channels", "1", "--gradients", gradients]
        assert main(["inspect", "test_resnet", "--json", *flags]) == 0
        content = json.loads(capsys.readouterr().out)
        saved[gradients] = content["saved"][0]["share"]
        halves = {site["flops"] // site["sparse_flops"] for site in content["sites"][1:-1]}
        assert halves == {1 if gradients == "both" else 2}
    assert saved["weight"] + saved["input"] == pytest.approx(saved["both"], rel=1e-6)
    assert 0 < saved["input"] <= saved["weight"]


def test_the_table_and_the_native_size(capsys) -> None:
    assert main(["inspect", "test_vit.r160_in1k", "--targets", "linear"]) == 0
    out = capsys.readouterr().out
    assert "2 images of 3x160x160" in out
    assert "conv layers are not among the targets" in out
    assert "drop rate 0.8: " in out


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["resnet5"], 2, "MODEL resnet5: unknown; did you mean resnet50"),
        (["test_resnet", "--drop-rates", "1"], 2, "--drop-rates must be in [0, 1), got 1"),
        (["test_resnet", "--batch-size", "0"], 2, "--batch-size must be above 0, got 0"),
        (["test_resnet", "--min-channels", "0"], 2, "--min-channels must be at least 1, got 0"),
        (["test_resnet", "--channel-multiple", "0"], 2, "--channel-multiple must be at least 1"),
        (["test_resnet", "--channel-multiple", "x"], 2, "must be auto or a whole number, got 'x'"),
        (["test_resnet", "--targets", "norm"], 2, "invalid choice: 'norm'"),
        (["test_vit", "--img-size", "7"], 1, "test_vit: the model cannot be traced on fake"),
    ],
)
def test_a_mistake_is_one_line(flags, status, message, capsys) -> None:
    assert main(["inspect", *flags]) == status
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("ssprop-fx: error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys\nsys.modules['timm'] = None\n"
        "from ssprop_fx.cli.app import main\nsys.exit(main(['inspect', 'resnet18']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("the package timm is missing: pip install ssprop-fx[train]\n")
    assert done.stderr.count("\n") == 1
