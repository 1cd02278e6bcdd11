"""What every method promises, for every file in configs/method, and for options that keep something else than the default does."""

import copy
import io
import os
import socket

import hydra
import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import actpress
from actpress import measure, swap
from actpress.codec import encoded, tokens_shape
from actpress.methods import Division, Offload, Pooling, Quantize
from paths import ROOT

CONFIGS = sorted((ROOT / "configs/method").glob("*.yaml"))
METHODS = {path.stem: hydra.utils.instantiate(OmegaConf.load(path)) for path in CONFIGS}
# Those that compile the model promise less: not the same bits, and every test here would compile for minutes.
COMPILED = [
    name for name, method in METHODS.items() if any(isinstance(e, swap.Graph) for e in method.plan(nn.Linear(2, 2)))
]
METHODS = {name: method for name, method in METHODS.items() if name not in COMPILED}
METHODS |= {
    "division, ReLU masks": Division(relu_mask=True),
    "pooling, maxima": Pooling(reduce="max"),
    "quantize, normal levels and ReLU masks": Quantize(levels="normal", relu_mask=True),
}


class Block(nn.Module):
    """One tensor read by two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(8, 12, 1, 2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.first(x) + self.second(x))


def convnet():
    """Every kind of layer that methods replace, at odd sizes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        Block(),
        nn.BatchNorm2d(12),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Dropout(0.2),
        nn.Flatten(1, 2),
        nn.Linear(3, 5),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(36 * 5, 10),
    )


def batch(n=3, memory_format=torch.contiguous_format):
    return torch.randn(n, 3, 21, 19).to(memory_format=memory_format), torch.randint(10, (n,))


@pytest.fixture(params=METHODS, ids=str)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def pair(method):
    """(stock network, the same with the method applied)"""
    stock = convnet()
    ours = copy.deepcopy(stock)
    actpress.apply(ours, method)
    return stock, ours


def grads(net, x, y):
    net.zero_grad()
    torch.manual_seed(5)
    F.cross_entropy(net(x), y).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.quick(60)
@pytest.mark.parametrize("n", [1, 3], ids=["batch 1", "batch 3"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_forward_is_bit_identical(pair, n, memory_format, bf16):
    x, _ = batch(n, memory_format)
    outputs = []
    for net in pair:
        net.to(memory_format=memory_format)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            torch.manual_seed(3)
            outputs.append(net(x))
    assert torch.equal(*outputs)
    torch.testing.assert_close(dict(pair[0].named_buffers()), dict(pair[1].named_buffers()), rtol=0, atol=0)


def test_parameters_and_keys_survive(method):
    net = convnet()
    parameters, keys, modules = dict(net.named_parameters()), list(net.state_dict()), list(net.modules())
    values = copy.deepcopy(net.state_dict())
    actpress.apply(net, method)
    assert all(p is parameters[name] for name, p in net.named_parameters()) and len(parameters) == len(
        list(net.parameters())
    )
    assert list(net.state_dict()) == keys
    assert all(new is old for new, old in zip(net.modules(), modules, strict=True))
    assert all(torch.equal(value, values[key]) for key, value in net.state_dict().items())  # pretrained weights survive


def test_weights_load_into_and_from_stock(pair):
    stock, ours = pair
    fresh = convnet()
    fresh.load_state_dict(ours.state_dict())
    ours.load_state_dict(stock.state_dict())


def test_no_grad_and_evaluation_keep_nothing(pair):
    (x, y), ours = batch(), pair[1]
    ours.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert measure.saved_bytes(lambda: F.cross_entropy(ours(x), y)) == 0


def test_never_keeps_more_than_stock(pair):
    x, y = batch()
    stock, ours = (measure.saved_bytes(lambda net=net: F.cross_entropy(net(x), y)) for net in pair)
    assert ours <= stock


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_an_applied_model_can_be_copied(pair, kind):
    ours = pair[1]
    if kind == "deepcopy":
        twin = copy.deepcopy(ours)
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x, y = batch()
    expected, got = grads(ours, x, y), grads(twin, x, y)
    assert all(torch.equal(got[name], g) for name, g in expected.items())  # the noise stream is copied too


def test_gradients_are_finite_and_near_stock(pair):
    x, y = batch()
    exact, ours = grads(pair[0], x, y), grads(pair[1], x, y)
    torch.testing.assert_close(dict(pair[0].named_buffers()), dict(pair[1].named_buffers()), rtol=0, atol=0)
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (exact, ours)]
    assert flat[1].isfinite().all()
    assert (
        F.cosine_similarity(*flat, dim=0) > 0.7
    )  # 2 bits on random maps of a few pixels; the paper's claim is for large ones


LAYERS = {
    "linear": (nn.Linear(12, 7), (4, 12)),
    "linear tokens, odd": (nn.Linear(13, 7), (1, 9, 13)),
    "linear transposed view": (nn.Linear(9, 7), (2, 13, 9)),
    "conv 3x3": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 14, 14)),
    "conv stride 2, odd": (nn.Conv2d(6, 8, 3, 2, 1), (1, 6, 13, 7)),
    "conv 1x1 no bias": (nn.Conv2d(6, 8, 1, bias=False), (3, 6, 9, 9)),
    "conv grouped dilated": (nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2), (2, 6, 12, 11)),
    "batch norm": (nn.BatchNorm2d(6), (2, 6, 13, 9)),
    "layer norm": (nn.LayerNorm(12), (2, 9, 12)),
}
REPLACED = [  # the layers that a method keeps the input of through a codec
    (method, layer)
    for method in METHODS
    for layer, (stock, _) in LAYERS.items()
    if (found := METHODS[method].replacement("layer", stock)) is not None and found.codec is not None
]


