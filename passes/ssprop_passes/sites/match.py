"""SiteMatch: a backward that a kind of site recognised, and why it may have to stay dense."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor, fx

from ssprop_passes.replacements.gradients import Gradients
from ssprop_passes.selection.policy import Selection
from ssprop_passes.selection.samples import Samples
from ssprop_passes.sites.site import Slot

__all__ = ["SiteMatch", "why_dense"]


class SiteMatch(ABC):
    """A backward node, or group of nodes, that a kind of site recognised.

    A kind of site is a subclass in a file of its own, with a function `match_x(node)` that
    returns an instance or None, listed in `ssprop_passes.sites.matchers`.

    Attributes:
        node: the first of `nodes`: the replacement is inserted before it, with its metadata.
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
        """Number of groups that channels are selected in."""

    @property
    @abstractmethod
    def wanted(self) -> tuple[bool, bool, bool]:
        """Which of the gradients of input, weight and bias are computed."""

    @abstractmethod
    def flops_of(self, mask: Sequence[bool]) -> int:
        """Return the floating-point operations, two a multiply-add, of dense gradients.

        Args:
            mask: which of those of input, weight and bias to count.
        """

    @property
    @abstractmethod
    def nodes(self) -> Sequence[fx.Node]:
        """The nodes that compute the dense gradients of input and weight."""

    @property
    @abstractmethod
    def inputs(self) -> Sequence[fx.Node]:
        """The nodes that `backward` takes the values of."""

    @property
    @abstractmethod
    def dense_gradients(self) -> Gradients:
        """The fake values of the dense gradients that are replaced."""

    @abstractmethod
    def backward(
        self, k: int, selection: Selection, *tensors: Tensor, memory: Tensor | None = None
    ) -> Gradients:
        """Return the sparse gradients, None for the others: plain torch, which the pass traces.

        Args:
            k: keep count of each group; may be a SymInt.
            selection: which channels are kept, and which gradients are sparse.
            tensors: values of `inputs`.
            memory: what the last step left out, updated in place; None without. See
                `ssprop_passes.selection.error_feedback`.
        """

    @abstractmethod
    def backward_of_samples(
        self, samples: Samples, selection: Selection, *tensors: Tensor
    ) -> Gradients:
        """Return the gradients made of some samples, None for those that stay dense.

        Args:
            samples: the samples.
            selection: says which gradients are sparse.
            tensors: values of `inputs`.
        """

    @abstractmethod
    def replace(self, gradients: Sequence[fx.Node | None]) -> None:
        """Let the users of the dense gradients use these, and erase what has become dead.

        Where there is None, what computes the dense gradient stays, marked with `INSERTED_KEY`.
        """

    @property
    def form(self) -> Hashable:
        """What `backward` depends on besides its arguments, None where that is not told.

        Sites that are alike in this and in the form of their inputs are traced once.
        """
        return None

    @property
    def flops(self) -> int:
        """Floating-point operations of the dense backward."""
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
        name: its layer's name.
        slots: the layers that take part, by name.
        excluded: the layers that do not, by name, with the reason.
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
