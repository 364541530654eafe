"""Minimal effort back-propagation on handwritten digits, beside random elements of gradients.

Source:    network, optimizer, its rate and the epochs, the authors' implementation, for MNIST
           (lancopku/meProp, src/csharp/nnmnist/default.json). Batch and standardised pixels are
           ours: with pixels in [0, 1] few elements cost accuracy.
Data:      1437 training and 360 test images, 8x8.
Hardware:  2 CPU cores.
Time:      JAX, 12 of the 14 variants: 1.5 minutes with other work on the machine.
Accuracy:  on the test images in percent, JAX, means of seeds 0, 1 and 2: ordinary 97.59; k = 5
           94.63, 10 97.04, 20 96.76, 40 97.41, 80 97.31, 160 97.69; unified, k = 10 97.50, 40
           97.59, 160 97.50; random, k = 5 97.13, 10 97.13, 40 97.69, 160 97.41. One image is 0.28.

    python -m recipes.train --config=digits_meprop
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="digits_meprop",
        model="mlp",
        standardize=True,
        lowering="stock",
        compare=(
            "stock",
            *(f"meprop:k={k}" for k in (5, 10, 20, 40, 80, 160)),
            *(f"meprop:unified,k={k}" for k in (10, 40, 160)),
            *(f"random:k={k}" for k in (5, 10, 40, 160)),
        ),
        dataset="digits",
        image_size=8,
        input_range="unit",
        batch_size=32,
        epochs=20,
        optimizer="adam",
        learning_rate=1e-3,
        schedule="constant",
        warmup_fraction=0.0,
    )
