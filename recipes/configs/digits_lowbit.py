"""Few bits on handwritten digits: a network of four convolutions, DoReFa-Net's quantizers.

Source:    quantizers, their places and Adam's epsilon, arXiv 1606.06160 and its authors'
           implementation (tensorpack, examples/DoReFa-Net). The network, which is small enough for
           a CPU, and its schedule are ours.
Data:      1437 training and 360 test images, 8x8, in gray as three equal channels.
Hardware:  2 CPU cores.
Time:      JAX, all nine variants: 3 to 7 minutes with other work on the machine.
Accuracy:  on the test images in percent, JAX, means of seeds 0, 1 and 2: float 99.63,
           (8,8,8) 98.98, (4,4,8) 99.08, (2,2,6) 99.07, (1,2,32) 99.44, (1,2,6) 99.35,
           (1,2,4) 98.89, (1,1,32) 98.52, (1,1,4) 98.52. One image is 0.28.

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
