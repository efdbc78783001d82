"""Importing the package is quick: the compiler is imported when it is needed."""

import subprocess
import sys

PROGRAM = """
import sys, torch
before = set(sys.modules)
import ssprop_fx
ssprop_fx.SparsityScheduler(ssprop_fx.bar(0.8, period=2)).step()
ssprop_fx.SparsityConfig(min_channels=1)
new = set(sys.modules) - before
print(*sorted(name for name in new if name.split(".")[:2] in HEAVY))
"""


def test_importing_the_package_imports_no_compiler() -> None:
    heavy = [
        ["torch", "_inductor"],
        ["torch", "_dynamo"],
        ["sympy"],
        ["triton"],
        ["timm"],
        ["torchvision"],
    ]
    heavy += [["lightning"], ["pytorch_lightning"], ["transformers"]]
    program = PROGRAM.replace("HEAVY", repr(heavy))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
