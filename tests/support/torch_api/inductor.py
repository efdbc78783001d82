"""Inductor, and processors."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from captures import capture
from torch import fx

from torch_api.canary import relies_on

aten = torch.ops.aten


@relies_on(
    "torch._inductor.compile_fx.compile_fx",
    "torch._inductor.compile_fx.compile_fx_inner",
    "torch._inductor.config.joint_custom_pre_pass",
    "torch._inductor.custom_graph_pass.CustomGraphPass",
)
def inductor_takes_a_pass_on_the_joint_graph() -> None:
    """`compile_fx(gm, inputs, inner, config_patches=...)` uses `inner` in place of
    `compile_fx_inner`. It compiles the forward and, later and outside of the backend, the backward.
    The patches hold in both. `joint_custom_pre_pass`, None by default, is a `CustomGraphPass` that
    is called with the joint graph. `force_disable_caches` turns the caches off.
    """
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen: list[str] = []

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            assert graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
            seen.append("joint")

        def uuid(self) -> str:
            return "canary"

    def inner(gm: fx.GraphModule, *_args: Any, **_kwargs: Any) -> Any:
        assert isinstance(config.joint_custom_pre_pass, Pass)
        assert config.force_disable_caches
        seen.append("part")
        return make_boxed_func(gm.forward)

    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        patches = {"joint_custom_pre_pass": Pass(), "force_disable_caches": True}
        compiled = compile_fx(gm, inputs, inner, config_patches=patches)
        seen.append("compiled")
        return compiled

    assert config.joint_custom_pre_pass is None
    assert callable(compile_fx_inner)
    capture(compile_graph)
    assert seen == ["joint", "part", "compiled", "part"]


@relies_on("torch._inductor.pattern_matcher.stable_topological_sort")
def graphs_can_be_sorted() -> None:
    """`stable_topological_sort(graph)` moves nodes, in place, after the nodes that they use."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.relu, (x,))
    second = graph.call_function(torch.relu, (x,))
    graph.output(first)
    first.args = (second,)
    stable_topological_sort(graph)
    graph.lint()
    assert [n.op for n in graph.nodes][-1] == "output"


@relies_on("torch._inductor.decomposition.select_decomp_table")
def inductor_has_a_table_of_decompositions() -> None:
    """`select_decomp_table()` is the table, operator -> function, with which Inductor traces joint
    graphs. It does not decompose convolutions, products and `topk`.
    """
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    assert aten.native_batch_norm_backward.default in table
    assert aten.topk.default not in table
    assert aten.index_put.default not in table


@relies_on("torch._inductor.list_mode_options", "torch._inductor.config.get_config_copy")
def modes_of_inductor_are_options() -> None:
    """`list_mode_options(mode, dynamic)` returns the configuration that a mode of `torch.compile`
    stands for. `get_config_copy()` has every valid option name.
    """
    from torch._inductor import config, list_mode_options

    assert list_mode_options("reduce-overhead", None) == {"triton.cudagraphs": True}
    assert list_mode_options("default", None) == {}
    names = {"triton.cudagraphs", "joint_custom_pre_pass", "max_autotune"}
    assert names <= set(config.get_config_copy())


@relies_on("torch._inductor.runtime.cache_dir_utils.cache_dir")
def the_compile_cache_lies_where_the_environment_says() -> None:
    """`cache_dir()` returns the value that `TORCHINDUCTOR_CACHE_DIR` has at the call."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == os.environ["TORCHINDUCTOR_CACHE_DIR"]


@relies_on("torch._inductor.codecache.CppCodeCache")
def inductor_compiles_our_cpp() -> None:
    """`CppCodeCache.load(source)` returns a library with OpenMP, for the machine's vector size."""
    from torch._inductor.codecache import CppCodeCache

    source = """
        #include <omp.h>
        extern "C" long largest_team(long threads) {
          long size = 0;
          #pragma omp parallel num_threads(threads) reduction(max : size)
          size = omp_get_num_threads();
          return size;
        }
    """
    assert CppCodeCache.load(source).largest_team(2) == 2


@relies_on("torch.cpu._is_avx512_bf16_supported")
def processors_that_compute_in_bfloat16_are_known() -> None:
    """`_is_avx512_bf16_supported()` says whether the processor has instructions for bfloat16."""
    found = torch.cpu._is_avx512_bf16_supported()
    assert isinstance(found, bool)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        assert found == ("avx512_bf16" in cpuinfo.read_text().split())


@relies_on(".var_to_hint_override")
def a_size_has_the_hint_that_its_environment_is_told() -> None:
    """When Inductor chooses code, it assumes that an unbacked size is
    `shape_env.var_to_hint_override[symbol]` or, without an entry, the `fallback`.
    """
    from torch._inductor.sizevars import SizeVarAllocator
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment = ShapeEnv()
    told, unknown = (environment.create_unbacked_symint().node.expr for _ in range(2))
    environment.var_to_hint_override[told] = 7
    sizes: Any = SizeVarAllocator(environment)
    # Until torch 2.11 it has another name.
    hint = getattr(sizes, "optimization_hint", None) or sizes.size_hint
    assert [hint(size, fallback=0) for size in (told, 3 * told, unknown)] == [7, 21, 0]


@relies_on("torch.fx.experimental.symbolic_shapes.statically_known_true")
def symbols_can_be_compared_without_a_guard() -> None:
    """`statically_known_true(expression)` returns a bool and adds no guard. The result is False if
    the answer depends on an unknown symbol.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

    environment = ShapeEnv()
    size = environment.create_unbacked_symint()
    torch._check(size >= 2)
    assert statically_known_true(3 == 3)
    assert statically_known_true(size >= 1)
    assert not statically_known_true(size == 7)
    assert not environment.guards


@relies_on(
    "torch._foreach_abs",
    "torch._foreach_add",
    "torch._foreach_lerp_",
    "torch._foreach_mul",
    "torch._foreach_neg",
    "torch._foreach_sign",
)
def lists_of_tensors_are_computed_with_in_one_call() -> None:
    """A `_foreach_` function does to each tensor of a list what the function of that name does.
    `_foreach_lerp_` takes a list of weights; weights 0 and 1 give the ends exactly.
    """
    xs = [torch.tensor([-2.0, 0.0]), torch.tensor([0.1])]
    signs = torch._foreach_sign(torch._foreach_abs(xs))
    assert [s.tolist() for s in signs] == [[1.0, 0.0], [1.0]]
    rest = torch._foreach_add(torch._foreach_neg(signs), 1)
    assert [r.tolist() for r in rest] == [[0.0, 1.0], [0.0]]
    now = torch._foreach_mul(xs, 3)
    torch._foreach_lerp_(now, [x + 0.1 for x in xs], rest)
    assert torch.equal(now[0], torch.tensor([-6.0, 0.1]))
    assert torch.equal(now[1], xs[1] * 3)
