"""Minimal effort back-propagation and the ordinary one: MLP-500 on MNIST.

Source:    the authors' implementation (lancopku/meProp, src/csharp/nnmnist/default.json): two
           hidden layers of 500 units, Adam, rate 0.001, batches of 100, 20 epochs, k = 160;
           k = 80 is that of arXiv 1711.06528. Otherwise than there: gradients are not clipped; all
           60 000 training images are trained on, where the authors set the first 5 000 of them
           aside and test where the accuracy on these is the best; here the last epoch is tested.
           The authors test, and meSimp prunes, eight times an epoch; here the test is once.
Data:      MNIST by TensorFlow Datasets, 28x28; pixels in [0, 1] as in the authors' PyTorch code.
Hardware:  2 CPU cores.
Time:      not run.
Accuracy:  published, on the test images in percent: ordinary 98.20, k = 80 98.27; with meSimp at
           k = 160 (`--compare=meprop:k=160 --simplify=0.1`) 98.31 with 154 units. Not run.

    python -m recipes.train --config=mnist_meprop --download
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="mnist_meprop",
        model="mlp",
        lowering="stock",
        compare=("stock", "meprop:k=80", "meprop:k=160", "random:k=80"),
        dataset="mnist",
        image_size=28,
        input_range="unit",
        batch_size=100,
        epochs=20,
        optimizer="adam",
        learning_rate=1e-3,
        schedule="constant",
        warmup_fraction=0.0,
        epsilon=1e-8,
    )
