"""Training a model of one's own further, on a folder of images.

Loads FILE.keras, replaces its classifier where the folder has another number of
classes, measures which lowering is the fastest here, trains, and leaves
`model.keras` and a SavedModel in stock layers.

Source:    a low learning rate with a cosine, as is usual for fine-tuning.
Data:      JPEG, PNG, BMP, GIF or WebP files in DIR/CLASS/, or in DIR/train/CLASS/ and
           DIR/test/CLASS/. Image size and range of pixels are read from the model.
Hardware:  a GPU, or patience.
Time:      depends on the folder.
Accuracy:  depends on the folder.

    python -m recipes.train --config=finetune_folder --model=FILE.keras --dataset=folder:DIR

The classifier alone at first: --freeze=backbone --unfreeze_after=3.
"""

from recipes.config import Config


def get_config() -> Config:
    """The settings."""
    return Config(
        name="finetune_folder",
        model="model.keras",
        dataset="folder:images",
        augmentation="inception",
        lowering="tune",
        compare=("tune",),
        batch_size=32,
        epochs=10,
        learning_rate=0.01,
        warmup_fraction=0.1,
        weight_decay=0.0001,
    )
