"""The stages of `gpu`: their rows and formulas, and a rehearsal of all of them on a CPU."""

import doctest
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_runs import parse
from torch._dynamo.utils import counters
from torch.autograd import DeviceType

import benchmarks.gpu
from benchmarks.backward_time import BackwardTime
from benchmarks.gpu import ahead, kernels, pack, stages, study
from benchmarks.gpu.ahead import Task
from benchmarks.gpu.kernels import KernelRow, kind_of, missing
from benchmarks.gpu.row import bound_of
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.steps import (
    CHANNELS,
    EAGER,
    SLICED,
    TWO_PASSES,
    Group,
    StepStage,
    compiled_variants,
    dense_variant,
)
from benchmarks.results import read
from benchmarks.sample_row import Phases
from benchmarks.workload import Workload

FOLDER = Path(benchmarks.gpu.__file__).parent
DENSE = Phases.of([(30.0, 60.0)])


@pytest.mark.parametrize("path", [p.stem for p in FOLDER.glob("[!_]*.py")])
def test_examples_in_docstrings_run(path: str) -> None:
    assert doctest.testmod(importlib.import_module(f"benchmarks.gpu.{path}")).failed == 0


def test_bounds() -> None:
    def bound(group: object, rate: float) -> float:
        return bound_of(group.config, rate, 10, DENSE, BackwardTime(conv_ms=45.0))

    assert bound(EAGER, 0.0) == 1
    assert bound(SLICED, 0.5) == 90 / (30 + 0.5 * 60)
    assert bound(TWO_PASSES, 0.5) == pytest.approx(90 / (30 + 0.5 * 90))
    assert bound(CHANNELS, 0.8) == 90 / (90 - 0.8 * 45)


