"""Every timm module against the oracle: coverage and error.

`python tests/support/sweep.py docs/coverage.md` checks all of them, each in its own process, and
writes the table. `python tests/support/sweep.py --model NAME` checks one and prints its row as
JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from oracle import gradients, oracle_gradients, relative_error
from sample_oracle import kept_gradients, strongest
from ssprop_passes.errors import NoEffectWarning
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.config import TARGETS

# timm module -> models: the smallest, and another if the family has a different kind of block.
MODELS = {
    "beit": ["beit_base_patch16_224"],
    "byoanet": ["halonet_h1"],
    "byobnet": ["test_byobnet", "resnext26ts"],
    "cait": ["cait_xxs24_224"],
    "coat": ["coat_tiny"],
    "convit": ["convit_tiny"],
    "convmixer": ["convmixer_768_32"],
    "convnext": ["test_convnext", "convnext_atto"],
    "cpubone": ["cpubone_nano"],
    "crossvit": ["crossvit_tiny_240"],
    "csatv2": ["csatv2"],
    "cspnet": ["cs3darknet_focus_s"],
    "cspnext": ["cspnext_tiny"],
    "davit": ["davit_tiny"],
    "deepseek_vit": ["deepseek_vit_412m"],
    "deit": ["deit_tiny_patch16_224"],
    "densenet": ["densenet121"],
    "dla": ["dla46x_c"],
    "dpn": ["dpn48b"],
    "edgenext": ["edgenext_xx_small"],
    "efficientformer": ["efficientformer_l1"],
    "efficientformer_v2": ["efficientformerv2_s0"],
    "efficientnet": ["efficientnet_lite0", "mixnet_s"],
    "efficientvim": ["efficientvim_m1"],
    "efficientvit_mit": ["efficientvit_b0"],
    "efficientvit_msra": ["efficientvit_m0"],
    "eva": ["vit_tiny_patch16_dinov3_qkvb"],
    "fasternet": ["fasternet_t0"],
    "fastvit": ["fastvit_t8"],
    "focalnet": ["focalnet_tiny_srf"],
    "gcvit": ["gcvit_xxtiny"],
    "gemma4_vit": ["gemma4_vit_167m_enc"],
    "ghostnet": ["ghostnet_050"],
    "hardcorenas": ["hardcorenas_b"],
    "hgnet": ["hgnetv2_b0"],
    "hiera": ["hiera_tiny_224"],
    "hieradet_sam2": ["sam2_hiera_tiny"],
    "hrnet": ["hrnet_w18_small"],
    "iformer": ["iformer_t"],
    "inception_next": ["inception_next_atto"],
    "inception_resnet_v2": ["inception_resnet_v2"],
    "inception_v3": ["inception_v3"],
    "inception_v4": ["inception_v4"],
    "lcnetv2": ["lcnetv2_small"],
    "levit": ["levit_128s"],
    "lowformer": ["lowformer_b0"],
    "mambaout": ["test_mambaout", "mambaout_femto"],
    "maxxvit": ["test_coatnet", "maxvit_rmlp_pico_rw_256"],
    "metaformer": ["poolformerv2_s12", "caformer_s18"],
    "mlp_mixer": ["gmlp_ti16_224", "mixer_s32_224"],
    "mobilenetv3": ["lcnet_035"],
    "mobilenetv5": ["mobilenetv5_base"],
    "mobilevit": ["mobilevit_xxs"],
    "mvitv2": ["mvitv2_tiny"],
    "naflexvit": ["naflexvit_base_patch16_parfac_gap"],
    "nasnet": ["nasnetalarge"],
    "nest": ["nest_tiny_jx"],
    "nextvit": ["nextvit_small"],
    "nfnet": ["test_nfnet", "eca_nfnet_l0"],
    "pit": ["pit_ti_224"],
    "pnasnet": ["pnasnet5large"],
    "pvt_v2": ["pvt_v2_b0"],
    "qwen3_vit": ["qwen3_vit_88m"],
    "rdnet": ["rdnet_tiny"],
    "regnet": ["regnetx_002", "regnety_002"],
    "repghost": ["repghostnet_050"],
    "repvit": ["repvit_m1"],
    "res2net": ["res2next50"],
    "resnest": ["resnest14d"],
    "resnet": ["test_resnet", "resnext50_32x4d"],
    "resnetv2": ["resnetv2_18"],
    "rexnet": ["rexnet_100"],
    "selecsls": ["selecsls42"],
    "senet": ["legacy_seresnet18"],
    "sequencer": ["sequencer2d_s"],
    "shvit": ["shvit_s1"],
    "sknet": ["skresnet18"],
    "starnet": ["starnet_s050"],
    "swiftformer": ["swiftformer_xs"],
    "swin_transformer": ["swin_tiny_patch4_window7_224"],
    "swin_transformer_v2": ["swinv2_tiny_window16_256", "swinv2_tiny_window8_256"],
    "swin_transformer_v2_cr": ["swinv2_cr_tiny_224"],
    "tiny_vit": ["tiny_vit_5m_224"],
    "tnt": ["tnt_s_legacy_patch16_224"],
    "tresnet": ["tresnet_m"],
    "twins": ["twins_svt_small"],
    "vgg": ["vgg11"],
    "visformer": ["visformer_tiny"],
    "vision_transformer": ["test_vit", "vit_tiny_patch16_224"],
    "vision_transformer_hybrid": ["vit_tiny_r_s16_p8_224"],
    "vision_transformer_relpos": ["test_vit_relpos"],
    "vision_transformer_sam": ["samvit_base_patch16_224"],
    "vitamin": ["vitamin_small_224"],
    "volo": ["volo_d1_224"],
    "vovnet": ["ese_vovnet19b_slim_dw"],
    "xception": ["legacy_xception"],
    "xception_aligned": ["xception41p"],
    "xcit": ["xcit_nano_12_p8_224", "xcit_nano_12_p16_224"],
}
# Model -> why it is not checked; only causes outside this project count.
SKIPPED: dict[str, str] = {}
# Arguments that make a huge model small but leave its blocks unchanged.
REDUCED = {
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m_enc": {"depth": 2},
    "qwen3_vit_88m": {"depth": 2},
    "samvit_base_patch16_224": {"depth": 3, "global_attn_indexes": (1,)},
    "naflexvit_base_patch16_parfac_gap": {"depth": 2},
    "beit_base_patch16_224": {"depth": 2},
}
# Layers left dense, model -> part of their names. They feed a softmax over two paths, whose
# gradients are opposite, so their channels have exactly equal scores.
TIED = {"skresnet18": "fc_select", "resnest14d": "conv2.fc2"}
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384)
DROP_RATE = 0.8
BATCH = 3  # batch norm over two values has no gradient except through its epsilon
SAMPLES, SAMPLES_KEPT = 5, 3
NOISE = 0.02
TOLERANCE = 1e-7
TIMEOUT_S = 900


@dataclass(frozen=True)
class Row:
    """The result of one model.

    Attributes:
        model: its name in timm.
        size: resolution of the check.
        kinds: number of sparse sites by kind.
        dense: number of sites left dense by reason.
        covered: share of the backward's floating-point operations in sparse sites.
        error: largest relative error of a gradient, NaN if the check failed.
        seconds: duration of the check.
        failure: why the check failed; "" if it did not.
    """

    model: str
    size: int = 0
    kinds: dict[str, int] | None = None
    dense: dict[str, int] | None = None
    covered: float = 0.0
    error: float = float("nan")
    seconds: float = 0.0
    failure: str = ""


def build(name: str, batch: int = BATCH) -> tuple[nn.Module, Tensor]:
    """Return a timm model in float64 and a batch of the smallest size that it accepts."""
    reduced = REDUCED.get(name, {})
    for size in SIZES:
        for kwargs in (reduced, {**reduced, "img_size": size}):
            torch.manual_seed(0)
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, num_classes=7, **kwargs).train()
                    model(torch.randn(batch, 3, size, size))
            except Exception:
                continue
            model = timm.create_model(name, num_classes=7, **kwargs).double().train()
            make_comparable(model)
            return model, torch.randn(batch, 3, size, size, dtype=torch.float64)
    raise RuntimeError(f"accepts none of the sizes {SIZES}")


def make_comparable(model: nn.Module) -> None:
    """Remove random numbers and ties, because two correct computations may treat them differently.

    Parameters that start at zero (heads, the last scale of a residual branch) give channels with
    equal or vanishing gradients, so any selection among them is right.
    """
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)


def loss(output: Tensor) -> Tensor:
    return output.square().mean() + output.sin().sum()


def takes_part(module: nn.Module, name: str) -> bool:
    return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def check(name: str) -> Row:
    """Compare a model's sparse gradients under AOT eager with the oracle's."""
    start = time.perf_counter()
    model, inputs = build(name)
    tied = TIED.get(name)

    def takes_part_untied(module: nn.Module, layer: str) -> bool:
        return takes_part(module, layer) and (tied is None or tied not in layer)

    expected = oracle_gradients(model, inputs, DROP_RATE, takes_part_untied, loss)
    config = SparsityConfig(
        channel_multiple=1, min_channels=1, filter_fn=takes_part_untied, targets=TARGETS
    )
    scheduler = SparsityScheduler(constant(DROP_RATE))
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    inputs.requires_grad_()
    loss(compiled(inputs)).backward()
    made = report(compiled)
    return Row(
        model=name,
        size=inputs.shape[-1],
        kinds=dict(Counter(site.kind for site in made.sparse_sites)),
        dense=dict(Counter(site.reason for site in made.sites if site.reason)),
        covered=sum(site.flops for site in made.sparse_sites) / made.backward_flops,
        error=relative_error(gradients(model, inputs), expected),
        seconds=time.perf_counter() - start,
    )


def samples_error(name: str) -> float:
    """Return the largest relative error of a gradient made of the kept samples alone."""
    model, inputs = build(name, SAMPLES)
    inputs.requires_grad_()

    def choose(gradients: list[Tensor]) -> Tensor:
        return strongest(gradients, SAMPLES_KEPT)

    expected = kept_gradients(model, (inputs,), loss, choose, SAMPLES)
    model.zero_grad()
    scheduler = SparsityScheduler(constant(1 - SAMPLES_KEPT / SAMPLES))
    config = SparsityConfig(axis="sample")
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        loss(compiled(inputs)).backward()
    assert inputs.grad is not None
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return relative_error({**found, "input 0": inputs.grad}, expected)


def check_apart(name: str) -> Row:
    """Check a model in its own process, so that a crash or a hang becomes a row as well."""
    command = [sys.executable, "-W", "ignore", __file__, "--model", name]
    try:
        # One thread each: processes that spin on the same cores slow each other down.
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return Row(name, failure=f"more than {TIMEOUT_S} s")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        return Row(name, failure=f"exit code {done.returncode}: {lines[-1][:300]}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def markdown(rows: dict[str, list[Row]]) -> str:
    """Return the coverage table."""
    lines = [
        "# Coverage of timm",
        "",
        f"This page checks at least one model of every module of timm {timm.__version__}. It"
        " compares the gradients of all parameters and of the input with dense eager"
        " back-propagation, in which the unselected channels of each layer's output gradient are"
        f" masked. Drop rate {DROP_RATE}, AOT eager, float64, batch {BATCH}, at the smallest"
        " resolution that the model accepts. Every layer takes part (`min_channels=1`, including"
        " the classifier). Dropout and drop path are off. Noise moves parameters off their special"
        " initial values (zero, or the 1e-6 of a layer scale). *Covered* is the share of the"
        " backward's floating-point operations, at that resolution, in sparse sites; the rest is"
        " mostly products of activations in attention.",
        "",
        "`python tests/support/sweep.py docs/coverage.md` wrote this page with torch"
        f" {torch.__version__}.",
        "",
        *(f"`{layer}` of {name} stays dense: its channels tie." for name, layer in TIED.items()),
        "",
        "| timm module | model | size | sparse sites | left dense | covered | max. rel. error |",
        "|---|---|---|---|---|---|---|",
    ]
    for module, found in sorted(rows.items()):
        for row in found:
            kinds = ", ".join(f"{n} {kind}" for kind, n in sorted((row.kinds or {}).items()))
            dense = ", ".join(f"{n}: {why}" for why, n in sorted((row.dense or {}).items()))
            last = row.failure or f"{row.error:.1e}"
            lines.append(
                f"| {module} | {row.model} | {row.size or ''} | {kinds} | {dense}"
                f" | {row.covered:.0%} | {last} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, help="file for the table")
    parser.add_argument("--model", help="check this one and print its row")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel processes")
    args = parser.parse_args()
    if args.model:
        print(json.dumps(asdict(check(args.model))))
        return
    names = [name for found in MODELS.values() for name in found]
    rows: dict[str, Row] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(check_apart, names):
            print(row, flush=True)
            rows[row.model] = row
    args.output.write_text(
        markdown({module: [rows[name] for name in found] for module, found in MODELS.items()})
    )


if __name__ == "__main__":
    main()
