"""House numbers in few bits, by DoReFa-Net's network and optimizer.

Source:    network, batch 128, Adam with learning rate 0.001 and epsilon 1e-5, halved after 100 of
           200 epochs, 40 pixels in [0, 1], and L2 of 1e-7 on the dense layer: the authors'
           implementation of arXiv 1606.06160 (tensorpack,
           examples/DoReFa-Net/svhn-digit-dorefa.py). Theirs has 4721 steps an epoch, of the
           training and the extra images together, and changes brightness and contrast; here an
           epoch is the 73 257 training images, as they are. The activation is a ReLU where
           theirs is min(|x|, 1).
Data:      73 257 training and 26 032 test images, downloaded by TensorFlow Datasets (1.5 GB).
Hardware:  one GPU.
Time:      not run.
Accuracy:  not run. Published for the extra images as well: errors of 3.1 to 3.2 % with (1,1,4),
           3.0 to 3.1 % with (1,2,4) (the same file).

    python -m recipes.train --config=svhn_dorefa --download
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="svhn_dorefa",
        model="svhn_cnn",
        lowering="stock",
        compare=("stock", "dorefa:1,2,4", "dorefa:1,1,4"),
        dataset="svhn_cropped",
        image_size=40,
        input_range="unit",
        augmentation="none",
        dropout=0.5,
        batch_size=128,
        epochs=200,
        optimizer="adam",
        learning_rate=0.001,
        schedule="step",
        decay_rate=0.5,
        decay_epochs=(100.0,),
        warmup_fraction=0.0,
        epsilon=1e-5,
    )
