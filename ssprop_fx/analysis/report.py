"""report: which sites are sparse, their keep counts and savings, and why other sites are dense."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssprop_passes.sites.site import Site
from torch import nn

from ssprop_fx.scheduling.sample_rules import SampleTelemetry

if TYPE_CHECKING:
    from ssprop_fx.runtime.sparse_variant import SparseVariant

__all__ = ["Report", "SiteReport", "report"]


@dataclass(frozen=True)
class SiteReport:
    """One site of a compiled model.

    Attributes:
        name: the layer's name; "" if the site belongs to no layer.
        kind: such as `conv2d`.
        channels: output channels, C.
        kept: channels kept now, in all groups together; C if all are.
        flops: floating-point operations of its dense backward, for one batch.
        reason: why it stayed dense; "" if it is sparse.
        sparse_flops: FLOPs of the gradients that became sparse, at full size; 0 if the site stays
            dense.
        saved_flops: FLOPs that its backward saves at the keep count in force.
    """

    name: str
    kind: str
    channels: int
    kept: int
    flops: int
    reason: str
    sparse_flops: int
    saved_flops: int


@dataclass(frozen=True)
class Report:
    """The sites of a compiled model at the keep counts in force; prints as a table.

    Attributes:
        sites: every site of the sparse variant, in backward order.
        backward_flops: floating-point operations of all backward convolutions and matrix products
            for one batch if they were dense.
        specialized: whether the keep counts were compiled in as constants.
        step: the step of the schedule in force.
        drop_rate: its drop rate.
        kept_samples: how many samples the backward keeps of how many, in the last batch; None with
            `axis="channel"`, and if the backward runs on the whole batch.
        samples: what the last backward kept of its batch; None likewise, and before any.
        patched: number of convolutions that take their gradients from patches.
        patch_flops: FLOPs that this saves in a backward of the whole batch.
    """

    sites: tuple[SiteReport, ...]
    backward_flops: int
    specialized: bool = False
    step: int = 0
    drop_rate: float = 0.0
    kept_samples: tuple[int, int] | None = None
    samples: SampleTelemetry | None = None
    patched: int = 0
    patch_flops: int = 0

    @property
    def sparse_sites(self) -> tuple[SiteReport, ...]:
        """The sites that became sparse."""
        return tuple(site for site in self.sites if not site.reason)

    @property
    def saved_flops(self) -> int:
        """FLOPs that one backward saves at the keep counts in force."""
        saved = sum(site.saved_flops for site in self.sparse_sites)
        if self.kept_samples is not None:
            kept, size = self.kept_samples
            # Products of activations, such as those of attention, shrink as well.
            rest = self.backward_flops - sum(site.flops for site in self.sites)
            saved += rest * (size - kept) // size + self.patch_flops * kept // size
        return saved

    def __str__(self) -> str:
        if not self.sites:
            return (
                "no sparse graph has been compiled: run a training step at a drop rate above 0"
                f" (step {self.step} of the schedule has {self.drop_rate:g})"
            )
        width = max(len("site"), *(len(site.name) for site in self.sites))
        flops = max(self.backward_flops, 1)  # a layer may be used without any product
        lines = [f"{'site':{width}}  {'kind':16} {'C':>5} {'k':>5} {'FLOPs':>6}  state"]
        lines += [
            f"{site.name:{width}}  {site.kind:16} {site.channels:5} {site.kept:5}"
            f" {site.flops / flops:6.1%}  {_state(site)}"
            for site in self.sites
        ]
        if self.kept_samples is not None:
            kept, size = self.kept_samples
            lines.append(
                f"the whole backward of {self.backward_flops / 1e9:.3g} GFLOPs runs on {kept} of"
                f" {size} samples; {self.saved_flops / flops:.1%} saved at step {self.step}"
            )
            if self.patched:
                lines.append(f"{self.patched} convolutions take their gradients from patches")
            if self.samples is not None:
                lines.append(
                    f"the last backward kept {self.samples.kept_mass:.1%} of the sum of the"
                    f" gradients' norms; added noise {self.samples.error:.2f}"
                )
            return "\n".join(lines)
        covered = sum(site.sparse_flops for site in self.sites) / flops
        lines.append(
            f"{len(self.sparse_sites)} of {len(self.sites)} sites sparse, with {covered:.1%} of"
            f" the backward's {self.backward_flops / 1e9:.3g} GFLOPs;"
            f" {self.saved_flops / flops:.1%} saved at step {self.step}, drop rate"
            f" {self.drop_rate:g}, by keep counts that are"
            f" {'constants of the graph' if self.specialized else 'read at run time'}"
        )
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Return what sparse back-propagation does to a compiled model.

    Sites are known after the first training step at a drop rate above 0. If the same layers have
    several sparse graphs (for another batch size, say), the report shows the newest.

    Args:
        model: what `ssprop_compile` returned, the model itself if it was compiled with
            `in_place=True`, or a model compiled with the backend "ssprop" that has run a training
            step.

    Returns:
        The report; `print` it.

    Raises:
        TypeError: `model` is neither of these.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from ssprop_fx import SparsityScheduler, constant, ssprop_compile
        >>> scheduler = SparsityScheduler(constant(0.5))
        >>> model = ssprop_compile(nn.Conv2d(3, 64, 3), scheduler, backend="aot_eager")
        >>> _ = model(torch.randn(2, 3, 8, 8))
        >>> report(model).sites[0].kept
        32
    """
    # These import the compiler, which takes seconds.
    from ssprop_fx.named_backend.autostep import stepped_variant_maybe
    from ssprop_fx.runtime.module import SsPropModule
    from ssprop_fx.runtime.variants import Variants

    variant: SparseVariant | None = None
    if isinstance(model, SsPropModule):
        variant = model.ssprop
    elif isinstance(model, nn.Module):
        in_place = getattr(getattr(model, "_compiled_call_impl", None), "__self__", None)
        if isinstance(in_place, Variants):
            variant = in_place
        else:
            variant = stepped_variant_maybe(getattr(model, "_orig_mod", model))
    if variant is None:
        raise TypeError(
            "model must come from ssprop_compile, or must have run a training step after"
            f' torch.compile(model, backend="ssprop"), got {type(model).__name__}'
        )
    keep_counts, graphs = variant.keep_counts.tolist(), variant.graphs
    whole = variant.why_whole_steps_are_dense
    kept_samples = variant.kept_samples
    return Report(
        sites=tuple(
            _site_report(site, keep_counts, graph.whole or site.reason or whole, kept_samples)
            for graph in graphs
            for site in graph.sites
        ),
        backward_flops=sum(graph.total_flops for graph in graphs),
        specialized=variant.backend.constants is not None,
        step=variant.scheduler.last_step,
        drop_rate=variant.scheduler.drop_rate,
        kept_samples=kept_samples,
        samples=None if kept_samples is None else variant.samples,
        patched=sum(graph.patched for graph in graphs),
        patch_flops=sum(graph.patch_flops for graph in graphs),
    )


def _site_report(
    site: Site, keep_counts: Sequence[int], reason: str, kept_samples: tuple[int, int] | None
) -> SiteReport:
    """Return the report on a site.

    Args:
        site: the site.
        keep_counts: the keep count of each slot.
        reason: why it stays dense; "" if it is sparse.
        kept_samples: k and N if the backward runs on k of N samples.
    """
    kept = site.channels if reason else keep_counts[site.slot] * site.groups
    saved, sparse_flops = site.saved_flops(kept), 0 if reason else site.sparse_flops
    if kept_samples is not None:
        samples, size = kept_samples
        reason, sparse_flops = "", site.flops
        saved = site.flops - (site.flops - saved) * samples // size
    return SiteReport(
        name=site.name,
        kind=site.kind,
        channels=site.channels,
        kept=kept,
        flops=site.flops,
        reason=reason,
        sparse_flops=sparse_flops,
        saved_flops=saved,
    )


def _state(site: SiteReport) -> str:
    return f"dense: {site.reason}" if site.reason else "sparse"
