"""inspect_sites: predicts what sparse back-propagation does to a model, without running it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ssprop_passes.sites.site import Site
from torch import fx, nn

from ssprop_fx.compiler.slots import find_slots
from ssprop_fx.config import SparsityConfig
from ssprop_fx.scheduling.keep_counts import keep_count

__all__ = ["Inspection", "inspect_sites"]


@dataclass(frozen=True)
class Inspection:
    """The predicted sites of a model; prints as a table.

    Attributes:
        sites: the predicted sites, in backward order.
        backward_flops: floating-point operations of all backward convolutions and matrix products
            for one batch if they were dense.
        channel_multiple: keep counts are rounded to multiples of this; see `keep_count`.
        uncaptured: layers that take part but are in no graph that Dynamo captured. Either the model
            does not call them, or Dynamo cannot follow the call. They train dense. If the model
            does call them, `backward_flops` lacks their FLOPs.
        block: keep counts are multiples of this as well.
        rates: drop rate of each layer that has its own, by name.
    """

    sites: tuple[Site, ...]
    backward_flops: int
    channel_multiple: int | Literal["auto"]
    uncaptured: tuple[str, ...] = ()
    block: int = 1
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def sparse_sites(self) -> tuple[Site, ...]:
        """The sites that would become sparse."""
        return tuple(site for site in self.sites if not site.reason)

    @property
    def covered(self) -> float:
        """FLOPs of the gradients that become sparse, at full size, as a share of the backward's."""
        return self.share(sum(site.sparse_flops for site in self.sites))

    def share(self, flops: int) -> float:
        """Return a number of FLOPs as a share of the backward's."""
        return flops / self.backward_flops if self.backward_flops else 0.0

    def kept_at(self, site: Site, drop_rate: float) -> int:
        """Return how many channels a site keeps, in all its groups together.

        Args:
            site: one of `sites`.
            drop_rate: fraction in [0, 1) left out. If it is above 0, a layer's own rate replaces
                it.

        Returns:
            Channels kept; all channels if the site stays dense or `drop_rate` is 0.

        Raises:
            ValueError: `drop_rate` is out of range.
        """
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate!r}")
        if site.reason or drop_rate == 0:
            return site.channels
        rate = self.rates.get(site.name, drop_rate)
        of_group = keep_count(site.channels, rate, self.channel_multiple, site.groups, self.block)
        return of_group * site.groups

    def saved_at(self, drop_rate: float) -> float:
        """Return the share of the backward's FLOPs that a drop rate saves.

        Args:
            drop_rate: fraction in [0, 1).

        Returns:
            The share, in [0, 1), with rounded keep counts. Dense sites count in the total.

        Raises:
            ValueError: `drop_rate` is out of range.
        """
        return self.share(
            sum(site.saved_flops(self.kept_at(site, drop_rate)) for site in self.sites)
        )

    def table(self, drop_rates: Sequence[float] = ()) -> str:
        """Return a table of the sites and their totals.

        Args:
            drop_rates: each adds a column of keep counts, and a line with the FLOPs saved.
        """
        kept_columns = "".join(f" {f'k@{rate:g}':>7}" for rate in drop_rates)
        names = [site.name or "(no layer)" for site in self.sites]
        width = max([len("site"), *map(len, names)])
        lines = [f"{'site':{width}}  {'kind':16} {'C':>5} {'groups':>6} {'FLOPs':>6}{kept_columns}"]
        lines[0] += "  state"
        for name, site in zip(names, self.sites, strict=True):
            kept = "".join(f" {self.kept_at(site, rate):7}" for rate in drop_rates)
            state = f"dense: {site.reason}" if site.reason else "sparse"
            lines.append(
                f"{name:{width}}  {site.kind:16} {site.channels:5} {site.groups:6}"
                f" {self.share(site.flops):6.1%}{kept}  {state}"
            )
        lines.append(
            f"{len(self.sparse_sites)} of {len(self.sites)} sites sparse, with {self.covered:.1%}"
            f" of the backward's {self.backward_flops / 1e9:.3g} GFLOPs"
        )
        lines += [
            f"  {kind}: {len(sites)} sites, {sum(not site.reason for site in sites)} sparse,"
            f" {self.share(sum(site.flops for site in sites)):.1%} of the backward's FLOPs"
            for kind, sites in self.by_kind().items()
        ]
        is_auto = self.channel_multiple == "auto"
        multiples = "8, or 16 from 256 channels on" if is_auto else self.channel_multiple
        lines += [
            f"drop rate {rate:g}: {self.saved_at(rate):.1%} of the backward's FLOPs saved"
            f" (keep counts in multiples of {multiples})"
            for rate in drop_rates
        ]
        if self.uncaptured:
            lines.append(
                f"{len(self.uncaptured)} layers are called in no captured graph, so they stay dense"
                f" and may be missing from the total: {', '.join(self.uncaptured)}"
            )
        return "\n".join(lines)

    def by_kind(self) -> dict[str, tuple[Site, ...]]:
        """Return the sites of each kind; the kind with the most sites comes first."""
        kinds = Counter(site.kind for site in self.sites)
        return {
            kind: tuple(site for site in self.sites if site.kind == kind)
            for kind, _ in kinds.most_common()
        }

    def __str__(self) -> str:
        return self.table()