def layer_input(layer, dtype=torch.float64):
    shape = LAYERS[layer][1]
    if layer == "linear transposed view":
        return torch.randn(shape[0], shape[2], shape[1], dtype=dtype).transpose(1, 2)
    return torch.randn(shape, dtype=dtype) + 0.3


def applied(method, layer, dtype=torch.float64):
    """(stock layer, the same under the method)"""
    stock = copy.deepcopy(LAYERS[layer][0]).to(dtype)
    ours = copy.deepcopy(stock)
    actpress.apply(ours, METHODS[method])
    return stock, ours


@pytest.mark.quick(67)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("method,layer", REPLACED)
def test_gradients_are_the_exact_ones_at_the_decoded_input(method, layer, memory_format):
    """Weight gradients are those of the layer at x~ = decode(encode(x)), input and bias gradients those of stock.

    Norms: their statistics stay exact, so the reference is written out: the gradient of y = w n + b with
    n = decode(encode((x - mean) / deviation)) or, for codecs that take x as it is, (x~ - mean) / deviation.
    """
    stock, ours = applied(method, layer)
    x = layer_input(layer)
    if x.dim() == 4:
        x = x.to(memory_format=memory_format)
    elif memory_format == torch.channels_last:
        pytest.skip("channels_last is for maps")
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    norm = isinstance(stock, nn.BatchNorm2d | nn.LayerNorm)
    axes = (0, 2, 3) if isinstance(stock, nn.BatchNorm2d) else (-1,)
    mean, rstd = (
        x.mean(axes, keepdim=True),
        (x.var(axes, unbiased=False, keepdim=True) + getattr(stock, "eps", 0)).rsqrt(),
    )
    twin = copy.deepcopy(ours)  # the same noise
    normalised = norm and twin.codec.normalised
    coded = (leaf.detach() - mean) * rstd if normalised else leaf.detach()
    if isinstance(stock, nn.LayerNorm):
        coded = coded.flatten(0, -2)  # a token each
    elif isinstance(stock, nn.Linear):
        coded = coded.reshape(tokens_shape(coded.shape))
    kept, saved = encoded(twin.codec, coded, twin.context)
    decoded = kept.decode(saved).reshape(x.shape)
    y = ours(leaf)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = x.clone(memory_format=torch.preserve_format).requires_grad_()
    stock(exact).backward(dy)
    if norm:
        shape = (1, -1, 1, 1) if isinstance(stock, nn.BatchNorm2d) else (-1,)
        n = decoded if normalised else (decoded - mean) * rstd
        g = dy * stock.weight.view(shape)
        expected_dx = rstd * (g - g.mean(axes, keepdim=True) - n * (g * n).mean(axes, keepdim=True))
        expected_dw = (dy * n).sum((0, 2, 3) if x.dim() == 4 else (0, 1))
    else:
        expected_dx = exact.grad
        (expected_dw,) = torch.autograd.grad(stock(decoded), stock.weight, dy)
    # float64: the same sums in another order
    torch.testing.assert_close(leaf.grad, expected_dx.detach(), rtol=1e-9, atol=1e-9, msg=lambda m: f"dx: {m}")
    torch.testing.assert_close(ours.weight.grad, expected_dw.detach(), rtol=1e-9, atol=1e-9, msg=lambda m: f"dW: {m}")
    if getattr(stock, "bias", None) is not None:
        torch.testing.assert_close(ours.bias.grad, stock.bias.grad, rtol=1e-9, atol=1e-9, msg=lambda m: f"db: {m}")


