"""Torch's private names that the packages use, what the packages rely on, and a canary for each.

A canary is a function that tries the behaviour on torch alone. If it fails, a torch release has
changed what its docstring says, and the files that use the name must follow. A canary imports
inside its body, so that a missing name fails only that canary.

Names are dotted as in an import. `.name` stands for an attribute (also one without an underscore of
Dynamo's and AOTAutograd's objects), and `meta.key` for a key of `node.meta`.
"""

from torch_api import dynamo, inductor, joint_graph, samples, tracing
from torch_api.canary import CANARIES, Canary, explanation

__all__ = [
    "CANARIES",
    "Canary",
    "dynamo",
    "explanation",
    "inductor",
    "joint_graph",
    "samples",
    "tracing",
]
