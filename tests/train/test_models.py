"""Every network builds in every geometry it has, with the parameter count its paper or library states."""

import copy

import pytest
import timm
import torch
import torchvision
from omegaconf import OmegaConf
from torch import nn

from actpress.train import models
from paths import ROOT

CONFIGS = ROOT / "configs" / "model"
GEOMETRIES = {"imagenet": (224, 1000), "cifar": (32, 10)}  # image_size, num_classes
PARAMETERS = {  # imagenet geometry at 224 px and 1000 classes, cifar geometry at 32 px and 10
    "resnet18": (11_689_512, 11_173_962),
    "resnet34": (21_797_672, 21_282_122),
    "resnet50": (25_557_032, 23_520_842),
    "resnet101": (44_549_160, 42_512_970),
    "resnet152": (60_192_808, 58_156_618),
    "wrn50_2": (68_883_240, 66_847_050),
    "densenet121": (7_978_856, 6_956_426),
    "densenet161": (28_681_000, 26_482_570),
    "resnet20": (None, 269_722),
    "resnet164": (None, 1_703_258),
    "resmlp_s12": (15_350_872, 14_279_818),
    "resmlp_s24": (30_020_680, 28_536_202),
    "resmlp_tiny": (851_392, 479_530),
    "vit_ti": (5_717_416, 5_362_762),
    "vit_s": (22_050_664, 21_342_346),
    "vit_b": (86_567_656, 85_152_010),
    "vit_nano": (861_064, 683_242),
}
CASES = [
    pytest.param(name, geometry, count, id=f"{name}-{geometry}")
    for name, counts in PARAMETERS.items()
    for geometry, count in zip(GEOMETRIES, counts, strict=True)
    if count is not None
]


def build(name: str, geometry: str) -> nn.Module:
    image_size, num_classes = GEOMETRIES[geometry]
    return models.create(name, num_classes, image_size, geometry)


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def gradients_on_meta(net: nn.Module, image_size: int) -> tuple[int, ...]:
    """Forward and backward without memory; the shape of the logits."""
    logits = net(torch.empty(2, 3, image_size, image_size, device="meta"))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    return tuple(logits.shape)


def test_every_name_has_a_config_and_a_count():
    assert set(models.NAMES) == set(PARAMETERS) == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.quick(6)
@pytest.mark.parametrize(("name", "geometry", "count"), CASES)
def test_builds_without_memory(name, geometry, count):
    with torch.device("meta"):
        net = build(name, geometry)
    assert all(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
    assert parameters(net) == count
    image_size, num_classes = GEOMETRIES[geometry]
    assert gradients_on_meta(net, image_size) == (2, num_classes)


@pytest.mark.quick(5)
@pytest.mark.parametrize(("name", "library"), [*models._TORCHVISION.items(), *models._VIT.items()])
def test_imagenet_geometry_is_the_library_network(name, library):
    with torch.device("meta"):
        ours = build(name, "imagenet").state_dict()
        if name.startswith("vit"):
            theirs = timm.create_model(library).state_dict()
        else:
            theirs = torchvision.models.get_model(library).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("name", models._TORCHVISION)
def test_cifar_stem_keeps_the_resolution(name):
    with torch.device("meta"):
        net = build(name, "cifar")
    stem = net.features[:4] if name.startswith("densenet") else nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    assert stem[0].kernel_size == (3, 3)
    assert tuple(stem(torch.empty(2, 3, 32, 32, device="meta")).shape[2:]) == (32, 32)


@pytest.mark.parametrize("name", ["resmlp_s12", "resmlp_s24"])
def test_resmlp_in_cifar_geometry_differs_in_the_patches_alone(name):
    """Only the stem and the mixing of patches depend on the patch size: 64 patches of 4x4 in place of 196 of 16x16."""
    with torch.device("meta"):
        large, small = (models.create(name, 10, *GEOMETRIES[key][:1], key).state_dict() for key in GEOMETRIES)
    assert list(large) == list(small)
    differ = {key for key in large if large[key].shape != small[key].shape}
    assert {key.split(".")[-2] for key in differ} == {"proj", "linear_tokens"}


@pytest.mark.parametrize("name", ["resmlp_s12", "resmlp_s24"])
def test_resmlp_layer_scale_is_the_library_one(name):
    scale = {"resmlp_s12": 1e-4, "resmlp_s24": 1e-5}[name]
    assert all(torch.all(block.ls1 == scale) for block in build(name, "cifar").blocks)


@pytest.mark.parametrize("name", ["resnet20", "resnet164"])
def test_own_networks_consist_of_modules(name):
    """Every ReLU and BatchNorm is its own module, called once, so that replacing modules replaces every op."""
    net = build(name, "cifar")
    calls = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU | nn.Linear):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(calls) == len(set(calls))
    count = {kind: sum(isinstance(module, kind) for module in calls) for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)}
    if name == "resnet20":
        assert count == {nn.Conv2d: 19, nn.BatchNorm2d: 19, nn.ReLU: 19}
    else:  # 3 x 18 bottlenecks of three, the stem, three projections
        assert count == {nn.Conv2d: 166, nn.BatchNorm2d: 163, nn.ReLU: 163}


