"""The models of the sweep: at least one of every timm module, and how to build them."""

import timm
import torch
from torch import Tensor, nn

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
NOISE = 0.02


def build(name: str, batch: int) -> tuple[nn.Module, Tensor]:
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
