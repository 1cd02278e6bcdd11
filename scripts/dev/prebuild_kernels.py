"""Compile beforehand, without a GPU, every Triton kernel that given training steps and kernel cases launch, into a folder to take along.

python scripts/dev/prebuild_kernels.py build LIST.yaml FOLDER    trace and compile -> FOLDER/cache, manifest.json, kernels.pickle
python scripts/dev/prebuild_kernels.py check FOLDER              on the GPU machine: one line that says why it does not fit, and exit 1
python scripts/dev/prebuild_kernels.py unpack FOLDER CACHE       check, then copy to CACHE, which is to be TRITON_CACHE_DIR
python scripts/dev/prebuild_kernels.py warm FOLDER CACHE         where it does not fit: compile the same kernels there, --workers 16

LIST.yaml holds `steps` (fields of Step) and `cases` (pairs of a case of kernels/proof/registry.py and a dtype). Run it with the versions of
Python and Triton that the GPU machine has: the key of a cached kernel holds Triton's files, ptxas, the kernel's source, argument types and
options.

A step runs on fake tensors: each registered operation also runs its launcher on tensors without memory, and what that would launch is
noted. Argument types are made by Triton's own binder: divisibility by 16 of numbers and addresses, the value 1. An allocation is aligned,
so a view's address is as divisible as its offset. Autocast is that of the CPU, which leaves other operations in fp32 than that of CUDA.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import unset_fake_temporarily
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import make_backend
from triton.runtime.cache import triton_key
from triton.runtime.jit import MockTensor

from actpress.kernels.common import launch
from actpress.kernels.proof import registry

ROOT = Path(__file__).resolve().parents[2]
ARCH = 90
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step: names as in configs/, a batch of square images."""

    model: str
    method: str
    batch: int
    image_size: int = 224
    classes: int = 1000
    precision: str = "bf16"
    channels_last: bool = True


class Pointer(NamedTuple):
    """A tensor as a launch sees it: its dtype and its address modulo 16."""

    dtype: torch.dtype
    address: int


class Kernel(NamedTuple):
    """A kernel with all that decides how it is compiled. Can be pickled."""

    module: str
    name: str
    arguments: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was asked for and what was done. failures: a step or a kernel -> why it could not be traced or compiled."""

    kernels: int
    compiled: int  # the others were in the folder already
    seconds: float
    failures: dict[str, str]


class _Target:
    """Triton's driver where there is no GPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


def kernel_of(found: launch.Launch) -> Kernel:
    arguments = tuple(
        (
            name,
            Pointer(value.dtype, value.storage_offset() * value.itemsize % 16)
            if isinstance(value, torch.Tensor)
            else value,
        )
        for name, value in found.arguments.items()
    )
    return Kernel(found.kernel.fn.__module__, found.kernel.fn.__name__, arguments, tuple(found.options.items()))


def trace(unit: Step | tuple[str, str]) -> dict[str, Kernel]:
    """The kernels of a step or a case, by what they are made of."""
    launches = _launches_of_step(unit) if isinstance(unit, Step) else _launches_of_case(*unit)
    kernels = [kernel_of(found) for found in launches if 0 not in found.grid]
    return {repr(kernel): kernel for kernel in kernels}


def _launches_of_case(name: str, dtype: str) -> list[launch.Launch]:
    case = registry.cases_named([name])[name]
    wanted = next((wanted for wanted in case.dtypes if registry.name_of(wanted) == dtype), None)
    if wanted is None:
        raise ValueError(f"{name}: dtype {dtype!r}, allowed: {', '.join(map(registry.name_of, case.dtypes))}")
    return registry.launches(case, wanted, case.configs[0])


def _launches_of_step(step: Step) -> list[launch.Launch]:
    import hydra
    from omegaconf import OmegaConf

    from actpress import measure, swap
    from actpress.train import models

    if step.precision not in PRECISIONS:
        raise ValueError(f"precision {step.precision!r}, allowed: {', '.join(PRECISIONS)}")
    method = hydra.utils.instantiate(OmegaConf.load(ROOT / "configs" / "method" / f"{step.method}.yaml"))
    dtype = PRECISIONS[step.precision]
    build = functools.partial(models.create, step.model, num_classes=step.classes, image_size=step.image_size)
    with measure.fake_model(build) as net, _kernels_traced() as launches:
        if method is not None and step.method != "none":
            swap.apply(net, method)
        layout = torch.channels_last if step.channels_last else torch.contiguous_format
        for _ in range(2):  # the first pass of a model is watched, and some layers learn in it what others read
            x = torch.empty(step.batch, 3, step.image_size, step.image_size).contiguous(memory_format=layout)
            with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                y = net(x)
            y.float().sum().backward()
    return launches


