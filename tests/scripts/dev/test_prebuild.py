"""scripts/dev/prebuild_kernels.py: a cache of kernels made without a GPU is found again elsewhere, and one that does not fit is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from paths import ROOT

STEP = {"model": "resnet18", "method": "pooling", "batch": 2, "image_size": 32, "classes": 10}


def prebuild(*arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON")}
    command = [sys.executable, "scripts/dev/prebuild_kernels.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_kernels_are_found_where_they_are_unpacked(tmp_path):
    wanted, folder, elsewhere = tmp_path / "list.yaml", tmp_path / "built", tmp_path / "elsewhere"
    wanted.write_text(yaml.safe_dump({"steps": [STEP], "cases": [["relu", "bfloat16"]]}))
    built = prebuild("build", wanted, folder)
    assert built.returncode == 0, built.stderr
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"masks._relu_kernel"} < set(manifest["kernels"].values())
    assert f"{manifest['count']} kernels, {manifest['count']} compiled, 0 failures" in built.stdout

    stand_in = {**os.environ, "LD_LIBRARY_PATH": str(folder / "cache" / "libcuda")}
    modules = list(folder.rglob("cache/*/*.so"))
    assert modules
    for module in modules:  # they need libcuda, and say so
        code = f"from importlib.util import *; spec = spec_from_file_location({module.name.partition('.')[0]!r}, {str(module)!r})"
        code += "; spec.loader.exec_module(module_from_spec(spec))"
        loaded = subprocess.run([sys.executable, "-c", code], env=stand_in, capture_output=True, text=True)
        assert loaded.returncode == 0, loaded.stderr

    assert prebuild("check", folder).returncode == 0
    assert prebuild("unpack", folder, elsewhere).returncode == 0
    shutil.rmtree(folder / "cache")
    before = {file: file.stat().st_mtime_ns for file in elsewhere.rglob("*.cubin")}
    again = prebuild("warm", folder, elsewhere)
    assert f"{manifest['count']} kernels, 0 compiled, 0 failures" in again.stdout, again.stderr
    assert {file: file.stat().st_mtime_ns for file in elsewhere.rglob("*.cubin")} == before

    (folder / "manifest.json").write_text(json.dumps({**manifest, "triton_key": "another"}))
    refused = prebuild("unpack", folder, tmp_path / "third")
    assert refused.returncode == 1 and not (tmp_path / "third").exists()
    assert refused.stderr.count("\n") == 1 and "triton_key 'another', here '" in refused.stderr


@pytest.mark.slow
def test_what_cannot_be_traced_is_named(tmp_path):
    wanted = tmp_path / "list.yaml"
    wanted.write_text(yaml.safe_dump({"steps": [STEP | {"precision": "fp8"}], "cases": [["relu", "float64"]]}))
    found = prebuild("build", wanted, tmp_path / "built", "--workers", 1)
    assert found.returncode == 1 and "0 kernels, 0 compiled, 2 failures" in found.stdout
    assert "precision 'fp8', allowed: fp32, bf16, fp16" in found.stderr
    assert "relu: dtype 'float64', allowed: float32, float16, bfloat16" in found.stderr


SPECIALISED = """
import sys
sys.path.insert(0, "scripts/dev")
import prebuild_kernels as prebuild
import torch, triton
from actpress.kernels.common import launch
from actpress.kernels.masks import triton as masks
triton.runtime.driver.set_active(prebuild._Target())
binder = masks._relu_kernel.device_caches[0][-1]
whole = torch.empty(64, dtype=torch.float32)
for x in (whole, whole[1:], whole[4:]):
    assert whole.data_ptr() % 16 == 0
    kernel = prebuild.kernel_of(launch.Launch(masks._relu_kernel, (1,), {"x": x, "n": x.numel()}, {}))
    pointer, count = (value for _, value in kernel.arguments)
    real, mock = (binder(t, t, t, count, 2)[1] for t in (x, prebuild._mock(pointer)))
    print("D" in real[0][1], real == mock)
"""


@pytest.mark.slow
def test_argument_types_are_those_of_real_tensors():
    """The address of a view is as divisible by 16 as its offset."""
    found = subprocess.run([sys.executable, "-c", SPECIALISED], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.splitlines() == ["True True", "False True", "True True"], found.stderr