def inspect_sites(
    model: nn.Module, inputs: Any, *, config: SparsityConfig | None = None
) -> Inspection:
    """Predict what sparse back-propagation does to a model, without running the model.

    A copy of the model, in train mode and with fake tensors, is captured as `ssprop_compile` would
    capture it. This does no arithmetic and compiles no code, so the largest model takes seconds;
    parameters on the meta device take no memory. The model does not change. If Dynamo splits it
    into several graphs, all of them count.

    Args:
        model: the model; its tensors may be real, fake or on the meta device.
        inputs: the model's inputs: a tensor, a tuple of positional arguments or a dict of keyword
            arguments. Tensors may be real, fake or on the meta device. Batch norm needs a batch of
            at least 2 in train mode.
        config: which layers take part; `SparsityConfig()` by default.

    Returns:
        The inspection; `print` it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the model has layers whose weights do not exist yet, or `config` has
            `axis="sample"`.
        CaptureError: the model cannot be captured without the values of its tensors.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), nn.ReLU(), nn.Conv2d(64, 32, 1))
        >>> inspection = inspect_sites(model, torch.empty(2, 3, 8, 8, device="meta"))
        >>> [(site.name, inspection.kept_at(site, 0.75)) for site in inspection.sites]
        [('2', 8), ('0', 16)]
        >>> round(inspection.saved_at(0.75), 3)
        0.75
    """
    # These import the compiler, which takes seconds.
    from ssprop_passes.sites.find import find_sites

    from ssprop_fx.analysis.fake_capture import capture_joint_graphs

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if config is not None and not isinstance(config, SparsityConfig):
        raise TypeError(f"config must be a SparsityConfig or None, got {type(config).__name__}")
    model = getattr(model, "_orig_mod", model)
    config = config or SparsityConfig()
    if config.axis != "channel":
        raise ValueError(
            'config must have axis="channel": with axis="sample" the whole backward saves the drop'
            f" rate, so there is nothing to predict; got {config.axis!r}"
        )
    table = find_slots(model, config)
    slots = {slot.name: slot for slot in table.slots}
    sites: list[Site] = []
    total_flops = 0

    def visit(graph: fx.Graph) -> None:
        nonlocal total_flops
        found, flops = find_sites(graph, slots, table.excluded, config.selection)
        sites.extend(site for _, site in found)
        total_flops += flops

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(inputs, dict):
        kwargs = inputs
    else:
        args = inputs if isinstance(inputs, tuple) else (inputs,)
    captured = capture_joint_graphs(model, args, kwargs, visit)
    return Inspection(
        sites=tuple(sites),
        backward_flops=total_flops,
        channel_multiple=config.channel_multiple,
        uncaptured=tuple(name for name in slots if name not in captured),
        block=config.block,
        rates=table.rates,
    )
