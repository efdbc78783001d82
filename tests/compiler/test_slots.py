"""Keep counts, and the numbering of a model's slots."""

from decimal import Decimal

import pytest
import torch
from oracle import SMALLEST
from ssprop_passes.sites.site import MIN_KEEP_COUNT, Slot
from torch import nn

from ssprop_fx import SparsityConfig
from ssprop_fx.compiler.slots import find_slots
from ssprop_fx.config import TARGETS
from ssprop_fx.scheduling.keep_counts import keep_count

RATES = [0.0, 0.05, 0.1, 0.2, 1 / 3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99, 0.999]


class TestKeepCount:
    @pytest.mark.parametrize("hundredth", range(100))
    def test_multiple_1_is_the_published_rule(self, hundredth):
        """The published code is given the share kept, such as 0.2, and not the drop rate."""
        share_kept, drop_rate = (100 - hundredth) / 100, hundredth / 100
        for channels in range(MIN_KEEP_COUNT, 4097):
            published = max(int(share_kept * channels), 1)
            assert keep_count(channels, drop_rate) == max(published, MIN_KEEP_COUNT)

    @pytest.mark.parametrize("rate", RATES)
    @pytest.mark.parametrize("multiple", [2, 8, 16, 24])
    def test_other_multiples_round_to_the_nearest(self, rate, multiple):
        for channels in range(multiple, 2049, multiple):
            kept = keep_count(channels, rate, multiple)
            assert kept % multiple == 0
            # The smallest keep count is one multiple, however high the drop rate.
            wanted = max(float(1 - Decimal(str(rate))) * channels, multiple)
            assert abs(kept - wanted) <= multiple / 2

    @pytest.mark.parametrize("rate", RATES)
    @pytest.mark.parametrize("multiple", [1, 2, 8, 16, 24])
    def test_bounds(self, rate, multiple):
        for channels in range(1, 600):
            kept = keep_count(channels, rate, multiple)
            assert isinstance(kept, int)
            assert min(multiple, channels) <= kept <= channels

    @pytest.mark.parametrize("multiple", [1, 8, 16])
    def test_drop_rate_0_keeps_all_channels(self, multiple):
        for channels in range(multiple, 600, multiple):
            assert keep_count(channels, 0.0, multiple) == channels

    @pytest.mark.parametrize("multiple", [1, 8, 16])
    def test_a_higher_drop_rate_never_keeps_more(self, multiple):
        for channels in range(1, 300):
            kept = [keep_count(channels, rate, multiple) for rate in RATES]
            assert kept == sorted(kept, reverse=True)

    def test_halves_round_up(self):
        assert keep_count(64, 0.625, multiple=16) == 32
        assert keep_count(64, 0.875, multiple=16) == 16

    @pytest.mark.parametrize("rate", RATES)
    def test_auto_is_8_and_from_256_channels_on_16(self, rate):
        for channels in range(32, 1025):
            multiple = 8 if channels < 256 else 16
            assert keep_count(channels, rate, "auto") == keep_count(channels, rate, multiple)


