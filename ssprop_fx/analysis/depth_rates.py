"""Drop rates by depth: more is dropped next to the input, less next to the output."""

from glob import escape

from ssprop_fx.analysis.inspection import Inspection

__all__ = ["by_depth"]


def by_depth(inspection: Inspection, rate: float, slope: float) -> dict[str, float]:
    """Return drop rates that fall with depth and save the FLOPs that one rate would.

    What a backward leaves out is missing in the gradients of all layers before it, so that an error
    next to the input reaches few layers and one next to the output nearly all. With x, the place of
    a layer, being the share of the sparse FLOPs that lie between the input and the middle of it,

        drop rate = rate + slope * (1 - 2 x)

    The mean of x over the FLOPs is exactly 1/2, so that the mean of the drop rates over the FLOPs
    is exactly `rate`, but for the rounding of keep counts.

    Args:
        inspection: `inspect_sites` of the model; tells order and FLOPs of its layers.
        rate: mean drop rate, in (0, 1).
        slope: what the first layers drop more than `rate`, and the last ones less; at most the
            smaller of `rate` and `1 - rate`. Below 0 it is the other way round.

    Returns:
        Drop rate by name, for `SparsityConfig(rates=...)`. They stand in place of the scheduler's
        drop rate wherever that is above 0.

    Raises:
        TypeError: `inspection` is no inspection.
        ValueError: a number is out of its range, or no layer would be sparse.

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
    # Sites are in backward order. A layer that is called several times has several of them.
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
