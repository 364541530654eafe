"""What each backend contributes: its own convolution, three passes of it.

A backend is a module with the functions that `Backend` lists. Everything above
this folder is written with `keras.ops` and these functions alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras
import numpy as np

from diagconv_tf.spec import ConvSpec


class Passes(Protocol):
    """The three passes of one convolution, as one lowering or several compute them.

    With inputs x, kernel k and output gradient g, the number
    `sum(g * forward(x, k))` is linear in each of x, k and g, and the three
    passes are its derivatives by g, x and k. So each pass's derivatives are
    the other passes again, of any order.

    Passes are values: equal and hashable by what they compute.
    """

    def forward(self, inputs: Any, kernel: Any) -> Any: ...

    def input_gradient(self, output_gradient: Any, kernel: Any, input_shape: tuple) -> Any: ...

    def kernel_gradient(self, inputs: Any, output_gradient: Any) -> Any: ...


class ProcessStore(Protocol):
    """Texts by key, which all processes of one training see."""

    def put(self, key: str, text: str) -> None:
        """Adds a text; a key is used once."""

    def get(self, key: str, seconds: float) -> str | None:
        """The text, waiting up to so many seconds for it; None where it is not there yet."""


class Backend(Protocol):
    """The functions of a backend module.

    `forward`, `input_gradient` and `kernel_gradient` compute every `ConvSpec`
    in the `preferred_data_format`, with the backend's own ops where it has
    them; where an op has a gap (TensorFlow's, mostly), the module goes around.
    """

    def default_device(self) -> tuple[str, str]:
        """`(kind, name)` of the device that Keras computes on."""

    def numeric_mode(self) -> tuple[tuple[str, str], ...]:
        """`((setting, value), …)` of what this process has switched that decides
        how exactly, and how fast, that device computes float32; empty on CPUs.
        """

    def preferred_data_format(self, data_format: str) -> str:
        """The layout in which this backend's convolutions run here."""

    def forward(self, spec: ConvSpec, inputs: Any, kernel: Any) -> Any: ...

    def input_gradient(
        self, spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple
    ) -> Any: ...

    def kernel_gradient(self, spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any: ...

    def with_images(
        self,
        function: Callable[..., Any],
        empty_shape: Callable[[], tuple],
        inputs: Any,
        *others: Any,
    ) -> Any:
        """`function(inputs, *others)`; zeros of `empty_shape` where a batch without
        images would fail.

        Args:
            function: of `inputs` and `others`, returns a tensor of their dtype.
            empty_shape: returns the result's shape for a batch of 0.
            inputs: tensor, whose first axis is the batch.
            *others: more arguments.
        """

    def differentiable(self, passes: Passes, inputs: Any, kernel: Any) -> Any:
        """`passes.forward(inputs, kernel)`, with the other two passes as its derivatives."""

    def stock_operands(self, inputs: Any, kernel: Any, stock_op: str) -> tuple[Any, Any]:
        """`inputs` and `kernel` as Keras's own op hands them to the framework.

        Args:
            inputs: tensor.
            kernel: tensor.
            stock_op: the name of the op in `keras.ops`, `"conv"` or
                `"depthwise_conv"`.

        Returns:
            Both, of the dtypes in which the op computes. Where these differ, it
            refuses.
        """

    def split(self, tensor: Any, sizes: list[int], axis: int) -> list[Any]:
        """Parts of `tensor`, of `sizes` along `axis`."""

    def pad(self, tensor: Any, widths: list) -> Any:
        """Zeros around `tensor`, `(before, after)` for each axis; ints or scalar tensors.

        Not `keras.ops.pad`: it names an object in every call, which PyTorch's
        compiler refuses inside a custom gradient.
        """

    def interior_pad(self, values: Any, axes: tuple, strides: Sequence, offsets: tuple) -> Any:
        """Zeros, `stride` times as many along each of two axes, but for element
        i of `values` at `i * stride + offset`.
        """

    def compiled_for(self, tensor: Any) -> str | None:
        """The kind of device, as `default_device` has it, for which XLA compiles a program.

        Args:
            tensor: any tensor of the program, which is being traced.

        Returns:
            None where XLA does not compile it.
        """

    # What follows is for programs that XLA compiles.

    def gather(self, tensor: Any, indices: np.ndarray, axis: int) -> Any:
        """Elements of `tensor` along `axis`, at indices that are all inside.

        Not `keras.ops.take`, which checks them.
        """

    def sums_in_one_loop(self, tensors: list[Any], axes: tuple[int, ...]) -> list[Any]:
        """The sum of each of `tensors`, of one shape and dtype, over `axes`, in one loop."""

    def keep_apart(self, tensors: list[Any]) -> list[Any]:
        """`tensors`, which XLA computes before all that follows, and as they are."""

    def make_complex(self, real: Any, imaginary: Any) -> Any:
        """Complex numbers of two tensors of float32 or float64."""

    # What follows is for `keras.distribution`, which only JAX has.

    def is_partitioned(self, tensor: Any) -> bool:
        """Whether `tensor` belongs to a program that will be sharded over devices."""

    def per_shard(
        self,
        function: Callable[[Any, Any], Any],
        inputs: Any,
        kernel: Any,
        input_axes: Sequence[str | None],
        kernel_axes: Sequence[str | None],
    ) -> Any:
        """Runs `function(inputs, kernel)` on each device's shards of both."""

    def replicated(self, tensor: Any, axis: int) -> Any:
        """`tensor`; it and its gradient are replicated along `axis`."""

    def process_store(self) -> ProcessStore:
        """Where the processes of one training can leave texts for each other."""


_NAME = keras.backend.backend()

# At once, and not by the first layer that is called: compilers trace a layer's call,
# and cannot trace an import. Keras has imported the framework already.
_BACKEND = (
    importlib.import_module(f"diagconv_tf.backends.{_NAME}")
    if _NAME in ("tensorflow", "jax", "torch")
    else None
)


def current() -> Backend:
    """The module for Keras's backend.

    Raises:
        RuntimeError: if Keras runs on a backend without one.
    """
    if _BACKEND is None:
        raise RuntimeError(
            "Expected the Keras backend to be 'tensorflow', 'jax' or 'torch'. "
            f"Received: keras.backend.backend()={_NAME!r}"
        )
    return _BACKEND
