"""MobileNetV1 of full width on a tenth of ImageNet, all 1000 classes.

Source:    subset, that of Chen et al., arXiv 2002.05709 (SimCLR); crops and flips,
           arXiv 1409.4842, section 6; SGD with a cosine.
Data:      128 116 training and 50 000 test images. TensorFlow Datasets makes them
           of the archives that one gets from image-net.org with a licence: put
           ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into
           DIR/downloads/manual.
Hardware:  one GPU.
Time:      not run.
Accuracy:  not run; none is published for this network.

    python -m recipes.train --config=imagenet_subset_mobilenet_v1 --data_dir=DIR --download
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="imagenet_subset_mobilenet_v1",
        model="mobilenet_v1",
        stem="imagenet",
        dataset="imagenet2012_subset/10pct",
        image_size=224,
        augmentation="inception",
        dropout=0.2,
        batch_norm_momentum=0.99,
        batch_size=256,
        epochs=200,
        learning_rate=0.2,
        warmup_fraction=0.025,
        weight_decay=0.0004,
        label_smoothing=0.1,
    )
