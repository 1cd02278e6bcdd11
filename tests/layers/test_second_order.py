"""Second derivatives and other looks into the graph: stock's values, or an error that names the layer. Never a wrong number."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import actpress
from actpress import measure
from actpress.methods import BlockPruning, Division, FewBit, Frequency, Inverted, Pooling, Quantize

pytestmark = pytest.mark.filterwarnings("ignore:actpress.*saves:UserWarning", "ignore:these activations:UserWarning")

METHODS = {
    "division": Division(),
    "division, as its authors": Division(align="authors"),
    "division, ReLU masks": Division(relu_mask=True),
    "quantize": Quantize(),
    "quantize, normal levels": Quantize(levels="normal"),
    "pooling": Pooling(),
    "pruning": BlockPruning(skip=()),
    "frequency": Frequency(),
    "inverted": Inverted(),
    "few-bit": FewBit(),
}
EXACT = {  # layers whose input gradient is exact, linear in the upstream gradient, and so differentiable
    "linear": (nn.Linear(6, 5), (4, 6)),
    "linear, tokens": (nn.Linear(6, 5, bias=False), (2, 5, 6)),
    "conv 1d": (nn.Conv1d(3, 4, 3), (2, 3, 40)),
    "conv 2d": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 9, 11)),
    "conv 2d, same": (nn.Conv2d(4, 4, 4, padding="same", groups=2), (2, 4, 9, 11)),
    "conv 2d, reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 9, 11)),
    "conv 3d": (nn.Conv3d(3, 4, (1, 2, 3)), (2, 3, 4, 7, 8)),
    "batch norm 1d, eval": (nn.BatchNorm1d(3).eval(), (20, 3)),
    "batch norm 2d, eval": (nn.BatchNorm2d(3).eval(), (4, 3, 9, 11)),
    "batch norm 2d, eval, not affine": (nn.BatchNorm2d(3, affine=False).eval(), (4, 3, 9, 11)),
    "batch norm 3d, eval": (nn.BatchNorm3d(3).eval(), (2, 3, 4, 5, 6)),
    "relu": (nn.ReLU(), (4, 51)),
    "relu, in place": (nn.ReLU(inplace=True), (4, 51)),
    "leaky relu": (nn.LeakyReLU(0.1), (4, 51)),
    "leaky relu, in place": (nn.LeakyReLU(0.1, inplace=True), (4, 51)),
    "relu6": (nn.ReLU6(), (4, 51)),
    "hardtanh": (nn.Hardtanh(), (4, 51)),
    "dropout": (nn.Dropout(0.3), (4, 51)),
    "max pool": (nn.MaxPool2d(3, 2, 1), (2, 3, 9, 11)),
    "max pool, ceil, dilated": (nn.MaxPool2d((2, 3), (2, 1), (1, 0), (1, 2), ceil_mode=True), (2, 3, 9, 11)),
    "average pool": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 3, 9, 11)),
}
APPROXIMATE = {  # layers whose input gradient is made from a code
    "batch norm 1d": (nn.BatchNorm1d(3), (20, 3)),
    "batch norm 2d": (nn.BatchNorm2d(3), (4, 3, 9, 11)),
    "batch norm 2d, not affine": (nn.BatchNorm2d(3, affine=False), (4, 3, 9, 11)),
    "batch norm 3d": (nn.BatchNorm3d(3), (2, 3, 4, 5, 6)),
    "group norm": (nn.GroupNorm(2, 6), (2, 6, 9, 11)),
    "layer norm": (nn.LayerNorm(64), (3, 64)),
    "layer norm, not affine": (nn.LayerNorm(64, elementwise_affine=False), (3, 64)),
    "RMS norm": (nn.RMSNorm(64), (3, 64)),
    "RMS norm, not affine": (nn.RMSNorm(64, elementwise_affine=False), (3, 64)),
    "gelu": (nn.GELU(), (4, 51)),
    "gelu, tanh": (nn.GELU("tanh"), (4, 51)),
    "silu": (nn.SiLU(), (4, 51)),
    "silu, in place": (nn.SiLU(inplace=True), (4, 51)),
    "hardswish": (nn.Hardswish(), (4, 200)),
    "sigmoid": (nn.Sigmoid(), (4, 200)),
    "tanh": (nn.Tanh(), (4, 200)),
    "elu": (nn.ELU(), (4, 200)),
    "elu, in place": (nn.ELU(inplace=True), (4, 200)),
    "mish": (nn.Mish(), (4, 200)),
    "softplus": (nn.Softplus(), (4, 200)),
}


def pairs(layers):
    return [
        pytest.param(layers[layer], METHODS[name], id=f"{layer}-{name}")
        for layer in layers
        for name in METHODS
        if METHODS[name].replacement("0", layers[layer][0]) is not None
    ]


def applied(stock, method):
    ours = copy.deepcopy(stock)
    actpress.apply(ours, method)
    return ours


def network(layer, method):
    """(stock, ours, an input) in fp64."""
    stock = nn.Sequential(copy.deepcopy(layer[0])).double()
    stock.train(layer[0].training)
    return stock, applied(stock, method), torch.randn(layer[1], dtype=torch.float64)


def first_order(net, x, wanted="input"):
    """(sum of squares of the gradients of sum(dy * net(x)), the leaves they depend on); dy is a leaf too."""
    torch.manual_seed(5)
    leaf = x.clone().requires_grad_()
    y = net(leaf * 1)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(9)).requires_grad_()
    parameters = dict(net.named_parameters())
    of = [leaf] if wanted == "input" else list(parameters.values())
    gradients = torch.autograd.grad((y * dy).sum(), of, create_graph=True)
    return sum((g**3).sum() for g in gradients), {"x": leaf, "dy": dy, **parameters}


@pytest.mark.quick(40)
@pytest.mark.parametrize("layer,method", pairs(EXACT))
def test_the_penalty_of_an_exact_input_gradient_has_the_gradients_of_stock(layer, method):
    stock, ours, x = network(layer, method)
    results = []
    for net in (stock, ours):
        loss, leaves = first_order(net, x)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
        results.append([loss, *(zero if g is None else g for g, zero in zip(gradients, zeros, strict=True))])
    for name, expected, got in zip(["loss", *leaves], *results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def assert_refused(run, layer, method):
    with pytest.raises(RuntimeError) as error:
        run()
    text = str(error.value)
    for part in ("actpress", type(layer).__name__, "'0'", type(method).__name__, "create_graph", "where", "restore"):
        assert part in text


@pytest.mark.parametrize("layer,method", pairs(APPROXIMATE))
def test_the_penalty_of_an_approximate_input_gradient_is_refused_for_whatever_it_depends_on(layer, method):
    _, ours, x = network(layer, method)
    loss, leaves = first_order(ours, x)
    for leaf in (v for name, v in leaves.items() if not name.endswith("bias")):  # no gradient depends on a bias
        assert_refused(
            lambda t=leaf: torch.autograd.grad(loss, [t], allow_unused=True, retain_graph=True), layer[0], method
        )
    assert_refused(loss.backward, layer[0], method)


TRAINED = {name: layer for name, layer in {**EXACT, **APPROXIMATE}.items() if any(True for _ in layer[0].parameters())}


@pytest.mark.parametrize("layer,method", pairs(TRAINED))
def test_the_derivative_of_a_weight_gradient_is_refused(layer, method):
    _, ours, x = network(layer, method)
    loss, leaves = first_order(ours, x, wanted="parameters")
    for name in ("x", "dy"):
        assert_refused(
            lambda n=name: torch.autograd.grad(loss, [leaves[n]], allow_unused=True, retain_graph=True),
            layer[0],
            method,
        )


@pytest.mark.quick(60)
@pytest.mark.parametrize("layer,method", pairs({**EXACT, **APPROXIMATE}))
def test_create_graph_changes_no_first_derivative(layer, method):
    _, ours, x = network(layer, method)
    results = []
    for create_graph in (False, True):
        net, leaf = copy.deepcopy(ours), x.clone().requires_grad_()
        torch.manual_seed(5)
        loss = net(leaf * 1).square().sum()
        results.append(torch.autograd.grad(loss, [leaf, *net.parameters()], create_graph=create_graph))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_jvp_by_two_backward_passes_is_exact_or_refused():
    """torch.autograd.functional.jvp differentiates a gradient with respect to the upstream gradient alone."""
    x, v = torch.randn(2, 4, 64, dtype=torch.float64)
    for layer, exact in ((nn.Linear(64, 3), True), (nn.ReLU(), True), (nn.LayerNorm(64), False), (nn.Tanh(), False)):
        stock, ours, _ = network((layer, ()), Division())
        if exact:
            expected = torch.autograd.functional.jvp(stock, x, v)[1]
            torch.testing.assert_close(torch.autograd.functional.jvp(ours, x, v)[1], expected)
        else:
            assert_refused(lambda net=ours: torch.autograd.functional.jvp(net, x, v), layer, Division())


CRITICS = {
    "1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.LeakyReLU(0.2), nn.Conv1d(5, 4, 3, stride=2), nn.ReLU6()),
        (3, 2, 33),
    ),
    "2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6).eval(),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 4, 3),
            nn.Hardtanh(-2, 2),
            nn.Dropout(0.2),
            nn.AvgPool2d(2, ceil_mode=True),
        ),
        (3, 2, 17, 14),
    ),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 2)), (3, 2, 5, 6, 7)),
}


@pytest.mark.parametrize("method", [Division(), Quantize(), Pooling(), BlockPruning(skip=()), Frequency()], ids=repr)
@pytest.mark.parametrize("critic", CRITICS)
def test_gradient_penalty_of_a_critic_is_that_of_stock(critic, method):
    build, shape = CRITICS[critic]
    body = build()
    stock = nn.Sequential(*body, nn.Flatten(), nn.LazyLinear(9), nn.ReLU(), nn.Linear(9, 1)).double()
    x = torch.randn(shape, dtype=torch.float64)
    stock(x)
    ours = applied(stock, method)

    def penalty_gradients(net):
        torch.manual_seed(4)
        at = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(net(at).sum(), at, create_graph=True)
        penalty = (g.flatten(1).norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(
            penalty, [p for n, p in net.named_parameters() if n.endswith("weight")], allow_unused=True
        )

    for expected, got in zip(penalty_gradients(stock), penalty_gradients(ours), strict=True):
        assert (expected is None or not expected.any()) == (got is None or not got.any())
        if expected is not None and got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_gradient_penalty_trains_a_critic_in_one_step_with_its_loss():
    """The WGAN-GP step: one backward pass through the loss (weight gradients by codes) and the penalty (exact)."""
    stock = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 81, 1))
    ours, x = applied(stock, Division(bits=8)), torch.randn(4, 3, 9, 9)
    for net in (stock, ours):
        at = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(net(at).sum(), at, create_graph=True)
        (net(x).mean() + 10 * (g.flatten(1).norm(dim=1) - 1).square().mean()).backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 0.01 * q.grad.norm(), name  # 8 bits


def every_kind():
    """A network, in eval mode, with every kind of layer."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.GroupNorm(2, 6),
        nn.Hardswish(),
        nn.Flatten(),
        nn.Linear(6 * 36, 16),
        nn.GELU(),
        nn.LayerNorm(16),
        nn.RMSNorm(16),
        nn.LeakyReLU(),
        nn.Linear(16, 4),
    ).eval()


