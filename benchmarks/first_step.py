"""The process that `python -m benchmarks compile` starts: compiles one variant.

`python -m benchmarks.first_step WORKLOAD VARIANT` prints one line of JSON with two times in
seconds: the first step of the variant minus the second, and the import of ssprop_fx after torch.
The variants are dense torch.compile, channels at drop rate 0.8, and samples by the default rule.
"""

import json
import sys
import time

VARIANTS = ("dense", "sparse", "samples")


def main(workload: str, variant: str) -> None:
    """Measure and print.

    Args:
        workload: the fields of a Workload, as JSON.
        variant: one of `VARIANTS`.
    """
    # Import here and in this order, because the second import is timed.
    import torch

    start = time.perf_counter()
    import ssprop_fx

    import_s = time.perf_counter() - start
    from benchmarks.timing import synchronize
    from benchmarks.workload import Workload

    work = Workload(**json.loads(workload))
    model, images = work.build()
    if variant == "sparse":
        scheduler = ssprop_fx.SparsityScheduler(ssprop_fx.constant(0.8))
        compiled = ssprop_fx.ssprop_compile(model, scheduler, backend=work.backend)
    elif variant == "samples":
        compiled = ssprop_fx.ssprop_compile(model, backend=work.backend)
    else:
        compiled = torch.compile(model, backend=work.backend)
    times = []
    for _ in range(2):
        synchronize()
        start = time.perf_counter()
        work.step(compiled, images)
        synchronize()
        times.append(time.perf_counter() - start)
    print(json.dumps({"compile_s": times[0] - times[1], "import_s": import_s}))


if __name__ == "__main__":
    main(*sys.argv[1:])