def test_resnet20_shortcut_pads_with_zeros():
    x = torch.randn(2, 16, 7, 7)
    padded = models.ZeroPadShortcut(16, 32)(x)
    assert tuple(padded.shape) == (2, 32, 4, 4)
    assert torch.equal(padded[:, 8:24], x[:, :, ::2, ::2])
    assert padded[:, :8].abs().sum() == padded[:, 24:].abs().sum() == 0


@pytest.mark.parametrize("name", ["resnet20", "resnet164", "resmlp_tiny", "vit_nano"])
def test_small_networks_learn_a_batch(name):
    torch.manual_seed(0)
    net = models.create(name, 10, 16, "cifar")
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8)
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(net(x), y)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0], f"{name}: {losses}"


def test_same_seed_same_weights():
    def build_seeded() -> dict:
        torch.manual_seed(3)
        return models.create("resnet20", 10, 32).state_dict()

    first, second = build_seeded(), build_seeded()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("image_size", "stem"), [(32, (3, 3)), (64, (3, 3)), (65, (7, 7)), (224, (7, 7))], ids=lambda value: str(value)
)
def test_auto_geometry_follows_the_image_size(image_size, stem):
    with torch.device("meta"):
        assert models.create("resnet18", 10, image_size).conv1.kernel_size == stem


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnet19"}, ["'resnet19'", "resnet18", "vit_b"]),
        ({"name": "resnet18", "geometry": "mnist"}, ["'mnist'", "auto, imagenet, cifar"]),
        ({"name": "resnet20", "image_size": 224}, ["resnet20", "224", "'cifar'"]),
        ({"name": "resnet164", "image_size": 32, "geometry": "imagenet"}, ["resnet164", "'imagenet'", "'cifar'"]),
        ({"name": "vit_ti", "image_size": 100}, ["vit_ti", "100", "multiples of 16"]),
        ({"name": "resmlp_s12", "image_size": 30}, ["resmlp_s12", "30", "multiples of 4"]),
        ({"name": "resnet18", "num_classes": 0}, ["num_classes", "0", "at least 1"]),
        ({"name": "resnet18", "image_size": "32"}, ["image_size", "'32'"]),
        ({"name": "resnet20", "image_size": 32, "pretrained": True}, ["resnet20", "no pretrained", "resnet18"]),
        ({"name": "vit_nano", "pretrained": True}, ["vit_nano", "no pretrained", "vit_ti"]),
        ({"name": "resmlp_tiny", "pretrained": True}, ["resmlp_tiny", "no pretrained", "resmlp_s12"]),
        ({"name": "resnet50", "image_size": 32, "pretrained": True}, ["resnet50", "'cifar'", "allowed: 'imagenet'"]),
        ({"name": "resmlp_s12", "image_size": 32, "pretrained": True}, ["resmlp_s12", "'cifar'", "'imagenet' at 224"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named_on_one_line(arguments, words):
    with pytest.raises(ValueError) as caught:
        models.create(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc"), ("densenet121", "classifier")])
def test_pretrained_weights_are_kept_but_for_the_head(monkeypatch, name, head):
    """The library's weights, as if downloaded; a head of another width is fresh."""
    donor = torchvision.models.get_model(name)
    weights = copy.deepcopy(donor.state_dict())
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda self, *_, **__: copy.deepcopy(weights))
    full = models.create(name, 1000, 224, pretrained=True).state_dict()
    narrow = models.create(name, 10, 224, pretrained=True).state_dict()
    assert all(torch.equal(full[key], weights[key]) for key in weights)
    assert all(torch.equal(narrow[key], weights[key]) for key in weights if not key.startswith(head))
    assert narrow[f"{head}.weight"].shape[0] == 10


def test_vit_asks_timm_for_weights_in_its_own_geometry(monkeypatch):
    asked = {}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.update(name=name, **options))
    models.create("vit_ti", 10, 32, pretrained=True)
    assert asked == {
        "name": "vit_tiny_patch16_224",
        "pretrained": True,
        "patch_size": 4,
        "img_size": 32,
        "num_classes": 10,
    }


def test_no_network_is_one_clear_error(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", unreachable)
    with pytest.raises(OSError, match=r"resnet18 could not be fetched \(Name or service not known\)"):
        models.create("resnet18", pretrained=True)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_name_themselves_and_take_their_shape_from_the_data(path):
    config = OmegaConf.merge({"data": {"num_classes": 7, "image_size": 32}}, {"model": OmegaConf.load(path)}).model
    values = OmegaConf.to_container(config, resolve=True)
    assert values.pop("_target_") == "actpress.train.models.create"
    assert values == {"name": path.stem, "num_classes": 7, "image_size": 32, "geometry": "auto", "pretrained": False}