X, LABELS = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])


def loss_of(net):
    return lambda x: net(x).square().sum()


def per_sample(net):
    parameters, buffers = {n: p.detach() for n, p in net.named_parameters()}, dict(net.named_buffers())

    def loss(parameters, x, label):
        return F.cross_entropy(torch.func.functional_call(net, (parameters, buffers), (x[None],)), label[None])

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, X, LABELS)["0.weight"]


def hessian(net):
    def loss(first_pixel):
        return net(torch.cat([first_pixel, X[0].flatten()[1:]]).view(1, 3, 12, 12)).square().sum()

    return torch.func.hessian(loss)(X[0].flatten()[:1])


def forward_mode(net):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


def traced(net):
    module = torch.jit.trace(net, X)
    torch.jit.save(module, io.BytesIO())
    return module(X + 1)


TRANSFORMS = {
    "grad": lambda net: torch.func.grad(loss_of(net))(X),
    "grad of grad": lambda net: torch.func.grad(lambda x: torch.func.grad(loss_of(net))(x).square().sum())(X),
    "vjp": lambda net: torch.func.vjp(net, X)[1](torch.ones(2, 4))[0],
    "jvp": lambda net: torch.func.jvp(net, (X,), (torch.ones_like(X),))[1],
    "jacrev": lambda net: torch.func.jacrev(lambda x: net(x).sum(0))(X),
    "vmap": lambda net: torch.func.vmap(lambda x: net(x[None])[0])(X),
    "hessian": hessian,
    "gradients per sample": per_sample,
    "forward mode": forward_mode,
    "jit.trace": traced,
}


