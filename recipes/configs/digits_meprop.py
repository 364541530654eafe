"""Minimal effort back-propagation on handwritten digits, beside random elements of gradients.

Source:    network, optimizer, its rate and the epochs, the authors' implementation, for MNIST
           (lancopku/meProp, src/csharp/nnmnist/default.json). Batch and standardised pixels are
           ours: with pixels in [0, 1] few elements cost accuracy.
Data:      1437 training and 360 test images, 8x8.
Hardware:  2 CPU cores.
Time:      TODO
Accuracy:  TODO

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
