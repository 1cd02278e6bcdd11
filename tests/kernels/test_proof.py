"""What holds for every kernel of every family, taken from the cases they declare.

Without a GPU: nothing is left out of the cases, bytes moved against the least possible, tiny inputs in Triton's interpreter with every
address checked, compilation ahead of time. With one: the cases at their real sizes, against the reference and against fp64.
"""

import ast
import importlib
import inspect
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch._library.custom_ops import OPDEFS

from actpress.kernels.common import launch
from actpress.kernels.common.launch import triton
from actpress.kernels.proof import registry, verify
from devices import DEVICES, INTERPRETED
from paths import ROOT

CASES = registry.all_cases()
MODULES = [module for name, module in sys.modules.items() if name.startswith("actpress.kernels.")]
OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("actpress::"))
MOVED = 1.10  # of the floor: what a kernel may move
MOVED_BY_PRODUCTS = (
    3.0  # by matrix products, with lists and partial sums that a cache of 50 MB holds; their time is arithmetic
)
MOVED_TWICE = 2.0  # for those that say why, in notes that begin with REREAD
REREAD = "re-read: "  # or what is written and read in between
PROGRAMS = 250  # of a tiny case

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, dtype, id=f"{c.name}-{registry.name_of(dtype)}") for c in CASES.values() for dtype in c.dtypes],
)


def test_there_are_cases():
    assert {"relu", "relu_backward"} <= set(CASES)
    assert {"actpress::relu", "actpress::relu_backward"} <= set(OPS)


@every_case
def test_a_case_is_complete(case):
    assert case.configs and case.dtypes
    assert len({frozenset(config.items()) for config in case.configs}) == len(case.configs), "a configuration twice"
    assert all("num_warps" in config for config in case.configs)
    parameter = inspect.signature(case.kernel).parameters.get("config")
    defaults = [parameter.default] if parameter and parameter.default is not inspect.Parameter.empty else []
    assert all(default == case.configs[0] for default in defaults), "the launcher's default is not the first"


@pytest.mark.parametrize("name", OPS)
def test_every_operation_has_a_kernel_and_a_fake(name):
    operation = OPDEFS[name]
    assert operation._abstract_fn is not None, "no fake implementation"
    chooses = "_triton" in inspect.getsource(operation._init_fn)  # where the first tensor does not tell the dtype
    assert chooses or "cuda" in operation._backend_fns, "no CUDA kernel"


def test_no_kernel_escapes_the_proofs():
    """Every launcher runs and every kernel is launched for some case: what is proven of cases is proven of all."""
    called: set = set()
    launched: set[str] = set()
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code) if event == "call" else None)
    try:
        for case in CASES.values():
            for dtype in case.dtypes:
                for config in case.configs:
                    launched |= {found.kernel.__name__ for found in registry.launches(case, dtype, config)}
    finally:
        sys.setprofile(None)
    launchers = {
        f"{module.__name__}.{name}": function
        for module in MODULES
        for name, function in vars(module).items()
        if name.endswith("_triton") and inspect.isfunction(function)
    }
    jitted = type(sys.modules["actpress.kernels.masks.triton"]._relu_kernel)
    kernels = {
        value.__name__
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, jitted) and value.__name__.endswith("_kernel")
    }
    assert launchers and kernels
    assert [name for name, function in launchers.items() if function.__code__ not in called] == []
    assert kernels - launched == set()


def test_no_kernel_asks_a_number_for_what_the_number_1_lacks():
    """Triton hands a kernel an argument of value 1 as a constant, which has no `to`; tl.cast takes both."""
    found = []
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            if function.name.endswith("_kernel") and function.decorator_list:
                numbers = {arg.arg for arg in function.args.args if arg.annotation is None} - {"self"}
                found += [
                    f"{path.parent.name}/{path.name}:{node.lineno} {node.value.id}.{node.attr}"
                    for node in ast.walk(function)
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                    if node.value.id in numbers and not node.value.id.endswith("_ptr")
                ]
    # a name that is assigned in the kernel is no longer the argument, but is found too: none is, today
    assert found == []


