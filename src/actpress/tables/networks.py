"""The table `networks`: actpress.check of a method on public networks at small inputs.

Nothing is downloaded: weights and targets are random, and images are crops of the two photographs that scikit-learn contains. Saved bytes,
gradients and times do not depend on what a network has learned. They do depend on images being smooth: white noise is the hardest input
for a codec that keeps means of blocks.

Weights "trained" come from AdamW on the batch itself, stopped once the loss has halved. Activations and gradients then no longer have
their initial distribution, and the gradient is not yet noise.

NETWORKS: name -> Network. Shapes of a batch: images_NCHW float32, clips_NCTHW float32, ids_NL int64, targets_N int64.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import hydra
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from actpress import swap
from actpress.measure.check import LARGEST_SIZE, LEAST_COSINE, Check, check
from actpress.tables.kind import CONFIGS
from actpress.train import cli

CLASSES, TOKENS, VOCABULARY = 10, 64, 100
STEPS, LEARNING_RATE = 100, 1e-4  # for weights "trained": at most so many steps
WEIGHTS = ("initial", "trained")
# Keys of a row of the table; all others are options of its method.
KEYS = {"network", "method", "draws", "steps", "seed", "weights"}
NOTHING = "matches nothing"


class Network(NamedTuple):
    """build() returns the model. batch(generator) returns (inputs, targets), or keyword arguments for a model that returns its loss."""

    library: str
    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]


def measure(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the table: metric -> number. A word where there is no number: "matches nothing", "", "nan" or "inf".

    row: network, a key of NETWORKS; method, a name of configs/method; draws and steps, see `check`; seed, of weights and inputs; weights,
    one of WEIGHTS, by default "initial"; all other keys are options of the method. Raises ValueError for an unknown name or option, and
    what `check` raises.
    """
    options = [f"method.{name}={row[name]}" for name in row.keys() - KEYS]
    model, batch = made(row["network"], row["seed"], row.get("weights", WEIGHTS[0]))
    method = hydra.utils.instantiate(cli.compose([f"method={row['method']}", *options], CONFIGS).method)
    torch.manual_seed(row["seed"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # apply and check warn of what the note says
        try:
            found = check(model, method, batch, draws=row["draws"], steps=row["steps"])
        except swap.NothingMatches:
            return {"saved": NOTHING, "cosine": "", "size": "", "step": "", "note": ""}
    numbers = {"saved": found.ratio, "cosine": found.cosine, "size": found.norm_ratio, "step": found.step_ratio}
    words = {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}  # JSON has no NaN
    return numbers | words | {"note": note(found, method)}


def note(found: Check, method: swap.Method) -> str:
    """What `apply` and `check` would warn of, in words; "" if nothing."""
    words = []
    if not math.isfinite(found.cosine) or not math.isfinite(found.norm_ratio):
        words.append("gradient not finite")
    elif not 1 / LARGEST_SIZE <= found.norm_ratio <= LARGEST_SIZE:
        words.append(f"size not within {LARGEST_SIZE:g} of exact")
    if found.cosine < LEAST_COSINE:
        words.append(f"cosine under {LEAST_COSINE:g}")
    if words:
        words.append(f"lowest cosine: {found.gradients[0].cosine:.2f}, {found.gradients[0].name}")
    if method.changes_model and found.ratio < swap.worth(method):
        kept = [f"{item.share:.0%} {item.type}" for item in found.dense[:2]]
        words.append(f"saves little, {', '.join(kept)} stay dense" if kept else "saves little")
    return "; ".join(words)


@lru_cache(maxsize=1)
def made(name: str, seed: int, weights: str) -> tuple[nn.Module, Any]:
    """(model, batch) of a network; equal arguments give equal ones. The last pair is cached, which is safe because `check` copies it.

    Raises ValueError for an unknown name or unknown weights, ImportError if the network's library is missing.
    """
    for what, value, allowed in (("network", name, NETWORKS), ("weights", weights, WEIGHTS)):
        if value not in allowed:
            raise ValueError(f"{what}={value}, allowed: {', '.join(allowed)}")
    network = NETWORKS[name]
    torch.manual_seed(seed)
    model = network.build().train()
    batch = network.batch(torch.Generator().manual_seed(seed + 1))
    if weights == "trained":
        _train(model, batch)
    return model, batch


def _train(model: nn.Module, batch: Any) -> None:
    """Train until the loss has halved, for STEPS steps at most."""
    optimizer, first = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), None
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        first = loss.item() if first is None else first
        if loss.item() <= first / 2:
            break
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy for a batch (inputs, targets), otherwise the model's own loss or the sum of its losses; a scalar."""
    if isinstance(batch, tuple):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])
    output = model(**batch)
    return output.loss if hasattr(output, "loss") else torch.stack(list(output.values())).sum()


@lru_cache
def _photographs() -> list[Tensor]:
    """[3, 427, 640] in 0 .. 1."""
    return [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]


def _crop(noise: torch.Generator, width: int, side: int = 213) -> Tensor:
    """A crop of side x side pixels of a photograph, scaled to [3, width, width]."""
    photographs = _photographs()
    photograph = photographs[torch.randint(len(photographs), (), generator=noise)]
    top, left = (int(torch.randint(size - side, (), generator=noise)) for size in photograph.shape[1:])
    crop = photograph[None, :, top : top + side, left : left + side]
    return nn.functional.interpolate(crop, size=(width, width), mode="bilinear", antialias=True)[0]


