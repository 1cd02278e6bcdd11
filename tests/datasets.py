"""Data sets for tests, made as the command line makes them."""

import torch
from omegaconf import OmegaConf

from actpress.train import data
from paths import CONFIGS

CPU = torch.device("cpu")


def dataset(name: str, /, **changes):
    """The config of a dataset as the command line would give it."""
    return OmegaConf.merge(OmegaConf.load(CONFIGS / "data" / f"{name}.yaml"), changes)


def recipe(batch_size: int = 4, **augment):
    return OmegaConf.create({"batch_size": batch_size, "augment": augment})


def create(name: str, /, batch_size: int = 4, augment: dict | None = None, seed: int = 0, workers: int = 0, **changes):
    return data.create(
        dataset(name, **changes), recipe(batch_size, **(augment or {})), device=CPU, seed=seed, workers=workers
    )


def epoch(loader, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.set_epoch(number)
    return [(x.clone(), y.clone()) for x, y in loader]


def same(first, second) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in pairs)
