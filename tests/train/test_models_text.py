"""Networks of transformers for memory tables; skipped where that optional extra is not installed."""

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from actpress import measure
from actpress.methods import Inverted, Stock
from actpress.train import cli, models_text, run
from paths import ROOT

pytest.importorskip("transformers")
CONFIGS = ROOT / "configs" / "model" / "text"
PARAMETERS = {"bert_base": 109_660_648, "mistral": 7_114_753_000}


def from_config(name, **changes):
    config = OmegaConf.merge({"data": {"num_classes": 1000}}, {"model": OmegaConf.load(CONFIGS / f"{name}.yaml")}).model
    return hydra.utils.instantiate(config, **changes)


def test_every_name_has_a_config():
    assert set(models_text.BUILDERS) == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("name,count", PARAMETERS.items())
def test_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in from_config(name).parameters()) == count


def test_reads_token_ids():
    net = models_text.create(
        "bert_base", num_classes=7, tokens=16, layers=1
    )  # Mistral's width is fixed: too large to run here
    x = net.example_input(3)
    assert x.shape == (3, 16) and x.dtype == torch.long
    logits = net(x)
    logits.sum().backward()
    assert logits.shape == (3, 7)


def test_unknown_name():
    with pytest.raises(ValueError, match="text model 'gpt' is unknown; allowed: bert_base, mistral"):
        models_text.create("gpt", 10, 16, 1)


def test_bert_saves_what_the_formula_says():
    """GELU's input is gone, one bit an element comes: 12 layers of 16 x 512 x 3072 elements in fp32, 1.09 GiB."""
    stock, inverted = (
        measure.predicted_memory(lambda: from_config("bert_base"), method, 16, 0, "fp32")["saved_bytes"]
        for method in (Stock(), Inverted())
    )
    assert stock - inverted == 12 * 16 * 512 * 3072 * 4 * 31 // 32
    assert round((stock - inverted) / 2**30, 2) == 1.09


@pytest.mark.quick(1)
@pytest.mark.parametrize("precision,saving", [("fp32", 15.0), ("bf16-true", 13.3)])
def test_mistral_saves_what_was_predicted(precision, saving):
    """32 layers, SDPA attention, percent of all saved bytes, within .3 points."""
    stock, inverted = (
        measure.predicted_memory(lambda: from_config("mistral"), method, 1, 0, precision)["saved_bytes"]
        for method in (Stock(), Inverted())
    )
    assert 100 * (1 - inverted / stock) == pytest.approx(saving, abs=0.3)


def test_training_on_images_is_refused(tmp_path):
    configs = ROOT / "configs"
    cfg = cli.compose(
        [
            "model=text/bert_base",
            "model.layers=1",
            "logger=none",
            f"paths.outputs={tmp_path}",
            f"paths.records={tmp_path}",
        ],
        configs,
    )
    with pytest.raises(ValueError, match="model=bert_base does not read images, which data=digits are"):
        run.train(cfg)