@contextlib.contextmanager
def _kernels_traced() -> Iterator[list[launch.Launch]]:
    """Within, operations on fake CPU tensors note what they would launch on a GPU."""
    registry.all_cases()  # all operations are registered
    on_gpu, fakes = (
        launch.on_gpu,
        {name: op._abstract_fn for name, op in OPDEFS.items() if name.startswith("actpress::")},
    )
    launches: list[launch.Launch] = []

    def noting(op: Any, fake: Any, *arguments: Any, **options: Any) -> Any:
        with unset_fake_temporarily(), torch.no_grad(), launch.recorded() as found:
            op._backend_fns.get("cuda", op._init_fn)(*map(_without_memory, arguments), **options)
        launches.extend(found)
        return fake(*arguments, **options)

    launch.on_gpu = lambda x: x.dtype != torch.float64
    for name, fake in fakes.items():
        OPDEFS[name]._abstract_fn = functools.partial(noting, OPDEFS[name], fake)
    try:
        yield launches
    finally:
        launch.on_gpu = on_gpu
        for name, fake in fakes.items():
            OPDEFS[name]._abstract_fn = fake


def _without_memory(value: Any) -> Any:
    """A fake tensor, or those in a list, as meta tensors of the same strides and offset."""
    if isinstance(value, torch.Tensor):
        memory = torch.empty(value.untyped_storage().nbytes() // value.itemsize, dtype=value.dtype, device="meta")
        return memory.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, list | tuple):
        return type(value)(map(_without_memory, value))
    return value


def compile_kernel(kernel: Kernel) -> tuple[str, str, bool]:
    """Compile into TRITON_CACHE_DIR -> (the key it is cached by, its name, whether it was not there yet)."""
    triton.runtime.driver.set_active(_Target())
    compiled: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(not cache_hit)
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    given = {name: _mock(value) if isinstance(value, Pointer) else value for name, value in kernel.arguments}
    result = function.warmup(*(given[name] for name in function.arg_names), grid=(1,), **dict(kernel.options))
    if hasattr(nvidia, "make_launcher"):  # up to Triton 3.6 or so each signature has a launcher of its own, in C
        nvidia.CudaLauncher(result.src, result.metadata)
    return result.hash, f"{kernel.module.split('.')[2]}.{kernel.name}", any(compiled)


def _mock(pointer: Pointer) -> MockTensor:
    tensor = MockTensor(pointer.dtype)
    tensor.data_ptr = lambda: pointer.address
    return tensor


def _prepare(cache: str) -> None:
    """Of each process that compiles. Where libcuda is missing, one of the same symbols stands in for it, to link and import modules in C.
    Kernels are kept without intermediate code, which no launch reads."""
    os.environ["TRITON_CACHE_DIR"] = triton.knobs.cache.dir = cache
    triton.knobs.compilation.store_binary_only = True
    torch.set_num_threads(1)
    try:
        nvidia.libcuda_dirs()
    except AssertionError:
        triton.knobs.nvidia.libcuda_path = str(Path(cache) / "libcuda")
        ctypes.CDLL(str(Path(cache) / "libcuda" / "libcuda.so.1"), ctypes.RTLD_GLOBAL)


def _libcuda(folder: Path) -> None:
    """A libcuda.so.1 whose functions do nothing. Without their names in it a linker may leave out that a module needs libcuda, and the
    module could not be imported anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = Path(nvidia.__file__).read_text() + Path(nvidia.__file__).with_suffix(".c").read_text()
    with tempfile.NamedTemporaryFile("w", suffix=".c") as file:
        file.write("".join(f"void {name}(void) {{}}\n" for name in sorted(set(re.findall(r"\bcu[A-Z]\w+", sources)))))
        file.flush()
        compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"
        command = [compiler, "-shared", "-o", str(folder / "libcuda.so.1"), "-Wl,-soname,libcuda.so.1", file.name]
        subprocess.run(command, check=True)


def prebuild(steps: Sequence[Step], cases: Sequence[tuple[str, str]], folder: Path, workers: int = 2) -> Summary:
    """Trace `steps` and `cases` (name, dtype) and compile what they launch into `folder`, whose cache is added to. One that cannot be
    traced or compiled is named in the summary's failures; the others are still done."""
    begin = time.perf_counter()
    failures: dict[str, str] = {}
    units = [*steps, *map(tuple, cases)]
    with _pool(workers, folder / "cache") as pool:
        traced = {key: kernel for found in _done(pool, trace, units, failures) for key, kernel in found.items()}
        kernels = list(traced.values())
        done = _compile(pool, kernels, failures)
    (folder / "kernels.pickle").write_bytes(pickle.dumps(kernels))
    names = dict(sorted((key, name) for key, name, _ in done))
    manifest = {**identity(), "built_for": str((folder / "cache").resolve()), "count": len(names), "kernels": names}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return _summary(done, begin, failures)


