"""Weights of -1 and 1 on handwritten digits: the methods of Training Quantized Nets, compared.

Source:    methods, Adam, learning rate 0.01, divided by 10 twice, and which weights are binary,
           arXiv 1706.02379, sections 3 and 6. The network, of a quarter of `digits_lowbit`'s
           width so that it is hard to train with binary weights, and the numbers of epochs are
           ours. `bigsr` averages the gradients of 8 batches for an update, and has 8 times the
           epochs, so that all methods make the same number of updates.
Data:      as `digits_lowbit`.
Hardware:  2 CPU cores.
Time:      JAX, all five variants: 1.5 minutes; 9 with much other work on the machine.
Accuracy:  on the test images in percent, JAX, means of seeds 0, 1 and 2: float 99.35,
           BC 98.61, Big SR 95.46, SR 95.28, R 82.96. One image is 0.28.

    python -m recipes.train --config=digits_binary
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="digits_binary",
        model="small_cnn",
        width_multiplier=0.25,
        lowering="stock",
        compare=("stock", "bc", "bigsr", "sr", "r"),
        dataset="digits",
        image_size=8,
        input_range="unit",
        batch_size=64,
        epochs=40,
        optimizer="adam",
        learning_rate=0.01,
        schedule="step",
        decay_rate=0.1,
        decay_epochs=(20.0, 30.0),
        warmup_fraction=0.0,
    )
