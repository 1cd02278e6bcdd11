"""Resume files, called checkpoints in messages: one a run, written atomically after each epoch, with all that the next epoch depends on.

They hold tensors and plain Python only, so that torch.load(weights_only=True) reads them: loading one runs no code.
"""

import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actpress.train.files import atomic_write

FORMAT = 1  # of the dictionary; raised whenever a key changes its meaning
UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (with the key run_id) atomically: `path` always holds a complete checkpoint, the old or the new one."""
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load(path: Path, run_id: str, device: torch.device) -> dict[str, Any]:
    """Read the checkpoint of run `run_id` into CPU memory.

    Raises ValueError, naming the path and what to do, if the file is damaged, belongs to another config or was written on
    another kind of device (whose trajectory cannot be continued bit for bit). The file is left as it is.
    """
    advice = "delete it or set resume=false to train anew"
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes; torch.load does not check its sums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"checkpoint {path} is truncated or damaged ({reason}); {advice}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path} is not in this version's format {FORMAT}; {advice}")
    if state["run_id"] != run_id:
        raise ValueError(f"checkpoint {path} belongs to run {state['run_id']}, not to {run_id}; {advice}")
    if state["device"] != device.type:
        raise ValueError(
            f"checkpoint {path} was written on {state['device']}, this run is on {device.type}; "
            f"set runtime.device={state['device']}, or {advice}"
        )
    return state


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the generators of python, numpy and torch, and of the CUDA device if `device` is one."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - third-party code draws from numpy's global state
    numpy_state["state"]["key"] = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the generators to the states that `random_state` returned."""
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    numpy_state = state["numpy"] | {"state": inner | {"key": inner["key"].numpy().astype(np.uint32)}}
    np.random.set_state(numpy_state)  # noqa: NPY002 - see above
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
