"""What is compiled: one pass of a convolution, or a whole training step of a model."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import keras
from keras import ops

from diagconv_tf import ConvSpec, inspect_model
from diagconv_tf.lowerings import LoweringChoice, convolve
from diagconv_tf.spec import STOCK
from gpu_prediction.bounds import Program
from gpu_prediction.compiler import Compiler

#: Classes of the classifier: ImageNet's.
_CLASSES = 1000


def compile_pass(
    compiler: Compiler,
    spec: ConvSpec,
    choice: LoweringChoice | None,
    pass_name: str,
    flops_per_second: float,
) -> Program:
    """One pass of a convolution alone, as a layer with `choice` runs it.

    Args:
        compiler: for the card.
        spec: the workload, all sizes known.
        choice: the lowering; None for what a stock layer runs.
        pass_name: one of `PASSES`.
        flops_per_second: as `Compiler.compile`.
    """

    def forward(inputs: Any, kernel: Any) -> Any:
        if choice is None:
            return _stock(spec, inputs, kernel)
        return convolve(spec, choice, inputs, kernel)

    def input_gradient(inputs: Any, kernel: Any, output_gradient: Any) -> Any:
        return jax.vjp(lambda x: forward(x, kernel), inputs)[1](output_gradient)[0]

    def kernel_gradient(inputs: Any, kernel: Any, output_gradient: Any) -> Any:
        return jax.vjp(lambda k: forward(inputs, k), kernel)[1](output_gradient)[0]

    shapes = [spec.input_shape, spec.kernel_shape, spec.output_shape]
    inputs, kernel, outputs = (compiler.argument(s, spec.compute_dtype) for s in shapes)
    # Arguments that a pass does not need, and what is computed for them, fall away.
    function, arguments = {
        "forward": (forward, (inputs, kernel)),
        "input_gradient": (input_gradient, (inputs, kernel, outputs)),
        "kernel_gradient": (kernel_gradient, (inputs, kernel, outputs)),
    }[pass_name]
    return compiler.compile(function, *arguments, flops_per_second=flops_per_second)


def _stock(spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
    """What Keras's own layer computes, by Keras's own op."""
    window = (spec.strides, spec.padding, spec.data_format, spec.dilation_rate)
    if not spec.is_depthwise:
        return ops.conv(inputs, kernel, *window)
    shape = (*spec.kernel_size, spec.groups, spec.output_channels_per_group)
    return ops.depthwise_conv(inputs, ops.reshape(kernel, shape), *window)


@dataclasses.dataclass(frozen=True)
class Step:
    """A model whose training step can be compiled; its variables have no values.

    Attributes:
        model: compiled with SGD with momentum and cross-entropy, as
            `benchmark_training.py` trains.
        layers: convolutions with groups.
        choices: lowerings → how many of them run so.
    """

    model: keras.Model
    choices: dict[str, int]

    @property
    def layers(self) -> int:
        return sum(self.choices.values())

    @property
    def rewritten(self) -> int:
        """Those that are not Keras's own."""
        return self.layers - self.choices.get(STOCK, 0)


def make_step(
    name: str, size: int, policy: str, set_lowering: Callable[[keras.Model], Any] | None
) -> Step:
    """A keras.applications model, ready to be compiled.

    Args:
        name: of the model.
        size: height and width of the images.
        policy: Keras's dtype policy.
        set_lowering: changes the model in place; None leaves it stock.

    Raises:
        ValueError: if there are no convolutions with groups, or `set_lowering`
            changes none.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    optimizer = keras.optimizers.SGD(1e-3, momentum=0.9)
    try:
        # To give values to the weights would take longer than all else.
        with keras.StatelessScope(initialize_variables=False):
            model = getattr(keras.applications, name)(
                weights=None, input_shape=(size, size, 3), classes=_CLASSES
            )
            if set_lowering is not None:
                set_lowering(model)
            rows = inspect_model(model).rows
            model.compile(optimizer, "sparse_categorical_crossentropy")
            optimizer.build(model.trainable_variables)
    finally:
        keras.config.set_dtype_policy(before)
        # Else the next scope that ends, inside the training step, makes up for it.
        keras.backend.clear_session()
    choices = collections.Counter(
        "/".join(row.lowering.values()) if isinstance(row.lowering, dict) else row.lowering
        for row in rows
    )
    step = Step(model, dict(choices))
    if not rows or (set_lowering is not None and not step.rewritten):
        raise ValueError(
            f"Expected convolutions with groups that can be rewritten so. Received: {name} "
            f"with {step.layers}, of which none can"
        )
    return step


def compile_step(
    compiler: Compiler, step: Step, batch_size: int, flops_per_second: float
) -> Program:
    """A whole training step, as Keras's trainer compiles it on JAX.

    Args:
        compiler: for the card.
        step: the model.
        batch_size: images.
        flops_per_second: as `Compiler.compile`.
    """
    model = step.model

    def abstract(variables: Any) -> list[Any]:
        return [
            compiler.argument(v.shape, keras.backend.standardize_dtype(v.dtype)) for v in variables
        ]

    state = (
        abstract(model.trainable_variables),
        abstract(model.non_trainable_variables),
        abstract(model.optimizer.variables),
        abstract(model.metrics_variables),
    )
    images = compiler.argument((batch_size, *model.input_shape[1:]), "float32")
    labels = compiler.argument((batch_size,), "int32")
    return compiler.compile(
        model.train_step,
        state,
        (images, labels),
        flops_per_second=flops_per_second,
        donate_argnums=(0,),  # As `keras.src.backend.jax.trainer` does.
    )
