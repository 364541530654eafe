"""Sets of TensorFlow Datasets without their records."""

import contextlib
import pathlib


@contextlib.contextmanager
def mocked_set(name, data_dir, count=12):
    """Inside, `tfds.load` finds `name` in `data_dir`, with `count` random examples a split.

    What `tfds build` leaves is there, but for the records.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    template = tfds.core.ShardedFileTemplate(
        dataset_name=builder.name, data_dir=builder.data_path, filetype_suffix="tfrecord"
    )
    test_split = "test" if name in ("cifar10", "cifar100", "mnist") else "validation"
    splits = [
        tfds.core.SplitInfo(split, shard_lengths=[count], num_bytes=1, filename_template=template)
        for split in ("train", test_split)
    ]
    builder.info.set_splits(tfds.core.splits.SplitDict(splits))
    pathlib.Path(builder.data_dir).mkdir(parents=True)
    builder.info.write_to_directory(builder.data_dir)
    policy = tfds.testing.MockPolicy.USE_FILES
    with tfds.testing.mock_data(num_examples=count, policy=policy, data_dir=str(data_dir)):
        yield
