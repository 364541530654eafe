"""What PyTorch's transforms and compilers make of a stock model, they make of ours."""

import io

import keras
import numpy as np
import pytest

from tests import cases

pytestmark = pytest.mark.backends("torch")
torch = pytest.importorskip("torch")

#: PyTorch differentiates the first itself; the others have gradients of their own.
LOWERINGS = {name: cases.LOWERINGS[name] for name in ("diagonal:4", "shifted", "per pass b")}


def model_of(lowering, data_format="channels_last"):
    """A small model with a layer of each kind; `lowering` None means stock layers."""
    from diagconv_tf import rewrite

    keras.utils.set_random_seed(0)
    layers, same = keras.layers, {"padding": "same", "data_format": data_format}
    first = data_format == "channels_first"
    model = keras.Sequential(
        [
            keras.Input((6, 7, 8) if first else (7, 8, 6)),
            layers.DepthwiseConv2D(3, strides=2, **same),
            layers.SeparableConv2D(6, 3, **same),
            layers.Conv2D(6, 3, groups=3, **same),
        ]
    )
    return model if lowering is None else rewrite(model, lowering, in_place=True)


def images(data_format="channels_last"):
    shape = (2, 6, 7, 8) if data_format == "channels_first" else (2, 7, 8, 6)
    return torch.tensor(np.random.default_rng(0).normal(size=shape), dtype=torch.float32)


def parameters(model):
    return {name: value.detach() for name, value in model.named_parameters()}


def loss(model):
    def of(values, x):
        return torch.func.functional_call(model, values, (x,)).square().mean()

    return of


def vjp(model, x):
    outputs, pullback = torch.func.vjp(lambda x: model(x), x)
    return outputs, pullback(torch.cos(outputs))


def grad(model, x):
    return torch.func.grad(loss(model), argnums=(0, 1))(parameters(model), x)


def jacrev(model, x):
    return torch.func.jacrev(lambda x: model(x).mean((1, 2)))(x)


def hessian_product(model, x):
    gradient = torch.func.grad(lambda x: model(x).pow(3).mean())
    return torch.func.vjp(gradient, x)[1](torch.cos(x))


def vmap(model, x):
    return torch.func.vmap(lambda image: model(image[None])[0])(x)


def gradients_of_each_image(model, x):
    of_one = torch.func.grad(lambda values, image: loss(model)(values, image[None]))
    return torch.func.vmap(of_one, (None, 0))(parameters(model), x)


def traced(model, x):
    """Saved, loaded, and called with another batch than it was traced with."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,)), file)
    file.seek(0)
    return torch.jit.load(file)(torch.cat([x, x]))


def exported(model, x):
    """Called with another batch than it was exported with."""
    shapes = (({0: torch.export.Dim("batch", min=1, max=64)},),)
    return torch.export.export(model, (x,), dynamic_shapes=shapes).module()(torch.cat([x, x]))


def compiled(model, x):
    """The first layer, by the compiler's front end and its differentiation."""
    torch._dynamo.reset()
    layer = model.layers[0]
    outputs = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    return outputs, torch.autograd.grad(outputs.square().mean(), list(layer.parameters()))


def autocast(model, x):
    """The backward pass runs outside, as PyTorch's documentation advises."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(x)
    return outputs, torch.autograd.grad(outputs.square().mean(), list(model.parameters()))


TRANSFORMS = {
    "vjp": (vjp, "channels_last", 1e-5),
    "grad": (grad, "channels_last", 1e-5),
    "jacrev": (jacrev, "channels_last", 1e-5),
    "hessian product": (hessian_product, "channels_last", 1e-5),
    # Keras's own channels-last layers fail inside `vmap`.
    "vmap": (vmap, "channels_first", 1e-5),
    "gradients of each image": (gradients_of_each_image, "channels_first", 1e-5),
    "jit.trace": (traced, "channels_last", 1e-5),
    "autocast": (autocast, "channels_last", 4 * 2.0**-8),
}


def leaves(value):
    return [t.detach() for t in torch.utils._pytree.tree_leaves(value)]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("lowering", LOWERINGS.values(), ids=LOWERINGS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_what_they_give_for_stock(name, lowering):
    transform, data_format, tolerance = TRANSFORMS[name]
    assert_same(transform, lowering, data_format, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["shifted", LOWERINGS["per pass b"]], ids=str)
@pytest.mark.parametrize("transform", [compiled, exported])
def test_whole_graphs_without_a_break(transform, lowering):
    assert_same(transform, lowering, "channels_last", 1e-5)


def assert_same(transform, lowering, data_format, tolerance):
    x = images(data_format)
    wanted = leaves(transform(model_of(None, data_format), x))
    values = leaves(transform(model_of(lowering, data_format), x))
    for value, want in zip(values, wanted, strict=True):
        assert (value.dtype, value.shape) == (want.dtype, want.shape)
        value, want = value.double(), want.double()
        assert torch.linalg.norm(value - want) <= tolerance * torch.linalg.norm(want)