def slots_of(model: nn.Module, **config) -> dict[str, int]:
    """Channels of each slot, by name, in order."""
    table = find_slots(model, SparsityConfig(**{"min_channels": 1, **config}))
    assert [slot.index for slot in table.slots] == list(range(len(table.slots)))
    return {slot.name: slot.channels for slot in table.slots}


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # Slots follow `named_modules()`, not the order of use.
        self.second = nn.Conv2d(channels, 2 * channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.first = nn.Conv2d(3, channels, 3)


class TestFindSlots:
    def test_order_and_names_are_those_of_named_modules(self):
        model = nn.Sequential(Block(8), nn.Conv2d(16, 4, 1), nn.Sequential(Block(32)))
        found = slots_of(model)
        assert list(found.items()) == [
            ("0.second", 16),
            ("0.first", 8),
            ("1", 4),
            ("2.0.second", 64),
            ("2.0.first", 32),
        ]
        assert list(found) == [name for name, _ in model.named_modules() if name in found]

    def test_a_model_that_is_itself_a_layer(self):
        table = find_slots(nn.Conv2d(3, 64, 3), SparsityConfig())
        assert table.slots == (Slot(index=0, name="", channels=64),)

    @pytest.mark.parametrize("groups", [1, 4])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_channels_are_those_of_the_output(self, dims, groups):
        conv = getattr(nn, f"Conv{dims}d")(8, 32, 3, groups=groups)
        transposed = getattr(nn, f"ConvTranspose{dims}d")(8, 32, 3, groups=groups)
        assert slots_of(nn.Sequential(conv, transposed)) == {"0": 32, "1": 32}

    def test_depthwise(self):
        model = nn.Sequential(nn.Conv2d(24, 24, 3, groups=24))
        targets = ("conv", "linear")
        assert slots_of(model) == {"0": 24}
        assert slots_of(model, targets=targets) == {}
        excluded = find_slots(model, SparsityConfig(targets=targets)).excluded
        assert excluded == {"0": "depthwise layers are not among the targets"}

    def test_layers_of_other_kinds_get_none(self):
        model = nn.Sequential(
            nn.BatchNorm2d(8),
            nn.LayerNorm([8, 8]),
            nn.Embedding(8, 8),
            nn.PReLU(8),
            nn.LSTM(8, 8),
            nn.ReLU(),
        )
        table = find_slots(model, SparsityConfig(min_channels=1))
        assert table.slots == ()
        assert table.excluded == {}

    def test_a_layer_that_has_not_seen_its_input_is_an_error(self):
        with pytest.raises(ValueError, match="model must have all its weights, but '0'"):
            slots_of(nn.Sequential(nn.LazyConv2d(32, 3), nn.Conv2d(32, 16, 1)))

    def test_weights_that_are_not_of_a_convolution_get_none(self):
        assert slots_of(nn.Sequential(nn.Bilinear(8, 8, 64), nn.LayerNorm([64, 8, 8]))) == {}

    def test_a_convolution_of_the_users_own(self):
        class Standardized(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(48, 3, 3, 3))

        assert slots_of(nn.Sequential(Standardized())) == {"0": 48}

    def test_a_parametrized_convolution(self):
        conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 48, 3))
        assert slots_of(nn.Sequential(conv)) == {"0": 48}

    def test_a_shared_module_gets_one_slot(self):
        shared = nn.Conv2d(8, 8, 1)
        model = nn.Sequential(nn.Conv2d(3, 8, 1), shared, nn.ReLU(), shared)
        assert slots_of(model) == {"0": 8, "1": 8}

    def test_an_error_in_filter_fn_names_it_and_the_layer(self):
        def fail(module, name):
            raise AttributeError("no stride")

        with pytest.raises(
            RuntimeError,
            match=r"^filter_fn failed for the layer '0' with AttributeError: no stride",
        ):
            find_slots(nn.Sequential(nn.Linear(8, 8)), SparsityConfig(filter_fn=fail))

    def test_filter_fn_is_called_with_the_module_and_its_name(self):
        model = nn.Sequential(Block(8), nn.ReLU(), nn.Linear(4, 4))
        calls = []

        def is_wanted(module, fqn):
            calls.append((module, fqn))
            return fqn != "0.second"

        table = find_slots(model, SparsityConfig(min_channels=1, filter_fn=is_wanted))
        assert [slot.name for slot in table.slots] == ["0.first", "2"]
        assert table.excluded == {"0.second": "filtered out by filter_fn"}
        layers = [(model[0].second, "0.second"), (model[0].first, "0.first"), (model[2], "2")]
        assert calls == layers

    def test_min_channels_is_the_smallest_that_takes_part(self):
        model = nn.Sequential(nn.Conv2d(3, 31, 1), nn.Conv2d(31, 32, 1), nn.Conv2d(32, 33, 1))
        table = find_slots(model, SparsityConfig(min_channels=32))
        assert [slot.name for slot in table.slots] == ["1", "2"]
        assert table.excluded == {"0": "fewer than min_channels=32 output channels"}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 64), nn.Linear(64, 1000)

    def get_classifier(self):
        return self.head


def test_the_classifier_of_a_timm_model_stays_dense_unless_filter_fn_decides():
    table = find_slots(Classifier(), SparsityConfig())
    assert [slot.name for slot in table.slots] == ["body"]
    assert table.excluded == {"head": "the classifier"}
    table = find_slots(Classifier(), SparsityConfig(filter_fn=lambda module, fqn: True))
    assert [slot.name for slot in table.slots] == ["body", "head"]


@pytest.mark.parametrize(
    ("layer", "channels", "groups"),
    [
        (nn.Conv2d(8, 48, 1, groups=4), 48, 4),
        (nn.Conv2d(8, 48, 1, groups=8), 48, 1),
        (nn.ConvTranspose2d(8, 48, 1, groups=4), 48, 4),
        (nn.ConvTranspose1d(8, 48, 1, groups=8), 48, 1),
        (nn.Conv1d(1, 48, 1), 48, 1),
        (nn.Linear(8, 48), 48, 1),
    ],
)
def test_channels_are_selected_within_groups_but_across_a_depthwise_layer(layer, channels, groups):
    (slot,) = find_slots(layer, SparsityConfig(min_channels=1, targets=TARGETS)).slots
    assert (slot.channels, slot.groups) == (channels, groups)


def test_the_projection_inside_multi_head_attention_stays_dense():
    table = find_slots(nn.MultiheadAttention(64, 2), SparsityConfig())
    assert table.slots == ()
    assert set(table.excluded) == {"", "out_proj"}


@pytest.mark.parametrize(
    ("channels", "drop_rate", "multiple", "groups", "expected"),
    [
        (64, 0.8, 1, 4, 3),  # max(int(0.2 * 16), 1)
        (64, 0.95, 1, 8, 1),
        (128, 0.8, 16, 8, 4),  # 3.2 of 16, in steps of 2
        (320, 0.8, 16, 20, 4),  # 20 groups of 4 are 80, a multiple of 16
        (256, 0.8, 16, 32, 2),  # 32 groups of any size are
        (24, 0.8, 16, 3, 8),  # no smaller multiple of 16 than all
        (128, 0.8, "auto", 8, 3),  # all together, 24 are a multiple of 8
        (320, 0.8, "auto", 20, 4),
    ],
)
def test_keep_counts_of_groups(channels, drop_rate, multiple, groups, expected):
    assert keep_count(channels, drop_rate, multiple, groups) == max(expected, SMALLEST)
    kept = groups * keep_count(channels, drop_rate, multiple, groups)
    assert kept == channels or kept % (8 if multiple == "auto" else multiple) == 0