@every_dtype
def test_bytes_moved_are_near_the_least_possible(case, dtype):
    """The floor itself is at most what the inputs and outputs hold, so that nothing hides in it."""
    inputs = case.make(dtype, "meta")
    with launch.recorded():
        outputs = case.kernel(*inputs, config=case.configs[0])
    floor, moved = case.floor(*inputs), case.moved(*inputs)
    changed = inputs[:1] if case.name.endswith("_") else ()  # in place, as PyTorch marks it
    assert 0 < floor <= launch.nbytes(*verify.tensors((inputs, outputs, changed)))
    allowed = MOVED_BY_PRODUCTS if case.flops else MOVED_TWICE if re.match(REREAD + r"\w", case.notes) else MOVED
    assert floor <= moved <= allowed * floor, (
        f"{moved / floor:.3f} of the floor, allowed {allowed}; notes: {case.notes!r}"
    )


@contextmanager
def addresses_checked() -> Iterator[None]:
    """In the interpreter: every address that is read or written lies within a tensor that the launch was given."""
    builder = triton.runtime.interpreter.interpreter_builder
    executor = triton.runtime.interpreter.GridExecutor
    load, store, to_host = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    begins, ends = np.empty(0, np.uint64), np.empty(0, np.uint64)

    def given(self, arguments, options):
        nonlocal begins, ends
        result = to_host(self, arguments, options)
        tensors = [t for t in (*result[0], *result[1].values()) if isinstance(t, torch.Tensor) and t.numel()]
        extents = [sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1 for t in tensors]
        spans = sorted((t.data_ptr(), t.data_ptr() + n * t.itemsize) for t, n in zip(tensors, extents, strict=True))
        begins, ends = (np.array([span[i] for span in spans], np.uint64) for i in range(2))
        return result

    def check(pointers, mask):
        data, inside = np.broadcast_arrays(pointers.data, mask.data)
        first = np.unique(data[inside.astype(bool)]).astype(np.uint64)
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        where = np.searchsorted(begins, first, side="right").astype(np.int64) - 1
        wrong = first[(where < 0) | (first + size > ends[where])]
        assert not len(wrong), f"{len(wrong)} addresses outside of every tensor, program {builder.grid_idx}"

    def checked_load(pointers, mask, *rest, **options):
        check(pointers, mask)
        return load(pointers, mask, *rest, **options)

    def checked_store(pointers, value, mask, *rest, **options):
        check(pointers, mask)
        return store(pointers, value, mask, *rest, **options)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor._init_args_hst = given
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store
        executor._init_args_hst = to_host


@every_case
def test_tiny_is_tiny(case):
    """The interpreter takes about two milliseconds over a program."""
    if case.tiny is None:
        pytest.skip("no tiny size")
    for config in case.configs:
        with launch.recorded() as launches:
            case.kernel(*case.tiny(case.dtypes[0], "meta"), config=config)
        assert sum(math.prod(found.grid) for found in launches) <= PROGRAMS, config


@pytest.mark.quick(1, "*-float16-*", "*-bool-*", per=lambda case, **_: case.kernel.__code__)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(c, dtype, id=f"{c.name}-{registry.name_of(dtype)}")
        for c in CASES.values()
        for dtype in c.dtypes
        if c.tiny
    ],
)
def test_tiny_inputs(case, dtype, device):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates where a GPU rounds to bfloat16")
    inputs = case.tiny(dtype, device)
    every = device == "cuda" or dtype == case.dtypes[0]
    for config in case.configs if every else case.configs[:1]:
        with addresses_checked() if device == "cpu" else nullcontext():
            assert verify.difference(case, config, inputs) is None, config


def test_memory_is_poisoned_although_a_run_switched_the_filling_off(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    before = torch.are_deterministic_algorithms_enabled()
    with verify.poisoned():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.uint8) == 255).all()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off: TRITON_INTERPRET is not 1")
def test_an_address_outside_is_noticed():
    relu = sys.modules["actpress.kernels.masks.triton"]
    x, y, packed = torch.randn(9), torch.empty(9), torch.empty(2, dtype=torch.uint8)
    for tensors in ((x, y[:8], packed), (x[:8], y, packed), (x, y, packed[:1])):
        with addresses_checked(), pytest.raises(Exception, match="outside of every tensor"):
            launch.run(relu._relu_kernel, (1,), *tensors, 9, GROUPS=2, num_warps=1)


