"""Lower a compiled step for a GPU without having one: generate the code of both graphs, unrun.

Inductor's code for a graph depends only on its fake tensors. So the joint graph is captured on the
CPU, and all its tensors except the keep counts move to a fake GPU before the passes run. This file
answers Inductor's questions to the driver as an H100 would.

Private torch: everything that this file replaces.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx
from ssprop_passes.graph.graph_pass import PassList
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.graph import GraphLowering

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
from ssprop_fx.compiler.inductor import compile_inductor

GPU, COMPUTE_CAPABILITY = torch.device("cuda:0"), (9, 0)

H100 = SimpleNamespace(
    name="NVIDIA H100",
    uuid="",
    gcnArchName="",
    major=9,
    minor=0,
    is_integrated=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
)


@dataclass
class Lowered:
    """The lowered code of a step.

    Attributes:
        graphs: code of the forward and of the backward.
        devices: devices of the tensors that each graph takes.
        kernels: name and source of each Triton kernel.
        written: for each graph, shape and dtype of each tensor that its kernels write.
    """

    graphs: list[str] = field(default_factory=list)
    devices: list[set[str]] = field(default_factory=list)
    kernels: list[tuple[str, str]] = field(default_factory=list)
    written: list[list[tuple[tuple[str, ...], torch.dtype]]] = field(default_factory=list)


class _ToGpu(CustomGraphPass):
    """Moves the tensors of a joint graph, except the keep counts, to a fake GPU."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "placeholder":
                val = node.meta["val"]
                if isinstance(val, Tensor) and not (val.dtype == torch.int64 and val.ndim == 1):
                    with val.fake_mode:
                        node.meta["val"] = torch.empty_strided(
                            val.shape, val.stride(), dtype=val.dtype, device=GPU
                        )
            elif node.op == "call_function":
                if node.kwargs.get("device") == torch.device("cpu"):
                    node.kwargs = {**node.kwargs, "device": GPU}
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                with _mode(graph), enable_python_dispatcher():
                    node.meta["val"] = node.target(*args, **kwargs)

    def uuid(self) -> str:
        return "to a GPU"


class _Driver:
    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU


def lower(
    model: nn.Module, x: Tensor, config: SparsityConfig | None, autocast: bool = True
) -> Lowered:
    """Lower a training step of a model.

    Args:
        model: the model, on the CPU.
        x: its input, on the CPU.
        config: for a sparse step at drop rate 0.8, without a gate; None for a dense step.
        autocast: whether to use bf16 autocast.
    """
    lowered, to_gpu = Lowered(), _ToGpu()
    options = {"joint_custom_pre_pass": to_gpu, "joint_graph_constant_folding": False}
    with _without_a_driver(lowered):
        compiled: Callable[..., Any]
        if config is None:
            settings = {"joint_graph_constant_folding": False}
            compiled = torch.compile(
                model,
                backend=lambda gm, inputs: compile_inductor(
                    gm, inputs, PassList([to_gpu]), settings
                ),
            )
        else:
            scheduler = SparsityScheduler(constant(0.8))
            compiled = ssprop_compile(model, scheduler, config=config, options=options)
        try:
            with torch.autocast("cpu", torch.bfloat16, autocast):
                compiled(x)
        except Exception:
            # Both graphs are lowered, and there is no GPU to run them.
            if len(lowered.graphs) < 2:
                raise
    return lowered


def compile_kernels(lowered: Lowered) -> int:
    """Compile each Triton kernel for the GPU; return their number."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    with (
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
        mock.patch.object(CudaInterface, "synchronize", mock.MagicMock()),
        _without_a_driver(lowered),
    ):
        for name, source in lowered.kernels:
            kernel: Any = getattr(PyCodeCache.load(source), name)
            kernel._precompile_config(kernel.configs[0])
    return len(lowered.kernels)


@contextlib.contextmanager
def _without_a_driver(lowered: Lowered) -> Iterator[None]:
    """Answer Inductor's questions to the driver, and record what is lowered."""
    from triton.runtime import driver

    inductor = torch._inductor.compile_fx
    compile_inner, codegen = inductor.compile_fx_inner, GraphLowering.codegen

    def compile_for_gpu(gm: fx.GraphModule, _inputs: Any, **kwargs: Any) -> Any:
        vals = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        lowered.devices.append({v.device.type for v in vals if isinstance(v, Tensor)})
        return compile_inner(gm, vals, **kwargs)

    def keep_code(self: GraphLowering, *args: Any, **kwargs: Any) -> Any:
        result = codegen(self, *args, **kwargs)
        lowered.graphs.append(getattr(result[0], "value", result[0]))
        outputs = (
            out for n in self.scheduler.nodes if not n.is_extern() for out in n.get_outputs()
        )
        layouts = [o.node.layout for o in outputs if o.get_name() not in self.removed_buffers]
        lowered.written.append([(tuple(map(str, x.size)), x.dtype) for x in layouts])
        return result

    def keep_source(self: AsyncCompile, name: str, source: str, *_: Any, **__: Any) -> Any:
        lowered.kernels.append((name, source))
        return mock.MagicMock()

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch("torch.cuda._lazy_init"),
            mock.patch("torch.cuda.current_device", return_value=0),
            mock.patch("torch.cuda.device_count", return_value=1),
            mock.patch("torch.cuda.get_device_name", return_value=H100.name),
            mock.patch("torch.cuda.get_device_capability", return_value=COMPUTE_CAPABILITY),
            mock.patch("torch.cuda.get_device_properties", return_value=H100),
            mock.patch("torch.cuda._get_device_properties", return_value=H100, create=True),
            mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
            # cuDNN uses this layout.
            mock.patch(
                "torch._C._conv_determine_backend_memory_format", return_value=torch.channels_last
            ),
            mock.patch.object(
                CudaInterface, "is_bf16_supported", mock.MagicMock(return_value=True)
            ),
            mock.patch.object(AsyncCompile, "triton", keep_source),
            mock.patch.object(GraphLowering, "codegen", keep_code),
            mock.patch.object(inductor, "compile_fx_inner", compile_for_gpu),
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            torch._inductor.config.patch(force_disable_caches=True),
        ):
            stack.enter_context(patch)
        before = driver.__dict__.get("_active")
        driver.set_active(_Driver())
        try:
            yield
        finally:
            driver._active = before


def _mode(graph: fx.Graph) -> Any:
    vals = (node.meta["val"] for node in graph.find_nodes(op="placeholder"))
    return next(val.fake_mode for val in vals if isinstance(val, Tensor))