@pytest.mark.parametrize("method,layer", REPLACED)
def test_bf16_stays_bf16(method, layer):
    """Under autocast the layer keeps, of its input, no more than a bf16 copy."""
    stock, ours = applied(method, layer, torch.float32)
    x = layer_input(
        layer, torch.bfloat16 if isinstance(stock, nn.BatchNorm2d | nn.LayerNorm) else torch.float32
    ).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(x)
        assert y.dtype == stock(x).dtype
    statistics = 8 * max(x.shape[0] * x.shape[1], x.shape[1])
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and not any(t is p for p in ours.parameters())]
    assert sum(t.nbytes for t in kept) <= 2 * x.numel() + statistics
    y.float().sum().backward()
    assert x.grad.dtype == x.dtype and ours.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("method,layer", REPLACED)
def test_in_place_change_of_anything_kept_is_caught(method, layer):
    _, ours = applied(method, layer)
    parameters = {id(p) for p in ours.parameters()}
    ours(layer_input(layer))  # the first pass is watched, by hooks that see copies
    y = ours(layer_input(layer))  # held: up to PyTorch 2.11 what a node saved goes with the output
    kept = range(len([t for t in y.grad_fn.saved_tensors if t is not None and id(t) not in parameters]))
    assert kept
    for i in kept:
        loss = ours(layer_input(layer)).sum()
        tensors = [
            t for t in loss.grad_fn.next_functions[0][0].saved_tensors if t is not None and id(t) not in parameters
        ]
        tensors[i].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


LOSSLESS = {"none": {}, "pooling": {"block": 1}, "pruning": {"sparsity": 0.0}}  # methods that have such a setting


