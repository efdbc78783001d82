"""`ssprop-fx inspect`: the sites of any timm model, and what a drop rate would save."""

import argparse
import json
import logging
from typing import Any

import torch
from ssprop_passes.errors import CaptureError
from torch import nn
from torch.overrides import TorchFunctionMode

from ssprop_fx.analysis.inspection import Inspection, inspect_sites
from ssprop_fx.cli.flags import add_flags
from ssprop_fx.config import SparsityConfig
from ssprop_fx.options import options_of
from ssprop_fx.training.errors import CommandError, flag_error, needs_train_extra, unknown_name

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Show where sparse back-propagation would act in a model of timm, and what it would save.

Nothing is trained, run or compiled: shapes alone are traced, in seconds and with little memory.
A site is a layer's backward. FLOPs are those of the backward's convolutions and matrix products;
time saved is less, because other operations take time as well."""

_EPILOG = """\
--json prints one object on stdout:
  model               the name
  parameters          how many the model has
  input_size          [channels, height, width]
  batch_size          images in the batch
  backward_flops      FLOPs of all backward convolutions and matrix products of the batch
  covered             share of them that gradients made sparse take
  channel_multiple    what keep counts are rounded to a multiple of
  saved               list of {drop_rate, share}: share of the backward's FLOPs saved
  kinds               list of {kind, sites, sparse, share}: sites by kind
  uncaptured          layers that take part but are called in no captured graph: they train
                      dense, and may be missing from backward_flops
  sites               list, in backward order, of
    name              the layer's name, "" where the site belongs to none
    kind              such as conv2d
    channels, groups  output channels, and groups that channels are selected in
    flops, share      of its dense backward, and as a share of backward_flops
    sparse_flops      those of flops that gradients made sparse take
    sparse, reason    whether it is made sparse, and if not, why
    kept              list, one for each of "saved": channels kept, of all groups together

Exit status: 0, 1 for a model that cannot be traced without its values, 2 for a wrong argument.
"""

_OPTIONS = {name: option for name, option in options_of(SparsityConfig).items() if option.inspect}


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the parser of `inspect`.

    Args:
        subparsers: what `ArgumentParser.add_subparsers` returned.
    """
    parser = subparsers.add_parser(
        "inspect",
        help="show the sites of a timm model, and what a drop rate would save",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "model", metavar="MODEL", help="Inspect this model of timm, such as resnet50"
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object; see below")
    parser.add_argument(
        "--drop-rates",
        type=float,
        nargs="+",
        default=[0.5, 0.8],
        metavar="D",
        help="Show these drop rates, fractions in [0, 1) (default: 0.5 0.8)",
    )
    parser.add_argument(
        "--img-size",
        type=int,
        metavar="N",
        help="Use images of this height and width in pixels (default: the model's)",
    )
    # Not 1: batch norm in train mode refuses a batch of one where the image is a single point.
    parser.add_argument(
        "--batch-size",
        type=int,
        default=2,
        metavar="N",
        help="Use this many images in a batch (default: 2)",
    )
    parser.add_argument(
        "--in-chans",
        type=int,
        metavar="N",
        help="Use images with this many channels (default: the model's)",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="Give the model this many classes (default: the model's)",
    )
    add_flags(parser, _OPTIONS)


def run(args: argparse.Namespace) -> int:
    """Run `inspect`.

    Args:
        args: parsed arguments.

    Returns:
        Exit status.

    Raises:
        CommandError: an argument is wrong, timm is missing, or the model cannot be inspected.
    """
    for flag in ("img_size", "batch_size", "in_chans"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise CommandError(
                f"--{flag.replace('_', '-')} must be above 0, got {getattr(args, flag)}"
            )
    if (args.num_classes or 0) < 0:
        raise CommandError(f"--num-classes must be 0 or more, got {args.num_classes}")
    for rate in args.drop_rates:
        if not 0 <= rate < 1:
            raise CommandError(f"--drop-rates must be in [0, 1), got {rate:g}")
    try:
        config = SparsityConfig(**{n: v for n, v in vars(args).items() if n in _OPTIONS})
    except (TypeError, ValueError) as error:
        raise flag_error(error) from error

    model, input_size = _create_model(args)
    images = torch.empty(args.batch_size, *input_size, device="meta")
    # Torch logs what goes wrong inside it at length; here it is one line.
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        inspection = inspect_sites(model, images, config=config)
    except CaptureError as error:
        raise CommandError(f"{args.model}: {error}", exit_code=1) from error
    finally:
        logging.disable(disabled)
    described = {
        "model": args.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "input_size": list(input_size),
        "batch_size": args.batch_size,
    }
    if args.json:
        print(json.dumps({**described, **_as_dict(inspection, args.drop_rates)}, indent=2))
    else:
        size = "x".join(map(str, input_size))
        print(
            f"{args.model}: {described['parameters'] / 1e6:.1f} M parameters,"
            f" {args.batch_size} images of {size}"
        )
        print(inspection.table(args.drop_rates))
    return 0


def _create_model(args: argparse.Namespace) -> tuple[nn.Module, tuple[int, int, int]]:
    with needs_train_extra():
        import timm
    if not timm.is_model(args.model):
        raise unknown_name("MODEL", args.model, timm.list_models())
    pretrained_config = timm.get_pretrained_cfg(args.model)
    chans, height, width = getattr(pretrained_config, "input_size", (3, 224, 224))
    settings: dict[str, Any] = {}
    if args.num_classes is not None:
        settings["num_classes"] = args.num_classes
    if args.in_chans is not None:
        settings["in_chans"] = chans = args.in_chans
    if args.img_size is not None:
        height = width = args.img_size
        if getattr(pretrained_config, "fixed_input_size", False):
            settings["img_size"] = args.img_size
    try:
        with _Uninitialized():
            model: nn.Module = timm.create_model(args.model, **settings)
    except Exception as error:
        # What a model thinks of its arguments has no class of errors in common.
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in settings)
        raise CommandError(
            f"{args.model} cannot be made{flags and f' with {flags}'}: {error}",
            exit_code=2 if settings else 1,
        ) from error
    return model, (chans, height, width)


class _Uninitialized(TorchFunctionMode):
    """Leaves parameters as they were allocated: memory that nobody writes is not occupied."""

    _skipped = frozenset(
        {"add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "kaiming_uniform_", "mul_"}
        | {"normal_", "sub_", "trunc_", "uniform_", "zero_"}
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._skipped:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)


def _as_dict(inspection: Inspection, drop_rates: list[float]) -> dict[str, Any]:
    return {
        "backward_flops": inspection.backward_flops,
        "covered": inspection.covered,
        "channel_multiple": inspection.channel_multiple,
        "saved": [{"drop_rate": rate, "share": inspection.saved_at(rate)} for rate in drop_rates],
        "kinds": [
            {
                "kind": kind,
                "sites": len(sites),
                "sparse": sum(not site.reason for site in sites),
                "share": inspection.share(sum(site.flops for site in sites)),
            }
            for kind, sites in inspection.by_kind().items()
        ],
        "uncaptured": list(inspection.uncaptured),
        "sites": [
            {
                "name": site.name,
                "kind": site.kind,
                "channels": site.channels,
                "groups": site.groups,
                "flops": site.flops,
                "share": inspection.share(site.flops),
                "sparse_flops": site.sparse_flops,
                "sparse": not site.reason,
                "reason": site.reason,
                "kept": [inspection.kept_at(site, rate) for rate in drop_rates],
            }
            for site in inspection.sites
        ],
    }
