"""Stages of step times: one model, dense against the variants, in order of worth.

Each variant is compiled, timed in turn with the dense step, and saved before the next one is
compiled. If a variant fails, the others still run.
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.backward_time import BackwardTime, ProfiledStep, linear_products
from benchmarks.gpu.alone import alone
from benchmarks.gpu.events import count_waits, phased
from benchmarks.gpu.row import FORMATS, GpuRow, bound_of
from benchmarks.gpu.settings import Settings
from benchmarks.machine import describe
from benchmarks.results import table
from benchmarks.sample_row import Phases
from benchmarks.timing import alternate, synchronize
from benchmarks.variants import DENSE, Variant, sparse_variants
from benchmarks.workload import Workload
from ssprop_fx import SparsityConfig, SparsityScheduler, constant, join, ssprop_compile
from ssprop_fx.compiler.slots import find_slots

__all__ = ["CHANNELS", "EAGER", "SLICED", "TWO_PASSES", "Group", "StepStage", "compiled_variants"]
__all__ += ["dense_variant"]


@dataclass(frozen=True)
class Group:
    """The rows of one configuration.

    Attributes:
        name: name of the rows.
        config: the configuration; None for a dense step in eager mode.
        drop_rates: its drop rates; one compile serves all of them.
    """

    name: str
    config: SparsityConfig | None
    drop_rates: tuple[float, ...]


SLICED = Group("sliced", SparsityConfig(axis="sample"), (0.5, 0.8))
TWO_PASSES = Group("two passes", SparsityConfig(axis="sample", saved="kept"), (0.5, 0.8))
CHANNELS = Group("channels", SparsityConfig(), (0.8,))
EAGER = Group("eager", None, (0.0,))


def compiled_variants(
    workload: Workload, model: nn.Module, images: Tensor, group: Group, mode: str | None = None
) -> list[Variant]:
    """Return the variants of a group; nothing compiles before their first step.

    Args:
        workload: the workload that built `model` and `images`.
        model: the model.
        images: a batch.
        group: the rows.
        mode: `mode` of `torch.compile`.
    """
    if group.config is None:
        return [Variant(group.name, 0.0, model, lambda: workload.step(model, images))]
    rates = group.drop_rates
    scheduler = SparsityScheduler(join([constant(r) for r in rates], range(1, len(rates))))
    compiled = ssprop_compile(
        model, scheduler, config=group.config, backend=workload.backend, mode=mode
    )
    return list(sparse_variants(workload, model, images, group.name, rates, scheduler, compiled))


def dense_variant(
    workload: Workload, model: nn.Module, images: Tensor, mode: str | None = None
) -> Variant:
    """Return the dense step under `torch.compile`; the arguments are those of the others."""
    module = torch.compile(model, backend=workload.backend, mode=mode)
    return Variant(DENSE, 0.0, model, lambda: workload.step(module, images))


@dataclass(frozen=True)
class StepStage:
    """A stage: calls measure, print and save the rows of one model.

    Attributes:
        model: name of the timm model.
        batch_size: images in a batch.
        groups: the rows, the most telling first.
        modes: values of `mode` of `torch.compile`; each has a dense step of its own.
    """

    model: str
    batch_size: int
    groups: tuple[Group, ...]
    modes: tuple[str | None, ...] = (None,)

    def __call__(self, settings: Settings, name: str) -> None:
        """Run the stage.

        Raises:
            RuntimeError: a variant failed; the rows of the others are saved.
        """
        modes = self.modes[-1:] if settings.is_tiny else self.modes
        # AOT eager takes no mode.
        backend = "aot_eager" if modes == (None,) else "inductor"
        workload = settings.workload(self.model, self.batch_size, backend)
        rows: list[GpuRow] = []

        def keep(more: Sequence[GpuRow]) -> None:
            rows.extend(more)
            settings.save(rows, name)
            print(table(rows, FORMATS), flush=True)

        failed = [
            what
            for mode in modes
            for what in _Measurement(workload, mode, settings.rounds, keep).run(self.groups)
        ]
        print(f"{workload.title}; {describe(settings.device)}")
        if failed:
            raise RuntimeError(f"failed: {', '.join(failed)}")


class _Measurement:
    """The measurement of one model: its dense step, then group after group.

    Args:
        workload: the workload.
        mode: `mode` of `torch.compile`.
        rounds: timed steps of each row.
        keep: is given the rows of each group as soon as they are measured.
    """

    def __init__(
        self,
        workload: Workload,
        mode: str | None,
        rounds: int,
        keep: Callable[[Sequence[GpuRow]], None],
    ) -> None:
        self.workload = workload
        self.mode = mode
        self.rounds = rounds
        self.keep = keep
        self.model, self.images = workload.build()
        self.dense = dense_variant(workload, self.model, self.images, mode)
        self.backward = BackwardTime(conv_ms=0.0)

    def run(self, groups: Sequence[Group]) -> list[str]:
        """Measure all groups; return the names of those that failed."""
        failed = []
        self.keep(self._rows([self.dense], None, {self.dense.key: _first_step(self.dense)}))
        for group in groups:
            try:
                self._measure(group)
            except Exception:
                traceback.print_exc()
                failed.append(group.name)
        return failed

    def _measure(self, group: Group) -> None:
        if group.config is not None and group.config.axis == "channel":
            self.backward = self._backward_time(group.config)
        variants = compiled_variants(self.workload, self.model, self.images, group, self.mode)
        first_s = {variant.key: _first_step(variant) for variant in variants}
        self.keep(self._rows(variants, group.config, first_s))

    def _rows(
        self,
        variants: Sequence[Variant],
        config: SparsityConfig | None,
        first_s: Mapping[str, float],
    ) -> list[GpuRow]:
        """Time variants in turn with the dense step."""
        device = self.workload.device
        everything = {v.key: v for v in [self.dense, *variants]}
        steps = {key: phased(variant, device) for key, variant in everything.items()}
        with alone():
            alternate(steps, self.rounds)
        timings = {key: Phases.of(step.phases[-self.rounds :]) for key, step in steps.items()}
        dense = timings[self.dense.key]
        return [
            GpuRow.of(
                self.workload,
                variant,
                self.mode,
                (timings[variant.key], dense),
                bound_of(config, variant.drop_rate, self.workload.batch_size, dense, self.backward),
                steps[variant.key].peak_mib(),
                count_waits(variant.step),
                first_s[variant.key],
            )
            for variant in variants
        ]

    def _backward_time(self, config: SparsityConfig) -> BackwardTime:
        """Return the part of the dense step's time that channels can reduce."""
        names = [slot.name for slot in find_slots(self.model, config).slots]
        products = linear_products(
            self.model, names, lambda: self.workload.step(self.model, self.images)
        )
        profiled = ProfiledStep(self.dense.step, products, self.workload.device)
        steps = {"dense": phased(self.dense, self.workload.device), "profiled": profiled}
        with alone():
            alternate(steps, rounds=3, warmup=1)
        return profiled.of(Phases.of(steps["dense"].phases[-3:]).step.median)


def _first_step(variant: Variant) -> float:
    """Run a variant's first step, which compiles it; return its seconds."""
    start = time.perf_counter()
    variant.step()
    synchronize()
    seconds = time.perf_counter() - start
    print(f"first step, {variant.key}: {seconds:.1f} s", flush=True)
    return seconds