@pytest.mark.parametrize("name", LOSSLESS)
def test_the_lossless_setting_has_the_gradients_of_stock(name):
    stock, (x, y) = convnet(), batch()
    ours = copy.deepcopy(stock)
    actpress.apply(ours, type(METHODS[name])(**LOSSLESS[name]))
    exact, got = grads(stock, x, y), grads(ours, x, y)
    for parameter, gradient in exact.items():
        torch.testing.assert_close(
            got[parameter], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def _train_under_ddp(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name, method in METHODS.items():
        torch.manual_seed(0)
        net = convnet()
        actpress.apply(net, method)
        twin = copy.deepcopy(net)
        torch.manual_seed(rank)  # another batch on each rank
        x, y = batch()
        own = grads(twin, x, y)
        torch.manual_seed(rank)
        batch()
        shared = torch.nn.parallel.DistributedDataParallel(net)
        torch.manual_seed(5)
        F.cross_entropy(shared(x), y).backward()
        for parameter, p in net.named_parameters():
            mean = own[parameter]
            torch.distributed.all_reduce(mean)
            error = (p.grad - mean / 2).norm() / mean.norm()
            assert error < 1e-4, f"{name}, {parameter}: relative error {error}"  # fp32 sums in another order
        results.put((rank, name))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_under_ddp_are_the_mean_over_ranks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_train_under_ddp, (port, results), nprocs=2)
    done = {results.get() for _ in range(2 * len(METHODS))}
    assert done == {(rank, name) for rank in (0, 1) for name in METHODS}


def test_works_inside_a_checkpoint(pair):
    x, y = batch()
    ours = pair[1]
    ours[7].p = 0.0
    loss = F.cross_entropy(checkpoint(ours, x, use_reentrant=False), y)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.quick(3, "inverted_decoder", "pruning", "pooling")
def test_compiles_in_one_graph(pair, method):
    torch.compiler.reset()  # more methods than Dynamo would compile one function for
    x, y = batch()
    ours = pair[1]
    one = not isinstance(method, Offload)  # Dynamo does not trace PyTorch's save_on_cpu: it compiles what lies inside
    compiled = torch.compile(ours, fullgraph=one, backend="aot_eager")
    F.cross_entropy(compiled(x), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_compiled_layers_compress_too():
    """Stock layers would compile in one graph as well. Block means are no draw: the gradient is that of the eager layer to rounding."""
    torch.compiler.reset()
    stock, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 12, 12)
    ours = copy.deepcopy(stock)
    actpress.apply(ours, Pooling())
    gradients = []
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for net, run in ((stock, stock), (ours, ours), (ours, compiled)):
        net.zero_grad()
        run(x).square().sum().backward()
        gradients.append(net.get_parameter("0.weight").grad.clone())
    exact, eager, compiled = gradients
    torch.testing.assert_close(compiled, eager)
    assert (compiled - exact).norm() > 0.1 * exact.norm()


def test_eight_bits_give_nearly_exact_weight_gradients():
    net = torchvision.models.resnet18(num_classes=10)
    result = measure.gradient_fidelity(net, Division(bits=8), (torch.randn(4, 3, 64, 64), torch.randint(10, (4,))))
    worst = min((f.cosine, name) for name, f in result.items())
    assert worst[0] > 0.999, f"{worst[1]}: cosine {worst[0]:.5f}"


LAYOUTS = {
    "channels of channels_last": lambda: torch.randn(4, 12, 20, 18).to(memory_format=torch.channels_last)[:, 3:9],
    "every second channel": lambda: torch.randn(4, 12, 20, 18)[:, ::2],
    "every second pixel": lambda: torch.randn(4, 6, 40, 36)[:, :, ::2, ::2],
    "transposed": lambda: torch.randn(4, 6, 18, 20).transpose(2, 3),
    "batch and channels swapped": lambda: torch.randn(6, 4, 20, 18).transpose(0, 1),
    "expanded batch": lambda: torch.randn(1, 6, 20, 18).expand(4, 6, 20, 18),
}


READERS = {"conv": nn.Conv2d(6, 8, 3, padding=1), "batch norm": nn.BatchNorm2d(6), "linear": nn.Linear(18, 5)}


@pytest.mark.quick(66)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "method,layer",
    [(m, layer) for m in METHODS for layer in READERS if METHODS[m].replacement("layer", READERS[layer]) is not None],
)
def test_the_layout_of_an_input_does_not_matter(method, layer, layout):
    """A code that is decoded in another order than it was made in has nothing to do with the input: its cosine is about 0."""
    net, x = nn.Sequential(copy.deepcopy(READERS[layer])), LAYOUTS[layout]()
    actpress.apply(net, METHODS[method])
    gradients = []
    for given in (x, x.contiguous()):
        net.zero_grad()
        y = net(given)
        y.backward(y.detach())
        gradients.append(net[0].weight.grad.flatten())
    assert F.cosine_similarity(*gradients, dim=0) > 0.6
