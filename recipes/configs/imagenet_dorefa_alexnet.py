"""AlexNet on ImageNet in few bits, by DoReFa-Net's network and optimizer.

Source:    network, 224 pixels in [0, 1], batch 256, Adam with learning rate 2e-4 and epsilon
           1e-5, times 0.2 after epochs 60 and 75 of 90, and L2 of 5e-6 on the dense layers: the
           authors' implementation of arXiv 1606.06160 (tensorpack,
           examples/DoReFa-Net/alexnet-dorefa.py).
Data:      as `imagenet_mobilenet_v1`.
Hardware:  one GPU of 16 GB or more.
Time:      not run.
Accuracy:  not run. Published top-1 errors (the same file): float 40.3 %, (8,8,8) 42.0,
           (1,32,32) 44.3, (1,2,6) 46.8, (1,1,32) 51.5, (1,2,4) 54.0.

    python -m recipes.train --config=imagenet_dorefa_alexnet --data_dir=DIR --download
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="imagenet_dorefa_alexnet",
        model="alexnet",
        lowering="stock",
        compare=("stock", "dorefa:8,8,8", "dorefa:1,2,6"),
        dataset="imagenet2012",
        image_size=224,
        input_range="unit",
        augmentation="inception",
        batch_size=256,
        epochs=90,
        optimizer="adam",
        learning_rate=2e-4,
        schedule="step",
        decay_rate=0.2,
        decay_epochs=(60.0, 75.0),
        warmup_fraction=0.0,
        epsilon=1e-5,
    )
