"""What `ssprop_compile` returns stands in for the model, as with `torch.compile`."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from ssprop_passes.errors import NoEffectWarning
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, bar, constant, report, ssprop_compile

# With keep counts of exactly half, so that the tests can count rows.
EXACT = SparsityConfig(channel_multiple=1)


class Net(nn.Module):
    """Two convolutions, and layers that differ between train and eval: batch norm and dropout."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, 2 * channels, 3)
        self.head = nn.Linear(2 * channels, 5)
        self.scale = 1.0

    def forward(self, x: Tensor, flip: bool = False) -> Tensor:
        x = x.flip(-1) if flip else x
        x = torch.relu(self.norm(self.first(x)))
        x = nn.functional.dropout(torch.relu(self.second(x)), 0.1, self.training)
        return self.head(x.mean((2, 3))) * self.scale


def compiled(model: nn.Module | None = None, rate: float = 0.5, **arguments):
    scheduler = SparsityScheduler(constant(rate))
    arguments = {"config": EXACT, "backend": "aot_eager", **arguments}
    return ssprop_compile(Net() if model is None else model, scheduler, **arguments)


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def kept_rows(conv: nn.Module) -> int:
    """How many output channels got a weight gradient."""
    return int((conv.weight.grad.flatten(1) != 0).any(1).sum())


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output of one call, all its gradients, and the buffers after it."""
    model.zero_grad()
    # The same dropout mask in all models that are compared.
    torch.manual_seed(1)
    output = model(x)
    found = {"output": output.detach()}
    if output.requires_grad:
        output.square().sum().backward()
        found |= {name: p.grad.clone() for name, p in model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_bit_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


class TestStandsForTheModel:
    def test_has_the_state_dict_keys_of_torch_compile(self):
        model = Net()
        expected = torch.compile(copy.deepcopy(model), backend="aot_eager").state_dict()
        found = compiled(model).state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_still_has_them_after_a_sparse_step(self):
        model = compiled()
        keys = list(model.state_dict())
        model(images()).sum().backward()
        assert list(model.state_dict()) == keys

    def test_loads_a_state_dict_of_torch_compile(self):
        model, other = compiled(), Net()
        model.load_state_dict(torch.compile(other, backend="aot_eager").state_dict())
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
        )

    def test_parameters_and_buffers_are_the_models_own(self):
        model = Net()
        wrapper = compiled(model)
        for kind in ("parameters", "buffers"):
            found, expected = list(getattr(wrapper, kind)()), list(getattr(model, kind)())
            assert len(found) == len(expected) > 0
            assert all(a is b for a, b in zip(found, expected, strict=True))

    def test_train_and_eval_go_through(self):
        model = Net()
        wrapper = compiled(model)
        for mode in (False, True):
            assert wrapper.train(mode) is wrapper
            assert wrapper.training == mode
            assert {module.training for module in model.modules()} == {mode}
        model.eval()
        assert not wrapper.training

    def test_a_train_method_of_the_models_own_is_called(self):
        class FrozenNorm(Net):
            def train(self, mode: bool = True) -> nn.Module:
                super().train(mode)
                self.norm.eval()
                return self

        wrapper = compiled(FrozenNorm())
        wrapper.train()
        assert (wrapper.training, wrapper.first.training) == (True, True)
        assert not wrapper.norm.training

    def test_attributes_are_read_from_the_model(self):
        model = Net()
        model.labels = ["cat", "dog"]
        wrapper = compiled(model)
        assert wrapper.first is model.first
        assert wrapper.labels is model.labels
        assert not hasattr(wrapper, "absent")
        with pytest.raises(AttributeError, match="'Net' object has no attribute 'absent'"):
            _ = wrapper.absent

    def test_attributes_are_written_to_the_model(self):
        model = Net()
        wrapper = compiled(model)
        x = images()
        before = wrapper.eval()(x)
        wrapper.scale = 2.0
        assert model.scale == 2.0
        assert torch.equal(wrapper(x), 2 * before)
        wrapper.extra = nn.Linear(2, 2)
        assert model.extra is wrapper.extra
        assert "_orig_mod.extra.weight" in wrapper.state_dict()
        del wrapper.extra
        assert not hasattr(model, "extra")

    def test_keyword_inputs(self):
        model = compiled(rate=0.0).eval()
        x = images()
        expected = model._orig_mod(x, flip=True)
        assert not torch.equal(model._orig_mod(x), expected)
        assert torch.equal(model(x=x, flip=True), expected)
        assert torch.equal(model(x, flip=True), expected)

    def test_keyword_inputs_of_the_sparse_variant(self):
        model = compiled()
        model(x=images(), flip=True).sum().backward()
        assert (kept_rows(model.first), kept_rows(model.second)) == (16, 32)

    def test_forward_hooks_on_the_wrapper_and_on_the_model_run(self):
        model = compiled()
        calls = []
        for name, module in (("wrapper", model), ("model", model._orig_mod)):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(f"before {name}"))
            module.register_forward_hook(lambda *_, name=name: calls.append(f"after {name}"))
        for mode in (True, False):
            calls.clear()
            model.train(mode)(images())
            assert calls == ["before wrapper", "before model", "after model", "after wrapper"]

    def test_a_forward_hook_may_replace_the_output(self):
        model = compiled()
        model.register_forward_hook(lambda module, args, output: output[:, :2])
        assert model(images()).shape == (2, 2)

    def test_an_error_in_the_model_comes_through(self):
        class Failing(Net):
            def forward(self, x: Tensor) -> Tensor:
                raise KeyError("the model's own")

        with pytest.raises(KeyError, match="the model's own"):
            compiled(Failing())(images())

    def test_takes_a_compiled_model_for_the_model_in_it(self):
        model = Net()
        for already in (torch.compile(model, backend="aot_eager"), compiled(model)):
            wrapper = compiled(already)
            assert wrapper._orig_mod is model
            wrapper.zero_grad()
            wrapper(images()).sum().backward()
            assert kept_rows(model.first) == 16


class TestInPlace:
    """`in_place=True`: the model itself runs compiled, as after `model.compile()`."""

    def test_the_model_trains_sparse_under_its_own_names(self):
        model, x = Net(), images()
        keys = list(model.state_dict())
        expected = outcome(compiled(copy.deepcopy(model)), x)
        wrapper = compiled(model, in_place=True)
        found = outcome(model, x)
        assert kept_rows(model.first) == 16
        assert list(model.state_dict()) == keys
        assert {site.name for site in report(wrapper).sparse_sites} == {"first", "second"}
        assert_bit_identical(
            found, {name.removeprefix("_orig_mod."): value for name, value in expected.items()}
        )

    def test_of_a_part_of_a_model(self):
        part = Net()
        model = nn.Sequential(nn.Conv2d(3, 3, 1), part)
        compiled(part, in_place=True)
        outcome(model, images())
        assert kept_rows(part.first) == 16
        assert kept_rows(model[0]) == 3

    def test_where_compilation_is_disabled_the_model_runs_eager(self):
        model, x = Net().eval(), images()
        expected = model(x)
        compiled(model, in_place=True)
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(model(x), expected)

    def test_copies_are_plain(self):
        model = Net()
        compiled(model, in_place=True)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for plain in copies:
            outcome(plain, images())
            assert kept_rows(plain.first) == 32


class TestDense:
    """If nothing is left out, results equal torch.compile of the model bit for bit."""

    def check(self, wrap: Callable[[nn.Module], nn.Module], mode: bool, x: Tensor) -> None:
        model = Net().train(mode)
        expected = outcome(torch.compile(copy.deepcopy(model), backend="aot_eager"), x)
        wrapper = wrap(model)
        assert_bit_identical(outcome(wrapper, x), expected)
        assert wrapper.ssprop.graphs == ()

    def test_drop_rate_0(self):
        self.check(lambda model: compiled(model, rate=0.0), True, images())

    def test_eval(self):
        with pytest.warns(NoEffectWarning, match=r"in eval\(\) mode, so this backward was dense"):
            self.check(compiled, False, images())

    @pytest.mark.parametrize("mode", [True, False])
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, context, mode):
        x = images()
        with context():
            self.check(compiled, mode, x)

    def test_dense_phases_after_sparse_ones(self):
        model, x = Net(), images()
        scheduler = SparsityScheduler(bar(0.5, period=2))
        wrapper = ssprop_compile(model, scheduler, config=EXACT, backend="aot_eager")
        outcome(wrapper, x)
        assert wrapper.ssprop.graphs == ()
        scheduler.step()
        outcome(wrapper, x)
        assert len(wrapper.ssprop.graphs) == 1
        assert kept_rows(model.first) == 16
        scheduler.step()
        expected = outcome(torch.compile(copy.deepcopy(model), backend="aot_eager"), x)
        assert_bit_identical(outcome(wrapper, x), expected)

    def test_the_sparse_variant_has_the_same_forward(self):
        model, x = Net(), images()
        expected = outcome(torch.compile(copy.deepcopy(model), backend="aot_eager"), x)
        found = outcome(compiled(model), x)
        for name in ("output", *(f"_orig_mod.{name}" for name, _ in model.named_buffers())):
            assert torch.equal(found[name], expected[name])
        # Gradients that do not pass through a sparse site are equal, too.
        for name in ("_orig_mod.head.weight", "_orig_mod.head.bias"):
            assert torch.equal(found[name], expected[name])


class TestCopies:
    def test_deepcopy_follows_the_same_scheduler_in_the_same_slots(self):
        scheduler = SparsityScheduler(bar(0.5, period=2))
        model = ssprop_compile(Net(), scheduler, config=EXACT, backend="aot_eager")
        other = copy.deepcopy(model)
        assert other.ssprop.scheduler is scheduler
        assert other.ssprop.config is EXACT
        assert other.ssprop.keep_counts.data_ptr() == model.ssprop.keep_counts.data_ptr()
        assert scheduler.keep_counts.shape == (2,)
        scheduler.step()
        assert other.ssprop.keep_counts.tolist() == [16, 32]
        other(images()).sum().backward()
        assert (kept_rows(other.first), kept_rows(other.second)) == (16, 32)
        # The copy has its own parameters.
        assert all(p.grad is None for p in model.parameters())

    def test_deepcopy_of_a_model_that_has_run(self):
        model = compiled()
        x = images()
        expected = outcome(model, x)
        other = copy.deepcopy(model)
        assert other.ssprop.graphs == ()
        model.norm.reset_running_stats()
        other.norm.reset_running_stats()
        assert_bit_identical(outcome(other, x), expected)
        assert_bit_identical(outcome(model, x), expected)

    def test_deepcopy_keeps_the_mode(self):
        assert not copy.deepcopy(compiled().eval()).training

    def test_pickle_with_the_scheduler_keeps_them_together(self):
        scheduler = SparsityScheduler(bar(0.5, period=2))
        model = ssprop_compile(Net(), scheduler, config=EXACT, backend="aot_eager")
        model.eval()
        other_scheduler, other = pickle.loads(pickle.dumps((scheduler, model)))
        assert other.ssprop.scheduler is other_scheduler
        assert other.ssprop.config == EXACT
        assert not other.training
        assert other_scheduler.keep_counts.shape == (2,)
        other_scheduler.step()
        assert other.ssprop.keep_counts.tolist() == [16, 32]
        assert model.ssprop.keep_counts.tolist() == [32, 64]
        other.train()(images()).sum().backward()
        assert (kept_rows(other.first), kept_rows(other.second)) == (16, 32)

    def test_torch_save_of_the_whole_module(self):
        model = compiled()
        model(images()).sum().backward()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
        x = images()
        assert torch.equal(other.eval()(x), model.eval()(x))
        assert other.ssprop.scheduler.keep_counts.tolist() == [16, 32]


class TestConversions:
    def test_to_another_dtype_afterwards(self):
        model = compiled()
        model(images()).sum().backward()
        model.zero_grad()
        assert model.to(torch.float64) is model
        model(images().double()).sum().backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float64}
        assert (kept_rows(model.first), kept_rows(model.second)) == (16, 32)
        assert model.ssprop.keep_counts.dtype == torch.int64

    def test_frozen_layers_get_no_gradient(self):
        model = compiled()
        model.first.requires_grad_(False)
        model(images()).sum().backward()
        assert model.first.weight.grad is None
        assert kept_rows(model.second) == 32


class TestSchedulers:
    def test_two_models_on_one_scheduler(self):
        scheduler = SparsityScheduler(bar(0.5, period=2))
        models = [
            ssprop_compile(Net(channels), scheduler, config=config, backend="aot_eager")
            for channels, config in ((32, EXACT), (48, SparsityConfig(channel_multiple=16)))
        ]
        assert scheduler.keep_counts.tolist() == [32, 64, 48, 96]
        scheduler.step()
        x = images()
        for model, rows in zip(models, ([16, 32], [32, 48]), strict=True):
            model(x).sum().backward()
            assert model.ssprop.keep_counts.tolist() == rows
            assert [kept_rows(model.first), kept_rows(model.second)] == rows

    def test_a_model_registered_after_another_has_run(self):
        scheduler = SparsityScheduler(bar(0.5, period=3))
        first = ssprop_compile(Net(), scheduler, config=EXACT, backend="aot_eager")
        scheduler.load_state_dict({"last_step": 2})
        first(images()).sum().backward()
        second = ssprop_compile(Net(64), scheduler, config=EXACT, backend="aot_eager")
        # The first model must read its keep counts from their new place.
        scheduler.schedule = constant(0.75)
        scheduler.step()
        for model, rows in ((first, [8, 16]), (second, [16, 32])):
            model.zero_grad()
            model(images()).sum().backward()
            assert [kept_rows(model.first), kept_rows(model.second)] == rows

    def test_the_rate_of_the_forward_holds_for_its_backward(self):
        scheduler = SparsityScheduler(lambda step: [0.5, 0.75][step])
        model = ssprop_compile(Net(), scheduler, config=EXACT, backend="aot_eager")
        loss = model(images()).sum()
        scheduler.step()
        loss.backward()
        assert [kept_rows(model.first), kept_rows(model.second)] == [16, 32]


class TestNoEffect:
    def test_a_model_without_convolutions_warns_at_once(self):
        with pytest.warns(NoEffectWarning, match="no layer of the model .* no linear layer"):
            compiled(nn.BatchNorm1d(4))

    def test_a_model_whose_layers_are_all_excluded_says_why(self):
        config = SparsityConfig(min_channels=64, filter_fn=lambda module, fqn: fqn != "0")
        model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 8, 3))
        with pytest.warns(NoEffectWarning, match=r"fewer than min_channels=64 .*; filtered out by"):
            compiled(model, config=config)

    def test_a_model_whose_sites_are_all_left_dense_warns_once(self):
        class Borrowing(nn.Module):
            """Its convolution takes a computed weight, outside the layer."""

            def __init__(self):
                super().__init__()
                self.layer = nn.Conv2d(32, 32, 3)

            def forward(self, x):
                return nn.functional.conv2d(x, self.layer.weight.tanh())

        model = compiled(Borrowing())
        x = torch.randn(2, 32, 8, 8)
        with pytest.warns(NoEffectWarning, match="no site .* made sparse.*; its module owns no"):
            model(x).sum().backward()
        # NoEffectWarning is an error in tests, so a second one would raise.
        model(x).sum().backward()
        assert [site.reason for site in report(model).sites] == [
            "its module owns no weight of this kind",
            "its backward has a form that no kind of site knows",
        ]

    def test_it_still_trains(self):
        with pytest.warns(NoEffectWarning):
            model = compiled(nn.BatchNorm1d(4))
        model(torch.randn(2, 4)).sum().backward()
        assert model.weight.grad is not None


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": nn.Conv2d}, TypeError, "model must be a torch.nn.Module, got type"),
            ({"model": torch.relu}, TypeError, "model must be a torch.nn.Module, got builtin"),
            ({"scheduler": constant(0.5)}, TypeError, "scheduler must be a SparsityScheduler"),
            ({"scheduler": 0.5}, TypeError, "scheduler must be a SparsityScheduler, got float"),
            ({"config": {"min_channels": 1}}, TypeError, "config must be a SparsityConfig"),
            ({"backend": "eager"}, ValueError, "backend must be one of ('inductor', 'aot_eager')"),
            ({"backend": None}, ValueError, "backend must be one of"),
            ({"backend": "aot_eager", "mode": "default"}, ValueError, "mode and options are"),
            ({"backend": "aot_eager", "options": {}}, ValueError, "mode and options are"),
            ({"mode": "default", "options": {"dce": True}}, ValueError, "mode and options exclude"),
        ],
    )
    def test_names_the_argument(self, arguments, error, message):
        arguments = {"model": Net(), "scheduler": SparsityScheduler(constant(0.5)), **arguments}
        with pytest.raises(error) as caught:
            ssprop_compile(**arguments)
        assert str(caught.value).startswith(message)

    def test_a_refused_call_leaves_the_scheduler_as_it_was(self):
        scheduler = SparsityScheduler(constant(0.5))
        with pytest.raises(ValueError, match="backend"):
            ssprop_compile(Net(), scheduler, backend="eager")
        assert scheduler.keep_counts.shape == (0,)

    def test_all_but_model_and_scheduler_are_keywords(self):
        with pytest.raises(TypeError, match="positional"):
            ssprop_compile(Net(), SparsityScheduler(constant(0.5)), EXACT)