@pytest.mark.quick(25)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_transforms_a_network_is_stock_and_says_so(transform, method):
    stock = every_kind()
    ours, run = applied(stock, METHODS[method]), TRANSFORMS[transform]
    expected = run(stock)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        got = run(ours)
    assert torch.equal(got, expected)
    parameterless = method in ("inverted", "few-bit") and transform in ("vmap", "jvp", "forward mode")
    if not parameterless:  # there is no gradient of what these methods replace
        assert any("actpress" in str(w.message) and "no memory is saved" in str(w.message) for w in seen)
    seen.clear()
    x = X.clone().requires_grad_()  # afterwards all is as before
    assert measure.saved_bytes(lambda: ours(x).sum()) < measure.saved_bytes(lambda: stock(x).sum())


@pytest.mark.parametrize("method", METHODS)
def test_functional_call_saves_and_has_the_gradients_of_the_module(method):
    ours = applied(every_kind(), METHODS[method])
    parameters = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()}
    twin = copy.deepcopy(ours)  # the same noise
    torch.func.functional_call(ours, (parameters, dict(ours.named_buffers())), (X,)).square().sum().backward()
    twin(X).square().sum().backward()
    for name, p in twin.named_parameters():
        assert torch.equal(parameters[name].grad, p.grad), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_fx_traces_our_layers_as_modules_that_still_save(method):
    ours = applied(every_kind(), METHODS[method])
    graph = torch.fx.symbolic_trace(ours)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == [name for name, _ in ours.named_children()]
    assert not any(node.op in ("call_function", "call_method") for node in graph.graph.nodes)
    assert torch.equal(graph(X), ours(X))
    assert measure.saved_bytes(lambda: graph(X).sum()) == measure.saved_bytes(lambda: ours(X).sum())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_export_holds_stock_operations(method):
    stock = every_kind()
    ours = applied(stock, METHODS[method])
    program = torch.export.export(ours, (X,))
    assert torch.equal(program.module()(X), stock(X))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith("aten.") for target in targets)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_script_is_refused_in_words_and_possible_after_restore(method):
    ours = applied(every_kind(), METHODS[method])
    with pytest.raises(RuntimeError, match=r"actpress: .* cannot be scripted; call actpress\.restore\(model\)"):
        torch.jit.script(ours)
    actpress.restore(ours)
    assert torch.equal(torch.jit.script(ours)(X), ours(X))
