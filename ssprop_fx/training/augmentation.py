"""The rarer augmentation settings, which `--aug-kwargs KEY=VALUE` changes."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ssprop_fx.options import option, options_of
from ssprop_fx.training.errors import CommandError

__all__ = ["Augmentation"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentation settings with timm's names; None leaves the dataset's default.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of its range.
    """

    train_crop_mode: Literal["rrc", "rkrc", "rkrr"] | None = option(
        None, help="Crop training images in this way", unset="rrc"
    )
    train_interpolation: str | None = option(
        None, help="Resize training images with this method, or random", unset="random"
    )
    scale: tuple[float, ...] | None = option(
        None, help="Crop an area between these two fractions", unset="the dataset's"
    )
    ratio: tuple[float, ...] | None = option(
        None, help="Crop with an aspect ratio between these two", unset="the dataset's"
    )
    hflip: float | None = option(
        None,
        help="Mirror an image with this probability",
        unset="0.5, or 0 for digits",
        rule="in [0, 1]",
    )
    vflip: float | None = option(
        None, help="Turn an image upside down with this probability", unset="0", rule="in [0, 1]"
    )
    color_jitter: float | None = option(
        None, help="Change colours by this much", unset="0.4, or 0 for digits"
    )
    remode: Literal["const", "rand", "pixel"] = option(
        "pixel", help="Fill erased rectangles with black, one random colour, or random pixels"
    )
    recount: int = option(1, help="Erase this many rectangles", rule="above 0")
    cutmix_minmax: tuple[float, ...] | None = option(
        None, help="Paste boxes with sides between these two fractions", unset="by --cutmix"
    )
    mixup_prob: float = option(1.0, help="Mix with this probability", rule="in [0, 1]")
    mixup_switch_prob: float = option(
        0.5,
        help="Choose cutmix over mixup with this probability if both are on",
        rule="in [0, 1]",
    )
    mixup_mode: Literal["batch", "pair", "elem"] = option(
        "batch", help="Mix whole batches, pairs or single images in one way"
    )
    mixup_off_epoch: int = option(
        0, help="Stop mixing at this epoch; 0 never stops", rule="at least 0"
    )

    def __post_init__(self) -> None:
        for known in options_of(Augmentation).values():
            known.check(getattr(self, known.name))
        for name in ("scale", "ratio", "cutmix_minmax"):
            span = getattr(self, name)
            top = float("inf") if name == "ratio" else 1
            if span is not None and not (len(span) == 2 and 0 <= span[0] <= span[1] <= top):
                where = "" if name == "ratio" else " in [0, 1]"
                raise ValueError(
                    f"{name} must be two numbers{where}, the smaller first, got {span!r}"
                )

    @classmethod
    def from_pairs(cls, pairs: Mapping[str, Any]) -> "Augmentation":
        """Return the settings that `--aug-kwargs` gives.

        Raises:
            CommandError: a key is unknown or a value is wrong.
        """
        known = list(options_of(cls))
        for key in pairs:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]}? Known" if close else "known"
                raise CommandError(f"--aug-kwargs {key}: unknown; {hint} are {', '.join(known)}")
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in pairs.items()
        }
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CommandError(f"--aug-kwargs: {error}") from error

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults."""
        values = {name: getattr(self, name) for name in options_of(Augmentation)}
        return {k: v for k, v in values.items() if v != options_of(Augmentation)[k].default}