@pytest.fixture
def compiler(monkeypatch):
    """scripts/dev/compile_kernels.py, which turns the interpreter off for its process when it is imported."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ["TRITON_INTERPRET"])  # put back afterwards
    return importlib.import_module("compile_kernels")


def test_what_ptxas_says_is_read(compiler):
    """Of a kernel with a function that was not inlined; made up from two reports of ptxas."""
    report = """ptxas info    : Function properties for _inner
    64 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for _outer_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 64 bytes cumulative stack size, 1024 bytes smem"""
    assert compiler.largest(r"Used (\d+) registers", report) == 168
    assert compiler.largest(r"(\d+) bytes spill stores", report) == 8
    assert compiler.largest(r"(\d+) bytes smem", report, default=0) == 1024
    assert compiler.largest(r"(\d+) bytes smem", "", default=0) == 0
    with pytest.raises(ValueError):
        compiler.largest(r"Used (\d+) registers", "")


def test_problems_of_compiled_kernels(compiler):
    def row(**changes):
        values = {"case": "a", "kernel": "k", "config": "default", "registers": "32", "spill_bytes": "0", "triton": "3"}
        return dict.fromkeys(compiler.FIELDS, "") | values | changes

    def problems(here, there):
        return compiler.problems([row(**here)], [row(**there)])

    same = {"registers": "40"}
    assert problems(same, same) == []
    assert problems({"spill_bytes": "8"}, {"spill_bytes": "8"}) == ["a  k  default : 8 bytes of spills"]
    assert problems({"spill_bytes": "8", "config": "B=1"}, {"spill_bytes": "8", "config": "B=1"}) == []
    assert problems({"overflow": "muli"}, {"overflow": "muli"}) == ["a k: muli"]
    assert problems({"registers": "40"}, {}) == ["aot.csv is of another source: a  k  default "]
    assert problems({"registers": "40", "triton": "4"}, {}) == []
    assert problems({"case": "b"}, {}) == [
        "in aot.csv, no longer there: a  k  default ",
        "not in aot.csv: b  k  default ",
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kernel_compiles_ahead_of_time():
    """For sm_80 and sm_90, every dtype and configuration; no default spills, no offset overflows, results/kernels/aot.csv says so."""
    check = subprocess.run(
        [sys.executable, ROOT / "scripts" / "dev" / "compile_kernels.py", "--check"], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stdout[-3000:] + check.stderr[-3000:]


@pytest.mark.gpu
@every_dtype
def test_kernel_at_its_real_size(case, dtype):
    """Right in every configuration, and the same twice: an error that moves is a race."""
    inputs = case.make(dtype, "cuda")
    expected = verify.outcome(case.reference, inputs)
    for config in case.configs:
        assert verify.difference(case, config, inputs, expected) is None, config
        once, again = (verify.outcome(case.kernel, inputs, config=config) for _ in range(2))
        assert [verify.tensor_difference(a, b, 0) for a, b in zip(once, again, strict=True)] == [None] * len(once), (
            config
        )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(c, dtype, id=f"{c.name}-{registry.name_of(dtype)}")
        for c in CASES.values()
        for dtype in c.dtypes
        if c.tolerance  # the others equal a reference that tests of its own hold to fp64
    ],
)
def test_kernel_against_fp64(case, dtype):
    inputs = case.make(dtype, "cuda")
    ours = verify.outcome(case.kernel, inputs, config=case.configs[0])
    try:
        exact = verify.outcome(case.reference, in_fp64(inputs))
    except torch.OutOfMemoryError:
        pytest.skip("the reference in fp64 does not fit in the memory of this device")
    compared = [(a, b) for a, b in zip(ours, exact, strict=True) if a.is_floating_point()]
    assert compared
    for i, (a, b) in enumerate(compared):
        # beside what the case allows, the output is rounded once to its dtype
        error, allowed = verify.relative_error(a, b), case.tolerance + torch.finfo(a.dtype).eps
        assert error <= allowed, f"output {i}: relative error {error:.2e}, allowed {allowed:.0e}"


def in_fp64(value: object) -> object:
    """Floating tensors in fp64, and so what is asked for as a dtype."""
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return verify.mapped(in_fp64, value)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests" / "kernels").glob("test_*_triton.py")), ids=lambda file: file.stem
)
def test_memcheck(file):
    """The small inputs of a family's tests under compute-sanitizer, each tensor in an allocation of its own; at most four minutes."""
    pytest_command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu and not slow",
        "-p",
        "no:cacheprovider",
        str(file),
    ]
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "86", *pytest_command]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        assert "Invalid" not in output, output[-3000:]
        pytest.skip("stopped after four minutes; no error until then")
    assert process.returncode == 0, output[-3000:]
