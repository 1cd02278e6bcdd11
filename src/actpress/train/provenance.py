"""Where a result was measured: commit, device, versions."""

import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy")


def commit() -> dict[str, Any]:
    """{commit: id of the checkout that this file is part of, dirty: whether files other than results differ from it}.

    ACTPRESS_COMMIT names the commit of a copy that has no git; whoever sets it vouches for it. Without either both values are None.
    """
    if named := os.environ.get("ACTPRESS_COMMIT"):
        return {"commit": named, "dirty": False}
    here = Path(__file__).resolve()
    if git(here.parent, "ls-files", here.name) != here.name:
        return {"commit": None, "dirty": None}
    changes = git(here.parent, "status", "--porcelain", "--", ":(top)", ":(top,exclude)results")
    return {"commit": git(here.parent, "rev-parse", "HEAD"), "dirty": bool(changes)}


def git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command in `folder`; None if git is missing or the command fails, as outside of a checkout."""
    try:
        answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.rstrip() if answer.returncode == 0 else None


def environment(device: torch.device | str) -> dict[str, Any]:
    """Device, memory of a GPU in bytes, versions, commit of this source, and time."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "device_type": device.type,
        "cuda": torch.version.cuda if cuda else None,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
        **commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def nvidia_smi(*fields: str) -> str | None:
    """What nvidia-smi says of the first GPU: values of `fields`, separated by commas. None if it is missing or has no answer."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0].strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name if the system tells it, else its architecture."""
    listing = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", listing.read_text(), re.MULTILINE) if listing.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()
