"""The stages of `gpu`: their rows and formulas, and a rehearsal of all of them on a CPU."""

import doctest
import importlib
import json
import math
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_runs import parse
from torch.autograd import DeviceType

import benchmarks.gpu
from benchmarks.backward_time import BackwardTime
from benchmarks.gpu import cifar, kernels, pack, stages, study
from benchmarks.gpu.kernels import KernelRow, kind_of, missing
from benchmarks.gpu.learner import Learner, Recipe
from benchmarks.gpu.row import bound_of
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.steps import CHANNELS, EAGER, SLICED, TWO_PASSES, StepStage
from benchmarks.gpu.study import summaries
from benchmarks.results import read
from benchmarks.sample_row import Phases
from benchmarks.study.data import CLASSES
from ssprop_fx import SparsityScheduler, constant

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


def run_row(row: str, seed: int, accuracy: float, seconds: float) -> dict:
    epochs = int(row.split()[1]) if row.startswith("dense") else 20
    kept = 1.0 if row.startswith("dense") else 0.5
    figures = {"accuracy": accuracy, "seconds": seconds, "kept": kept}
    return {"row": row, "epochs": epochs, "seed": seed, **figures}


def test_rows_gain_over_dense_training_of_the_same_time() -> None:
    rows = [
        *(run_row("dense 20", seed, 94.0 + seed, 40) for seed in (0, 1)),
        *(run_row("dense 10", seed, 92.0 + seed, 20) for seed in (0, 1)),
        *(run_row("rule", seed, 94.0 + seed, 30) for seed in (0, 1)),
        # This seed was cut off.
        run_row("dense 20", 2, 0.0, 1),
    ]
    long, short, rule = summaries(rows)
    assert (long.accuracy, long.seeds, long.cost, long.gain) == (94.5, 2, 20, 0)
    assert (short.cost, short.gain) == (10, 0)
    # Half way between the two, dense training reaches 93.5.
    assert (rule.cost, rule.gain, rule.kept) == (15, 1.0, 0.5)
    assert rule.deviation == pytest.approx(math.sqrt(0.5))


def test_a_single_cut_seed_is_shown() -> None:
    (only,) = summaries([run_row("dense 20", 1, 90.0, 40)])
    assert (only.accuracy, only.deviation) == (90, 0)


def test_each_seed_is_a_run_of_its_own() -> None:
    """The same seed gives the same weights, also after another run of the same network."""
    images = cifar.digits()
    recipe = Recipe(batch_size=320, lr=0.05, backend="aot_eager")
    learner = Learner(images, recipe, True, SparsityScheduler(constant(0.5)))
    first, other, again = (learner.train(1, seed) for seed in (1, 2, 1))
    assert first.accuracy == again.accuracy
    assert first.accuracy != other.accuracy
    assert first.kept == 0.5
    dense = Learner(images, recipe, True, None).train(1, 1)
    assert dense.kept == 1
    assert dense.accuracy != first.accuracy


def test_batches_are_windows_of_the_images() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8).expand(-1, 3, -1, -1)
    labels = torch.arange(4)
    data = cifar.Images(images, labels, images, labels)
    (batch,) = [images for images, found in data.epoch(3) if len(found) == 3]
    assert batch.shape == (3, 3, 8, 8)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    # Neighbours in a row differ by one step of the image, to the right or, flipped, to the left;
    # at the mirrored edge the direction turns.
    steps = (batch[:, 0, :, 1:] - batch[:, 0, :, :-1]) * (255 * cifar._STD)
    assert set(steps.round().flatten().tolist()) <= {1.0, -1.0}
    (whole,) = [images for images, _ in data.tests(4)]
    pixels = whole * (255 * cifar._STD) + 255 * cifar._MEAN
    assert torch.equal(pixels.round().byte(), images)


def test_packed_images_are_those_of_the_archive(tmp_path: Path) -> None:
    from PIL import Image

    archive = tmp_path / "cifar10.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for number, name in enumerate(CLASSES):
            for split, count in (("train", 2), ("test", 1)):
                for index in range(count):
                    jpeg = BytesIO()
                    shade = 20 * number + index
                    Image.new("RGB", (32, 32), (shade, shade, shade)).save(jpeg, "JPEG")
                    file.writestr(f"{split}/{name}/{index}.jpg", jpeg.getvalue())
    cifar.pack(archive, tmp_path / "cifar10.pt")
    images = cifar.load(tmp_path / "cifar10.pt")
    assert (images.train.shape, images.test.shape) == ((20, 3, 32, 32), (10, 3, 32, 32))
    assert images.train_labels.tolist() == [label for label in range(10) for _ in range(2)]
    shades = images.train[:, 0, 0, 0].tolist()
    assert shades == [20 * number + index for number in range(10) for index in range(2)]
    with zipfile.ZipFile(archive, "w"):
        pass
    with pytest.raises(ValueError, match="has no images in train/airplane"):
        cifar.pack(archive, tmp_path / "none.pt")


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


def test_the_study_needs_data(tmp_path: Path) -> None:
    args = parse(["gpu-study", "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="--data must be a file"):
        args.run(args)


def test_the_shares_of_the_stages_are_ten_minutes() -> None:
    for whole in (stages.STAGES, study.SEEDS):
        assert sum(stage.seconds for stage in whole) == 600


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


@pytest.mark.slow
def test_a_rehearsal_of_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--device", "cpu", "--tiny", "--minutes", "20", "--output", str(tmp_path / "study")]
    args = parse(["gpu-study", *where])
    with pytest.raises(SystemExit) as end:
        args.run(args)
    assert end.value.code == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert all(f"\n{rule} " in printed for rule in study.RULES)
    content = json.loads((tmp_path / "study" / "gpu-seed3.json").read_text())
    assert len(content["rows"]) == len(study.EPOCHS) + len(study.RULES)
    assert sys.executable in printed
