"""SiteMatch: a backward that a kind of site recognised, and why it may have to stay dense."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor, fx

from ssprop_passes.replacements.gradients import Gradients
from ssprop_passes.selection.policy import Selection
from ssprop_passes.sites.site import Slot

__all__ = ["UNKNOWN", "SiteMatch", "why_dense"]

UNKNOWN = "its backward has a form that no kind of site knows"


class SiteMatch(ABC):
    """A backward node, or group of nodes, that a kind of site recognised.

    Each kind of site is a subclass in its own file, with a function `match_x(node)` that returns
    an instance or None. `ssprop_passes.sites.matchers` lists these functions.

    Attributes:
        node: the first of `nodes`. The replacement goes before it and inherits its metadata.
    """

    node: fx.Node

    @property
    @abstractmethod
    def kind(self) -> str:
        """A short name, such as `conv2d`."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Output channels, C."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """Number of groups within which channels are selected."""

    @property
    @abstractmethod
    def wanted(self) -> tuple[bool, bool, bool]:
        """Which of the gradients of input, weight and bias are computed."""

    @abstractmethod
    def flops_of(self, mask: Sequence[bool]) -> int:
        """Return the FLOPs of dense gradients; a multiply-add counts as two.

        Args:
            mask: which of the gradients of input, weight and bias to count.
        """

    @property
    @abstractmethod
    def nodes(self) -> Sequence[fx.Node]:
        """The nodes that compute the dense gradients of input and weight."""

    @property
    @abstractmethod
    def inputs(self) -> Sequence[fx.Node]:
        """The nodes whose values `backward` takes."""

    @property
    @abstractmethod
    def dense_gradients(self) -> Gradients:
        """The fake values of the dense gradients to replace."""

    @abstractmethod
    def backward(
        self, k: int, selection: Selection, *tensors: Tensor, memory: Tensor | None = None
    ) -> Gradients:
        """Return the sparse gradients, None for the others, in plain torch that the pass traces.

        Args:
            k: keep count of each group; may be a SymInt.
            selection: which channels are kept, and which gradients are sparse.
            tensors: values of `inputs`.
            memory: what the last step left out, updated in place; None without memory. See
                `ssprop_passes.selection.error_feedback`.
        """

    @abstractmethod
    def replace(self, gradients: Sequence[fx.Node | None]) -> None:
        """Make the users of the dense gradients use these instead, and erase dead nodes.

        For a None, the node that computes the dense gradient stays, marked with `INSERTED_KEY`.
        """

    @property
    def form(self) -> Hashable:
        """What `backward` depends on besides its arguments, None if unknown.

        Sites with equal forms and inputs of the same form share one trace.
        """
        return None

    @property
    def flops(self) -> int:
        """FLOPs of the dense backward."""
        return self.flops_of(self.wanted)


def why_dense(
    match: SiteMatch,
    name: str | None,
    slots: Mapping[str, Slot],
    excluded: Mapping[str, str],
    selection: Selection,
) -> str:
    """Return why a site stays dense, "" if it can be made sparse.

    Args:
        match: the site.
        name: its layer's name, None if it belongs to no layer.
        slots: layer name -> slot, for the layers that take part.
        excluded: layer name -> reason, for the layers that do not.
        selection: says which gradients are sparse.
    """
    if name is None:
        return "outside the model's modules"
    if name in excluded:
        return excluded[name]
    if name not in slots:
        return "its module owns no weight of this kind"
    if (slots[name].channels, slots[name].groups) != (match.channels, match.groups):
        return "its weight is not that of its module"
    if not any(selection.sparse(match.wanted)):
        return f"it computes no {selection.gradients} gradient"
    return ""
