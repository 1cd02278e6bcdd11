"""Networks by name, each in its ImageNet or its CIFAR geometry.

`create` is the one entry point. torchvision supplies ResNet, Wide-ResNet and DenseNet, timm supplies ResMLP and ViT;
the two classic CIFAR networks that neither library has are written here, out of nn modules only, so that every layer a
memory-saving method may want to replace is a module it can find.

geometry   convolutional nets                     patch nets             default for image_size
imagenet   7x7 stride-2 stem, then max-pool       patch 16               above 64
cifar      3x3 stride-1 stem, no max-pool         patch 4                up to 64

Every network builds under `with torch.device("meta")`, so its memory can be predicted without allocating a weight.
torchvision's DenseNet applies its last ReLU as a function, so that one op is not a module.
Shapes: images_NCHW float, logits_NK, K = num_classes.
"""

from functools import partial

import timm
import torch
import torchvision
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

GEOMETRIES = ("auto", "imagenet", "cifar")

_TORCHVISION = {  # our name -> torchvision's
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "wrn50_2": "wide_resnet50_2",
    "densenet121": "densenet121",
    "densenet161": "densenet161",
}
_VIT = {  # our name -> timm's
    "vit_ti": "vit_tiny_patch16_224",
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
}
_RESMLP = {  # our name -> (timm's or None, depth, dim, initial layer scale)
    "resmlp_s12": ("resmlp_12_224", 12, 384, 1e-4),
    "resmlp_s24": ("resmlp_24_224", 24, 384, 1e-5),
    "resmlp_tiny": (None, 6, 96, 1e-4),
}
_CIFAR_ONLY = ("resnet20", "resnet164")
NAMES = (*_TORCHVISION, *_CIFAR_ONLY, *_RESMLP, *_VIT, "vit_nano")


