"""Drop rates by depth: higher near the input, lower near the output."""

from glob import escape

from ssprop_fx.analysis.inspection import Inspection

__all__ = ["by_depth"]


def by_depth(inspection: Inspection, rate: float, slope: float) -> dict[str, float]:
    """Return drop rates that fall with depth and save as many FLOPs as one rate for all layers.

    What a layer's backward leaves out is missing from the gradients of all layers before it. So an
    error near the input reaches few layers, and one near the output nearly all. Let x be the
    position of a layer: the share of the sparse FLOPs between the input and the layer's middle.

        drop rate = rate + slope * (1 - 2 x)

    The FLOP-weighted mean of x is exactly 1/2, so the FLOP-weighted mean of the drop rates is
    exactly `rate`, except for the rounding of keep counts.

    Args:
        inspection: `inspect_sites` of the model; gives the order and FLOPs of its layers.
        rate: mean drop rate, in (0, 1).
        slope: how much more than `rate` the first layers drop, and how much less the last ones; at
            most the smaller of `rate` and `1 - rate`. A negative slope drops more near the output.

    Returns:
        Drop rate by layer name, for `SparsityConfig(rates=...)`. They replace the scheduler's drop
        rate when that is above 0.

    Raises:
        TypeError: `inspection` is not an Inspection.
        ValueError: a number is out of range, or no layer would be sparse.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from ssprop_fx import SparsityConfig, inspect_sites
        >>> model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(3)])
        >>> inspection = inspect_sites(model, torch.empty(2, 64, device="meta"))
        >>> rates = by_depth(inspection, rate=0.5, slope=0.25)
        >>> {name: round(rate, 2) for name, rate in rates.items()}
        {'0': 0.7, '1': 0.55, '2': 0.35}
        >>> config = SparsityConfig(rates=rates)
    """
    if not isinstance(inspection, Inspection):
        raise TypeError(
            f"inspection must be what inspect_sites returns, got {type(inspection).__name__}"
        )
    if not 0 < rate < 1:
        raise ValueError(f"rate must be in (0, 1), got {rate!r}")
    if not (rate - abs(slope) >= 0 and rate + abs(slope) <= 1):
        raise ValueError(
            f"slope must be within {min(rate, 1 - rate):g} of 0, so that drop rates around"
            f" rate={rate!r} stay in (0, 1), got {slope!r}"
        )
    # Sites are in backward order. A layer that is called several times has several sites.
    sites = inspection.sparse_sites[::-1]
    total = sum(site.sparse_flops for site in sites)
    if not total:
        raise ValueError("inspection must have a layer that would be sparse, got none")
    places: dict[str, float] = {}
    flops: dict[str, int] = {}
    before = 0
    for site in sites:
        place = (before + site.sparse_flops / 2) / total
        before += site.sparse_flops
        places[site.name] = places.get(site.name, 0.0) + site.sparse_flops * place
        flops[site.name] = flops.get(site.name, 0) + site.sparse_flops
    return {escape(name): rate + slope * (1 - 2 * places[name] / flops[name]) for name in places}
