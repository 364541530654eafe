"""The named convolutions that tests share, and how to draw more of them."""

import dataclasses

from hypothesis import strategies as st

from diagconv_tf import ConvSpec

_BASE = ConvSpec(batch=2, height=9, width=8, groups=6)

#: One case for each thing that can go wrong on its own.
NAMED = {
    "plain": _BASE,
    "same": _BASE.replace(padding="same"),
    "stride 2": _BASE.replace(strides=(2, 2)),
    "stride 2 same odd": _BASE.replace(strides=(2, 2), padding="same"),
    "stride 2 same even": _BASE.replace(height=8, strides=(2, 2), padding="same"),
    "stride above kernel": _BASE.replace(kernel_size=(2, 2), strides=(3, 3), padding="same"),
    "unequal strides": _BASE.replace(strides=(1, 2), padding="same"),
    "unequal strides valid": _BASE.replace(strides=(3, 2)),
    "strides 2 and 4": _BASE.replace(strides=(2, 4), padding="same"),
    "dilation": _BASE.replace(dilation_rate=(2, 2), padding="same"),
    "unequal dilation": _BASE.replace(dilation_rate=(2, 3)),
    "strides with dilation": _BASE.replace(strides=(2, 2), dilation_rate=(2, 2), padding="same"),
    "unequal strides with dilation": _BASE.replace(strides=(1, 2), dilation_rate=(2, 1)),
    "kernel 1x1": _BASE.replace(kernel_size=(1, 1)),
    "kernel 1x1 stride 2": _BASE.replace(kernel_size=(1, 1), strides=(2, 2), padding="same"),
    # PyTorch 2.13 alone takes this one for channels-last, and errs.
    "one channel 1x1 stride 2": _BASE.replace(
        height=8, groups=1, kernel_size=(1, 1), strides=(2, 2)
    ),
    "even kernel": _BASE.replace(kernel_size=(4, 2), padding="same"),
    "kernel 7x7": _BASE.replace(kernel_size=(7, 7), padding="same"),
    "kernel above input": _BASE.replace(kernel_size=(11, 13), padding="same"),
    "row kernel": _BASE.replace(kernel_size=(1, 5), padding="same"),
    "multiplier": _BASE.replace(output_channels_per_group=3, padding="same"),
    "multiplier stride 2": _BASE.replace(output_channels_per_group=2, strides=(2, 2)),
    "40 channels": _BASE.replace(groups=40, height=4, width=5, padding="same"),
    "one channel": _BASE.replace(groups=1),
    "one channel multiplier": _BASE.replace(groups=1, output_channels_per_group=4),
    "groups of 2": _BASE.replace(groups=3, input_channels_per_group=2, padding="same"),
    "groups of 3 to 2": _BASE.replace(
        groups=2, input_channels_per_group=3, output_channels_per_group=2, strides=(2, 2)
    ),
    "groups of 2 to 3 dilated": _BASE.replace(
        groups=3, input_channels_per_group=2, output_channels_per_group=3, dilation_rate=(2, 2)
    ),
    "one group": _BASE.replace(groups=1, input_channels_per_group=5, output_channels_per_group=4),
    "channels first": _BASE.replace(data_format="channels_first", padding="same"),
    "channels first stride 2": _BASE.replace(
        data_format="channels_first", strides=(2, 2), padding="same"
    ),
    "channels first groups": _BASE.replace(
        data_format="channels_first", groups=3, input_channels_per_group=2
    ),
    "batch of 1": _BASE.replace(batch=1),
    "one image to one output": _BASE.replace(batch=1, groups=1, input_channels_per_group=2),
    "one pixel": _BASE.replace(height=1, width=1, padding="same"),
    "one pixel out": _BASE.replace(height=3, width=3),
}

#: Every form that `lowering` takes. Blocks of 4 leave a smaller last one in 6
#: channels; blocks of 3 do not fit groups of 2.
LOWERINGS = {
    "native": "native",
    "diagonal:4": "diagonal:4",
    "diagonal": "diagonal",
    "dense": "dense",
    "diagonal_grouped:3": "diagonal_grouped:3",
    "shifted": "shifted",
    "per pass a": {
        "forward": "shifted",
        "input_gradient": "diagonal:4",
        "kernel_gradient": "native",
    },
    "per pass b": {
        "forward": "diagonal:4",
        "input_gradient": "native",
        "kernel_gradient": "shifted",
    },
    "per pass c": {
        "forward": "dense",
        "input_gradient": "shifted",
        "kernel_gradient": "diagonal_grouped:3",
    },
}


@st.composite
def specs(draw, max_channels=70, max_size=13, max_kernel=9):
    """Any convolution that Keras's layers accept, small enough to compare."""
    kernel_size = draw(st.tuples(*[st.integers(1, max_kernel)] * 2))
    strides = draw(st.one_of(st.just((1, 1)), st.just((2, 2)), st.tuples(*[st.integers(1, 4)] * 2)))
    dilation_rate = draw(
        st.one_of(st.just((1, 1)), st.just((1, 1)), st.tuples(*[st.integers(1, 3)] * 2))
    )
    padding = draw(st.sampled_from(["same", "valid"]))
    least = [
        (k - 1) * d + 1 if padding == "valid" else 1
        for k, d in zip(kernel_size, dilation_rate, strict=True)
    ]
    height, width = (draw(st.integers(low, low + max_size - 1)) for low in least)
    per_group = draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    return ConvSpec(
        batch=draw(st.integers(1, 3)),
        height=height,
        width=width,
        groups=draw(st.integers(1, max(1, max_channels // per_group))),
        input_channels_per_group=per_group,
        output_channels_per_group=draw(st.sampled_from([1, 1, 1, 2, 3])),
        kernel_size=kernel_size,
        strides=strides,
        dilation_rate=dilation_rate,
        padding=padding,
        data_format=draw(st.sampled_from(["channels_last", "channels_last", "channels_first"])),
    )


@st.composite
def lowerings(draw):
    """A string or a dict for `lowering`."""
    name = st.one_of(
        st.sampled_from(["native", "diagonal", "dense", "shifted"]),
        st.integers(1, 70).map("diagonal:{}".format),
        st.sampled_from([1, 2, 3, 4, 6, 8, 32]).map("diagonal_grouped:{}".format),
    )
    passes = ("forward", "input_gradient", "kernel_gradient")
    return draw(st.one_of(name, st.fixed_dictionaries({p: name for p in passes})))


def as_dict(spec):
    """The arguments of `ConvSpec`, for messages."""
    return dataclasses.asdict(spec)