def create(
    name: str,
    num_classes: int = 1000,
    image_size: int = 224,
    geometry: str = "auto",
    pretrained: bool = False,
) -> nn.Module:
    """A classifier from images_NCHW [N, 3, image_size, image_size] to logits_NK [N, num_classes], in train mode.

    pretrained=True loads the library's ImageNet weights (torchvision IMAGENET1K_V1, timm's default tag; needs a network
    or a filled cache) and gives the head `num_classes` fresh outputs where that is not 1000.

    Raises ValueError for an unknown name or geometry, a size that the patches do not divide, a geometry that the
    network does not have, or pretrained weights that do not exist; OSError if weights cannot be fetched.
    """
    if name not in NAMES:
        raise ValueError(f"model {name!r} is unknown; allowed: {', '.join(NAMES)}")
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry {geometry!r} is unknown; allowed: {', '.join(GEOMETRIES)}")
    for key, value in (("num_classes", num_classes), ("image_size", image_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} is {value!r}; allowed: an integer of at least 1")
    if geometry == "auto":
        geometry = "cifar" if image_size <= 64 else "imagenet"
    if pretrained:
        _check_pretrained(name, geometry, image_size)
    try:
        if name in _TORCHVISION:
            return _torchvision(name, num_classes, geometry, pretrained)
        if name in _CIFAR_ONLY:
            return _cifar_only(name, num_classes, image_size, geometry)
        return _patch_net(name, num_classes, image_size, geometry, pretrained)
    except OSError as error:
        raise OSError(f"pretrained weights of {name} could not be fetched ({error}); use pretrained=false") from error


def _check_pretrained(name: str, geometry: str, image_size: int) -> None:
    """Refuse early where no library has weights for this network in this shape."""
    if name in _TORCHVISION and geometry != "imagenet":
        raise ValueError(f"{name} has no pretrained weights for geometry {geometry!r}; allowed: 'imagenet'")
    if name in _RESMLP and _RESMLP[name][0] and (geometry, image_size) != ("imagenet", 224):
        raise ValueError(
            f"{name} mixes a fixed number of patches, so it has no pretrained weights for geometry {geometry!r} "
            f"at image_size {image_size}; allowed: 'imagenet' at 224"
        )
    allowed = (*_TORCHVISION, *_VIT, *(own for own, (library, *_) in _RESMLP.items() if library))
    if name not in allowed:
        raise ValueError(f"{name} has no pretrained weights; allowed with pretrained=true: {', '.join(allowed)}")


def _torchvision(name: str, num_classes: int, geometry: str, pretrained: bool) -> nn.Module:
    library = _TORCHVISION[name]
    if pretrained:
        net = torchvision.models.get_model(library, weights="IMAGENET1K_V1")
        head = "classifier" if name.startswith("densenet") else "fc"
        if num_classes != 1000:
            setattr(net, head, nn.Linear(getattr(net, head).in_features, num_classes))
        return net
    net = torchvision.models.get_model(library, weights=None, num_classes=num_classes)
    if geometry == "cifar":
        if name.startswith("densenet"):
            net.features.conv0 = _cifar_stem(net.features.conv0)
            net.features.pool0 = nn.Identity()
        else:
            net.conv1 = _cifar_stem(net.conv1)
            net.maxpool = nn.Identity()
    return net


def _cifar_stem(stem: nn.Conv2d) -> nn.Conv2d:
    """The 3x3 stride-1 stem that replaces a 7x7 stride-2 one, with ResNet's own initialisation."""
    conv = nn.Conv2d(stem.in_channels, stem.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _cifar_only(name: str, num_classes: int, image_size: int, geometry: str) -> nn.Module:
    if geometry != "cifar":
        raise ValueError(
            f"{name} at image_size {image_size} has no geometry {geometry!r}; "
            "allowed: 'cifar', which auto takes up to image_size 64"
        )
    return ResNet20(num_classes) if name == "resnet20" else PreActResNet164(num_classes)


def _patch_net(name: str, num_classes: int, image_size: int, geometry: str, pretrained: bool) -> nn.Module:
    patch = 4 if geometry == "cifar" else 16
    if image_size % patch:
        raise ValueError(
            f"{name} cuts {patch}x{patch} patches and image_size is {image_size}; allowed: multiples of {patch}"
        )
    shape = {"num_classes": num_classes, "img_size": image_size}
    if name in _VIT:
        return timm.create_model(_VIT[name], pretrained=pretrained, patch_size=patch, **shape)
    if name == "vit_nano":
        return VisionTransformer(patch_size=patch, embed_dim=96, depth=6, num_heads=3, **shape)
    library, depth, dim, scale = _RESMLP[name]
    if library and geometry == "imagenet":
        return timm.create_model(library, pretrained=pretrained, **shape)
    return MlpMixer(  # timm's ResMLP constructors fix the patch at 16, so other patches go to the class itself
        patch_size=patch,
        num_blocks=depth,
        embed_dim=dim,
        mlp_ratio=4,
        block_layer=partial(ResBlock, init_values=scale),
        norm_layer=Affine,
        **shape,
    )


class ZeroPadShortcut(nn.Module):
    """He et al.'s option A: x_NCHW -> every second pixel, channels padded with zeros. No parameters, nothing kept."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.channels = (before, out_channels - in_channels - before)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return nn.functional.pad(x_NCHW[:, :, ::2, ::2], (0, 0, 0, 0, *self.channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, an identity or zero-padded shortcut, ReLU after the sum (1512.03385)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else ZeroPadShortcut(in_channels, channels)
        self.relu2 = nn.ReLU()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x_NCHW)))))
        return self.relu2(out + self.shortcut(x_NCHW))


class PreActBottleneck(nn.Module):
    """BN-ReLU before each of 1x1, 3x3, 1x1 (1603.05027), four times `channels` out.

    Where the width changes, the first BN-ReLU feeds the projection shortcut as well as the residual branch, as in the
    authors' network; elsewhere the shortcut is the raw input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu3 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.project = (
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False) if in_channels != out_channels else None
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x_NCHW))
        shortcut = x_NCHW if self.project is None else self.project(active)
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return self.conv3(self.relu3(self.bn3(out))) + shortcut


class ResNet20(nn.Module):
    """He et al.'s CIFAR ResNet-20: 3 stages of 3 basic blocks, 16/32/64 channels, option-A shortcuts; 269,722 parameters
    at 10 classes (1512.03385)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(BasicBlock, 16, 16, 3, stride=1)
        self.layer2 = _stage(BasicBlock, 16, 32, 3, stride=2)
        self.layer3 = _stage(BasicBlock, 32, 64, 3, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, num_classes)
        _initialise(self)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images_NCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.avgpool(x)))


class PreActResNet164(nn.Module):
    """Pre-activation ResNet-164: 3 stages of 18 bottlenecks, 64/128/256 channels out; 1,703,258 parameters at 10 classes
    (1603.05027)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(PreActBottleneck, 16, 16, 18, stride=1, expansion=4)
        self.layer2 = _stage(PreActBottleneck, 64, 32, 18, stride=2, expansion=4)
        self.layer3 = _stage(PreActBottleneck, 128, 64, 18, stride=2, expansion=4)
        self.bn = nn.BatchNorm2d(256)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(256, num_classes)
        _initialise(self)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(images_NCHW))))
        return self.fc(self.flatten(self.avgpool(self.relu(self.bn(x)))))


def _stage(
    block: type[nn.Module], in_channels: int, channels: int, depth: int, stride: int, expansion: int = 1
) -> nn.Sequential:
    rest = [block(channels * expansion, channels, 1) for _ in range(depth - 1)]
    return nn.Sequential(block(in_channels, channels, stride), *rest)


def _initialise(net: nn.Module) -> None:
    """He initialisation over fan-out for convolutions and a zero classifier bias, as in the authors' code."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            with torch.no_grad():
                module.bias.zero_()