def test_a_variant_that_fails_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import steps

    real = steps.compiled_variants

    def compiled_variants(*args: object) -> list:
        if SLICED in args:
            raise ValueError("no such kernel")
        return real(*args)

    monkeypatch.setattr(steps, "compiled_variants", compiled_variants)
    settings = Settings("cpu", True, tmp_path)
    with pytest.raises(RuntimeError, match=r"^failed: sliced$"):
        StepStage("resnet50", 256, (SLICED, EAGER))(settings, "m")
    rows = read(tmp_path / "gpu-m.json")
    assert [row["variant"] for row in rows] == ["dense", "eager"]
    assert (rows[0]["speedup"], rows[0]["waits"]) == (1, 0)
    assert all(row["share"] == row["speedup"] / row["bound"] for row in rows)
    assert all(min(row["forward_ms"], row["backward_ms"], row["peak_mib"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_red_fused_convolution_backward_3", "Inductor, sums"),
        ("triton_poi_fused_index_relu_0", "Inductor, element-wise"),
        ("void cudnn::engines_precompiled::nhwcToNchwKernel<...>", "change of layout"),
        ("sm90_xmma_wgrad_implicit_gemm_indexed_bf16", "convolution"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad>", "convolution"),
        ("nvjet_hsh_128x256_64x4_TNT", "matrix product"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80", "attention"),
        ("void at::native::index_elementwise_kernel<128, 4>", "gather, scatter"),
        ("Memcpy DtoD (Device -> Device)", "copy, fill"),
        ("void at::native::sbtopk::gatherTopK<float>", "sort"),
        ("something new", "other"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_kernels_of_a_gpu_and_the_time_between_them() -> None:
    def event(name: str, start: float, end: float, device: DeviceType) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(
            name=name, device_type=device, time_range=span, is_user_annotation=False
        )

    gpu = DeviceType.CUDA
    events = [event("a", 0, 1000, gpu), event("b", 3000, 5000, gpu), event("a", 6000, 7000, gpu)]
    events.append(event("aten::mm", 0, 9000, DeviceType.CPU))
    assert kernels._times(events, is_cuda=True) == {"a": (2, 2.0), "b": (1, 2.0), "idle": (0, 3.0)}


def test_what_is_missing_from_the_bound() -> None:
    def row(variant: str, rate: float, phase: str, kind: str, ms: float) -> KernelRow:
        return KernelRow("m", variant, rate, phase, kind, "k", 1, ms)

    rows = [
        row("dense", 0.0, "forward", "sort", 50.0),
        row("dense", 0.0, "backward", "convolution", 40.0),
        row("dense", 0.0, "backward", "convolution", 20.0),
        row("dense", 0.0, "backward", "copy, fill", 10.0),
        row("sliced", 0.5, "backward", "convolution", 31.0),
        row("sliced", 0.5, "backward", "copy, fill", 9.0),
    ]
    assert missing(rows, "sliced", 0.5) == {"copy, fill": 4.0, "convolution": 1.0}


def test_what_travels_is_weighed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pack, "_download", lambda folder, python: folder.mkdir())
    args = parse(["gpu-pack", "--output", str(tmp_path)])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").write_bytes(bytes(3 << 20))
    args.run(args)
    parts = {part.part: part.mib for part in pack.weigh(tmp_path)}
    assert parts["cache"] == 3
    assert 1 < parts["repository"] < 20
    assert parts["together"] == parts["repository"] + 3
    assert f"gpu --minutes 10 --output {tmp_path / 'results'}\n" in capsys.readouterr().out
    (tmp_path / "results").mkdir()
    assert f"gpu --minutes 10 --resume {tmp_path / 'results'}" in pack._commands(tmp_path, False)
    monkeypatch.setattr(pack, "LIMIT_MIB", 2)
    (tmp_path / "wheels").rmdir()
    with pytest.raises(SystemExit, match="more than 2 MiB"):
        args.run(args)


def test_the_shares_of_the_stages_are_ten_minutes() -> None:
    for whole in (stages.STAGES, study.SEEDS):
        assert sum(stage.seconds for stage in whole) == 600


def test_what_compiles_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    todo = ahead.tasks(stages.STAGES)
    assert [task.group for task in todo[:3]] == [None, SLICED, TWO_PASSES]
    assert {task.model for task in todo[:3]} == {"resnet50"}
    assert todo[3] == Task("vit_small_patch16_224", 256, None)
    assert all(task.group in (None, SLICED, TWO_PASSES) for task in todo)
    for cores, compiles in ((4, False), (16, True)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert bool(ahead.command(stages.STAGES, "cuda")) == compiles
    assert ahead.command([s for s in stages.STAGES if s.name == "facts"], "cuda") == []


@pytest.mark.slow
@pytest.mark.parametrize("group", [None, SLICED, TWO_PASSES], ids=["dense", "sliced", "two"])
def test_a_step_that_was_compiled_ahead_is_in_the_cache(group: Group | None) -> None:
    workload = Workload(model="test_resnet", batch_size=10, img_size=32, amp=True)
    settings = SimpleNamespace(is_cuda=False, workload=lambda *_: workload)
    ahead._compile(Task("resnet50", 256, group), settings)
    torch._dynamo.reset()
    counters.clear()
    model, images = workload.build()
    if group is None:
        dense_variant(workload, model, images).step()
    else:
        compiled_variants(workload, model, images, group)[0].step()
    found = counters["inductor"]
    assert found["fxgraph_cache_miss"] == 0
    assert found["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > 0


@pytest.mark.slow
def test_a_rehearsal_of_all_stages(tmp_path: Path) -> None:
    where = ["--device", "cpu", "--tiny", "--minutes", "20", "--output", str(tmp_path / "results")]
    args = parse(["gpu", *where])
    with pytest.raises(SystemExit) as end:
        args.run(args)
    assert end.value.code == 0, (tmp_path / "results" / "gpu-status.json").read_text()
    files = {path.stem: read(path) for path in (tmp_path / "results").glob("*.json")}
    assert {f"gpu-{stage.name}" for stage in stages.STAGES} < files.keys()
    rows = [(row["variant"], row["drop_rate"]) for row in files["gpu-resnet50"]]
    sparse = [(name, rate) for name in ("sliced", "two passes") for rate in (0.5, 0.8)]
    sparse.insert(2, ("channels", 0.8))
    assert rows == [("dense", 0.0), *sparse, ("eager", 0.0)]
    assert {row["variant"] for row in files["gpu-kernels"]} == {"dense", "sliced", "channels"}
    assert {row["outcome"] for row in files["gpu-gradients"]} == {"passed"}