def warm(folder: Path, cache: Path, workers: int) -> Summary:
    """Compile the kernels that `prebuild` listed in `folder` into `cache`; those that are there already are looked up."""
    begin = time.perf_counter()
    failures: dict[str, str] = {}
    kernels = pickle.loads((folder / "kernels.pickle").read_bytes())
    with _pool(workers, cache) as pool:
        done = _compile(pool, kernels, failures)
    return _summary(done, begin, failures)


def _compile(
    pool: ProcessPoolExecutor, kernels: Sequence[Kernel], failures: dict[str, str]
) -> list[tuple[str, str, bool]]:
    _done(pool, build_driver, [None], failures)
    return _done(pool, compile_kernel, kernels, failures)


def _summary(done: Sequence[tuple[str, str, bool]], begin: float, failures: dict[str, str]) -> Summary:
    """Launches that differ in their numbers alone are one kernel of Triton's."""
    new = {key for key, _, compiled in done if compiled}
    return Summary(len({key for key, _, _ in done}), len(new), time.perf_counter() - begin, failures)


def build_driver(_: None) -> None:
    """Triton's own module in C."""
    nvidia.CudaUtils()


def _pool(workers: int, cache: Path) -> ProcessPoolExecutor:
    cache = cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    _libcuda(cache / "libcuda")
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_prepare, initargs=(str(cache),))


def _done(pool: ProcessPoolExecutor, function: Any, inputs: Sequence, failures: dict[str, str]) -> list:
    """Results of `function` of each input. Where it raises, the input is named among the failures."""
    futures = [(value, pool.submit(function, value)) for value in inputs]
    results = []
    for value, future in futures:
        error = future.exception()
        if error is None:
            results.append(future.result())
        else:
            named = f"{value.module}.{value.name}" if isinstance(value, Kernel) else str(value)
            failures[named] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return results


def identity() -> dict[str, Any]:
    """All that a cached kernel depends on beside its arguments, and what cached modules in C depend on."""
    sources = b"".join(file.read_bytes() for file in sorted((ROOT / "kernels").rglob("*.py")))
    return {
        "triton": triton.__version__,
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest(),
        "compiler": make_backend(GPUTarget("cuda", ARCH, 32)).hash(),  # of ptxas, and the architecture
        "environment": dict(sorted(get_cache_invalidating_env_vars().items())),
        "sources": hashlib.sha256(sources).hexdigest(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "arch": ARCH,
    }


def validate(folder: Path) -> str | None:
    """Why the kernels in `folder` would not be found in this environment, in one line; None if they would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    # PyTorch takes no part in the key: a different version is no reason to compile anew.
    wrong = [
        f"{name} {manifest[name]!r}, here {here!r}"
        for name, here in identity().items()
        if name != "torch" and manifest[name] != here
    ]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor != manifest["arch"]:
            wrong.append(f"arch {manifest['arch']}, here {10 * major + minor}")
    return f"{folder} was built for another environment: {'; '.join(wrong)}" if wrong else None


def unpack(folder: Path, cache: Path) -> None:
    """Copy the cache to `cache`. Triton notes the files of a kernel by absolute paths; they are rewritten."""
    cache = cache.resolve()
    shutil.copytree(folder / "cache", cache, dirs_exist_ok=True, ignore=shutil.ignore_patterns("libcuda"))
    for file in cache.glob("*/__grp__*.json"):
        group = json.loads(file.read_text())
        group["child_paths"] = {name: str(file.parent / Path(path).name) for name, path in group["child_paths"].items()}
        file.write_text(json.dumps(group))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("build", "check", "unpack", "warm"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    if len(options.paths) != (1 if options.action == "check" else 2):
        parser.error(f"{options.action} takes {'FOLDER' if options.action == 'check' else 'two paths'}; see --help")
    first, last = options.paths[0], options.paths[-1]
    if options.action == "build":
        import yaml

        wanted = yaml.safe_load(first.read_text())
        steps = [Step(**step) for step in wanted.get("steps") or ()]
        summary = prebuild(steps, [tuple(case) for case in wanted.get("cases") or ()], last, options.workers)
    elif options.action == "warm":
        summary = warm(first, last, options.workers)
    else:
        wrong = validate(first)
        if wrong:
            print(wrong, file=sys.stderr)
            return 1
        if options.action == "unpack":
            unpack(first, last)
            print(f"TRITON_CACHE_DIR={last.resolve()}")
        return 0
    for name, why in summary.failures.items():
        print(f"{name}: {why}", file=sys.stderr)
    print(
        f"{summary.kernels} kernels, {summary.compiled} compiled, {len(summary.failures)} failures, {summary.seconds:.0f} s"
    )
    return bool(summary.failures)


if __name__ == "__main__":
    sys.exit(main())
