"""MobileNetV1 of full width on ImageNet, 224 pixels.

Source:    network, no label smoothing, and no weight decay of depthwise kernels
           ("very little or no"), Howard et al., arXiv 1704.04861, section 3.2.
           It has RMSprop without numbers for it; ours is SGD with a cosine,
           learning rate 0.1 for every 256 images, and weight decay, which are
           usual and have numbers. Crops and flips, arXiv 1409.4842, section 6;
           theirs limit how small a crop may be, and do not say to what.
Data:      1 281 167 training and 50 000 test images. TensorFlow Datasets makes
           them of the archives that one gets from image-net.org with a licence:
           put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into
           DIR/downloads/manual.
Hardware:  one GPU of 40 GB or more.
Time:      not run.
Accuracy:  not run. Published: 70.6 % (arXiv 1704.04861, table 4), 70.4 %
           (keras.applications).

    python -m recipes.train --config=imagenet_mobilenet_v1 --data_dir=DIR --download
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="imagenet_mobilenet_v1",
        model="mobilenet_v1",
        stem="imagenet",
        dataset="imagenet2012",
        image_size=224,
        augmentation="inception",
        dropout=0.001,
        batch_norm_momentum=0.99,
        batch_size=512,
        epochs=150,
        learning_rate=0.2,
        warmup_fraction=0.033,
        weight_decay=0.0004,
        decay_depthwise=False,
        dtype_policy="mixed_bfloat16",
    )
