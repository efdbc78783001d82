"""`python -m benchmarks step --axis sample`: steps whose backward is made of some samples.

Rows: dense torch.compile; the same with the passes of a sliced step that leave nothing out
(`dense exact passes`), which shows their part of the gain; the sliced backward at drop rate 0 (its
dense phase) and at the given drop rates; the same in two passes (`saved="kept"`), and in each
--variant. --rule adds a rule that draws as many samples. --peers adds selective backprop, eager and
compiled. --other-checkout adds `axis="sample"` of another commit.

    bound    T / (F + q B), with forward F and backward B of the dense step, T = F + B, and the
             share q of samples kept
    share    speed-up over bound

Choose a batch size of which every drop rate keeps a whole number of samples.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from benchmarks.dense_kernels import exact_passes
from benchmarks.machine import describe
from benchmarks.phases import CLOCKS, OtherCheckout, OtherStep, PhasedStep, Step
from benchmarks.results import table
from benchmarks.sample_row import FORMATS_OF_SAMPLES, Phases, SampleRow
from benchmarks.selective import selective_variants
from benchmarks.timing import alternate
from benchmarks.variants import DENSE, Variant, make_variants
from benchmarks.workload import Workload
from ssprop_fx import AddedNoise, SparsityConfig, SparsityScheduler, ssprop_compile
from ssprop_fx.scheduling.keep_counts import keep_count

__all__ = ["CONFIGS", "measure"]

EXACT = "dense exact passes"
CONFIGS = {
    "sliced": SparsityConfig(axis="sample"),
    "two passes": SparsityConfig(axis="sample", saved="kept"),
}


def measure(
    workload: Workload,
    drop_rates: Sequence[float],
    rounds: int,
    configs: Mapping[str, SparsityConfig] = CONFIGS,
    with_peers: bool = False,
    clock: str = "wall time",
    other: str | None = None,
    with_rule: bool = False,
) -> list[SampleRow]:
    """Measure every variant of a workload's step and print the table.

    Args:
        workload: the model and its input.
        drop_rates: drop rates of the sparse variants, each above 0.
        rounds: timed steps of each row.
        configs: configurations of the sparse variants, by name.
        with_peers: add the peers.
        clock: name of the clock, one of `phases.CLOCKS`.
        other: another checkout, to add its `axis="sample"`.
        with_rule: add a rule that keeps as many samples at each drop rate.

    Returns:
        The rows, dense first.
    """
    size = workload.batch_size
    for rate in drop_rates:
        if abs(keep_count(size, rate) - (1 - rate) * size) > 1e-6:
            print(f"note: drop rate {rate:g} keeps {keep_count(size, rate)} of {size} samples")
    model, images = workload.build()
    torch._dynamo.reset()
    with ExitStack() as stack:
        # Every variant recompiles the same code, and none may silently fall back to eager.
        limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
        stack.enter_context(limits)
        variants = make_variants(workload, model, images, configs, drop_rates, with_peers=False)
        variants += _with_exact_passes(workload, model, images)
        if with_rule:
            variants += [_by_rule(workload, model, images, rate) for rate in drop_rates]
        if with_peers:
            variants += selective_variants(workload, model, images, drop_rates)
        steps: dict[tuple[str, float], Step] = {
            (v.name, v.drop_rate): PhasedStep(v, workload.device, CLOCKS[clock]) for v in variants
        }
        if other:
            checkout = stack.enter_context(OtherCheckout(other, workload, [*drop_rates], clock))
            steps |= {(checkout.name, rate): OtherStep(checkout, rate) for rate in drop_rates}
        first_s = {}
        for (name, rate), step in steps.items():
            start = time.perf_counter()
            step()
            first_s[name, rate] = time.perf_counter() - start
            print(f"first step, {name} {rate:g}: {first_s[name, rate]:.1f} s", flush=True)
        names = {f"{name} {rate}": step for (name, rate), step in steps.items()}
        alternate(names, rounds, warmup=1)
        timings = {key: Phases.of(step.phases[-rounds:]) for key, step in steps.items()}
        rows = [
            SampleRow.of(
                workload,
                *key,
                keep_count(size, key[1]),
                timings[key],
                timings[DENSE, 0.0],
                step.peak_mib(),
                first_s[key],
                clock,
            )
            for key, step in steps.items()
        ]
    print(f"\n{workload.title}, {clock}, medians of {rounds} rounds")
    print(table(rows, FORMATS_OF_SAMPLES))
    print(describe(workload.device))
    return rows


def _with_exact_passes(workload: Workload, model: nn.Module, images: Tensor) -> list[Variant]:
    """Return the dense step with the passes that make a sliced one faster without sparsity."""
    if workload.backend != "inductor":
        return []
    exact = torch.compile(model, options={"joint_custom_pre_pass": exact_passes()})
    return [Variant(EXACT, 0.0, model, lambda: workload.step(exact, images))]


def _by_rule(workload: Workload, model: nn.Module, images: Tensor, rate: float) -> Variant:
    """Return a step whose rule wants all samples, and whose budget is the drop rate's."""
    rule = AddedNoise(1e-9, budget=1 - rate)
    compiled = ssprop_compile(
        model,
        SparsityScheduler(controller=rule),
        config=CONFIGS["sliced"],
        backend=workload.backend,
    )
    return Variant("by rule", rate, model, lambda: workload.step(compiled, images))