def _normalised(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 in each channel of the batch, as networks expect images."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return (x - x.mean(axes, keepdim=True)) / x.std(axes, keepdim=True)


def _images(number: int = 8, width: int = 64) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def batch(noise: torch.Generator) -> tuple[Tensor, Tensor]:
        return _normalised(torch.stack([_crop(noise, width) for _ in range(number)])), _classes(number, noise)

    return batch


def _clips(noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four clips of four frames: a crop that moves by a pixel from frame to frame."""
    wide = torch.stack([_crop(noise, 36) for _ in range(4)])
    frames = [wide[..., frame : frame + 32, frame : frame + 32] for frame in range(4)]
    return _normalised(torch.stack(frames, dim=2)), _classes(4, noise)


def _classes(number: int, noise: torch.Generator) -> Tensor:
    return torch.randint(CLASSES, (number,), generator=noise)


def _detection(noise: torch.Generator) -> dict[str, Any]:
    boxes = torch.tensor([[10.0, 10, 60, 60], [30, 40, 100, 110]])
    images = [_crop(noise, 128) for _ in range(2)]
    return {"images": images, "targets": [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]}


def _labelled_images(noise: torch.Generator) -> dict[str, Tensor]:
    x, y = _images(4)(noise)
    return {"pixel_values": x, "labels": y}


def _ids(noise: torch.Generator) -> Tensor:
    return torch.randint(VOCABULARY, (4, TOKENS), generator=noise)


def _labelled_text(noise: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _ids(noise), "labels": _classes(4, noise)}


def _text(noise: torch.Generator) -> dict[str, Tensor]:
    ids = _ids(noise)
    return {"input_ids": ids, "labels": ids}


def _timm(name: str, number: int = 8, width: int = 64, **options: Any) -> Network:
    return Network(
        "timm",
        lambda: import_module("timm").create_model(name, num_classes=CLASSES, **options),
        _images(number, width),
    )


def _torchvision(name: str, batch: Callable[[torch.Generator], Any], **options: Any) -> Network:
    """name: dotted, below torchvision.models."""
    folder, _, function = f"torchvision.models.{name}".rpartition(".")
    options = {"num_classes": CLASSES} | options
    return Network("torchvision", lambda: getattr(import_module(folder), function)(**options), batch)


def _transformers(model: str, config: str, batch: Callable[[torch.Generator], Any], **options: Any) -> Network:
    def build() -> nn.Module:
        library = import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**options))

    return Network("transformers", build, batch)


_FASTER_RCNN = {
    "weights": None,
    "weights_backbone": None,
    "trainable_backbone_layers": 5,
    "min_size": 128,
    "max_size": 128,
    "rpn_pre_nms_top_n_train": 100,
    "rpn_post_nms_top_n_train": 50,
    "box_batch_size_per_image": 32,
}
_SMALL_TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SMALL_BERT = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "num_labels": CLASSES,
}
_SMALL_LLAMA = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
}
_VIT = {
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 64,
    "patch_size": 8,
    "num_labels": CLASSES,
}
NETWORKS: Mapping[str, Network] = {
    "vit_tiny": _timm("vit_tiny_patch16_224", 4, img_size=64, patch_size=8),
    "deit_tiny_distilled": _timm("deit_tiny_distilled_patch16_224", 4, img_size=64, patch_size=8),
    "swin_tiny": _timm("swin_tiny_patch4_window7_224", 2, 112, img_size=112),
    "convnext_tiny": _timm("convnext_tiny", 4),
    "convnextv2_atto": _timm("convnextv2_atto"),
    "mixer_s32": _timm("mixer_s32_224", 2, 224),
    "gmlp_ti16": _timm("gmlp_ti16_224", img_size=64),
    "resmlp_12": _timm("resmlp_12_224", img_size=64),
    "efficientnet_b0": _timm("efficientnet_b0"),
    "regnety_002": _timm("regnety_002"),
    "mobilenetv3_small_100": _timm("mobilenetv3_small_100"),
    "eca_nfnet_l0": _timm("eca_nfnet_l0", 4),
    "repvgg_a0": _timm("repvgg_a0"),
    "mobilevit_xxs": _timm("mobilevit_xxs"),
    "resnet18": _torchvision("resnet18", _images()),
    "r3d_18": _torchvision("video.r3d_18", _clips),
    "densenet121": _torchvision("densenet121", _images()),
    "fasterrcnn_resnet50": _torchvision("detection.fasterrcnn_resnet50_fpn", _detection, **_FASTER_RCNN),
    "vit": _transformers("ViTForImageClassification", "ViTConfig", _labelled_images, **_VIT),
    "bert": _transformers("BertForSequenceClassification", "BertConfig", _labelled_text, **_SMALL_TEXT, **_SMALL_BERT),
    "gpt2": _transformers("GPT2LMHeadModel", "GPT2Config", _text, **_SMALL_TEXT, n_layer=4, n_embd=128, n_head=4),
    "llama": _transformers("LlamaForCausalLM", "LlamaConfig", _text, **_SMALL_TEXT, **_SMALL_LLAMA),
}
