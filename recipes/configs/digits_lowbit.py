"""Few bits on handwritten digits: a network of four convolutions, DoReFa-Net's quantizers.

Source:    quantizers, their places and Adam's epsilon, arXiv 1606.06160 and its authors'
           implementation (tensorpack, examples/DoReFa-Net). The network, which is small enough for
           a CPU, and its schedule are ours.
Data:      1437 training and 360 test images, 8x8, in gray as three equal channels.
Hardware:  2 CPU cores.
Time:      TIME
Accuracy:  ACCURACY

    python -m recipes.train --config=digits_lowbit
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="digits_lowbit",
        model="small_cnn",
        lowering="stock",
        compare=(
            "stock",
            "dorefa:8,8,8",
            "dorefa:4,4,8",
            "dorefa:2,2,6",
            "dorefa:1,2,32",
            "dorefa:1,2,6",
            "dorefa:1,2,4",
            "dorefa:1,1,32",
            "dorefa:1,1,4",
        ),
        dataset="digits",
        image_size=8,
        input_range="unit",
        batch_size=64,
        epochs=30,
        optimizer="adam",
        learning_rate=0.003,
        warmup_fraction=0.0,
        epsilon=1e-5,
    )
