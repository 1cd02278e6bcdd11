"""Checkpointing and offloading: exact gradients, what is saved and where, which blocks are found."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import actpress
from actpress import measure
from actpress.methods import Checkpoint, Offload
from actpress.methods.checkpoint import blocks

BLOCKS = {  # network -> (how it is built, the type of its blocks, how many)
    "timm resnet50": (lambda: timm.create_model("resnet50"), "Bottleneck", 16),
    "timm convnext": (lambda: timm.create_model("convnext_atto"), "ConvNeXtBlock", 12),
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224"), "Block", 12),
    "timm swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformerBlock", 12),
    "timm mixer": (lambda: timm.create_model("mixer_s32_224"), "MixerBlock", 8),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(), "BasicBlock", 8),
    "torchvision vit": (lambda: torchvision.models.vit_b_16(), "EncoderBlock", 12),
    "torchvision densenet": (lambda: torchvision.models.densenet121(), "_DenseLayer", 58),
    "torchvision googlenet": (lambda: torchvision.models.googlenet(init_weights=False), "Inception", 9),
}


@pytest.mark.parametrize("network", BLOCKS)
def test_blocks_are_those_of_the_network(network):
    build, kind, count = BLOCKS[network]
    with torch.device("meta"):
        found = blocks(build())
    assert [type(block).__name__ for block in found] == [kind] * count


@pytest.mark.parametrize("name", ["BertModel", "LlamaModel", "GPT2Model"])
def test_blocks_of_transformers_are_its_layers(name):
    transformers = pytest.importorskip("transformers")
    configs = {
        "BertModel": transformers.BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2),
        "LlamaModel": transformers.LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2),
        "GPT2Model": transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2),
    }
    with torch.device("meta"):
        model = getattr(transformers, name)(configs[name])
    assert {type(block).__name__ for block in blocks(model)} <= {"BertLayer", "LlamaDecoderLayer", "GPT2Block"}
    assert len(blocks(model)) == 2


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Checkpoint matches nothing in VGG"):
        actpress.apply(torchvision.models.vgg11(), Checkpoint())


def gradients(net, x, y):
    torch.manual_seed(3)
    F.cross_entropy(net(x), y).backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("method", [Checkpoint(), Offload()], ids=["checkpoint", "offload"])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_gradients_and_statistics_are_those_of_stock_to_the_bit(method, name):
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "proj_drop_rate": 0.3} if "vit" in name else {}
    stock = timm.create_model(name, num_classes=10, **options)
    ours, x, y = copy.deepcopy(stock), torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    actpress.apply(ours, method)
    for step in range(2):  # the second with the running statistics of the first
        expected, got = gradients(stock, x, y), gradients(ours, x, y)
        assert all(torch.equal(got[key], g) for key, g in expected.items()), f"step {step}"
    torch.testing.assert_close(dict(ours.named_buffers()), dict(stock.named_buffers()), rtol=0, atol=0)


def test_a_checkpointed_network_saves_the_inputs_of_its_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, x):
            return x + self.second(F.gelu(self.first(x)))

    net, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(16, 8)
    actpress.apply(net, Checkpoint())
    assert measure.saved_bytes(lambda: net(x).sum()) == 3 * x.nbytes


def test_an_offloaded_network_saves_nothing_on_the_device():
    net = timm.create_model("resnet18", num_classes=10)
    x = torch.randn(2, 3, 32, 32)
    with measure.SavedBytes() as stock:
        y = net(x)
    expected = stock.bytes
    del y
    actpress.apply(net, Offload())
    with measure.SavedBytes() as ours:
        y = net(x)
    assert ours.bytes == 0 and ours.host_bytes >= expected
    del y


def test_offload_refuses_other_options():
    with pytest.raises(ValueError, match=r"Offload: pin=1, allowed: True, False"):
        Offload(pin=1)


def test_a_block_that_changes_a_buffer_of_its_own_is_refused_by_name():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return self.second(self.first(x))

    net = nn.Sequential(Counting(), Counting())
    actpress.apply(net, Checkpoint())
    with pytest.raises(
        RuntimeError, match=r"'0' changes its buffer 'seen' in its forward pass, which checkpointing runs twice"
    ):
        net(torch.randn(2, 4, requires_grad=True))


@pytest.mark.parametrize("method", [Checkpoint(), Offload()], ids=["checkpoint", "offload"])
def test_a_second_time_matches_nothing(method):
    net = timm.create_model("resnet18", num_classes=10)
    actpress.apply(net, method)
    with pytest.raises(ValueError, match="is applied already"):
        actpress.apply(net, method)


def test_what_offload_leaves_is_said_in_words():
    net = timm.create_model("resnet18", num_classes=10)
    report = actpress.apply(net, Offload(), sample=torch.randn(2, 3, 32, 32))
    assert "nothing on the device" in str(report)
