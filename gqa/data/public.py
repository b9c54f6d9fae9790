"""Rows of TensorFlow Datasets, read through seqio: a source spelled `tfds:NAME/CONFIG:VERSION`.

They lie in `$TFDS_DATA_DIR` or `~/tensorflow_datasets`, and are downloaded there when they are not. TensorFlow is
imported when rows are read, and by nothing else.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from gqa.errors import InputError

PREFIX = "tfds:"


class PublicDataset:
    """Rows of a dataset as nested dictionaries of Python values, texts as `str`.

    `splits` maps ours (train, heldout, test) to the dataset's; a slice such as `train[:90%]` is one too.
    """

    def __init__(self, source: str, splits: Mapping[str, str]):
        self.source, self._splits = source, dict(splits)
        self.skipped: dict[str, Counter] = {split: Counter() for split in splits}

    @property
    def splits(self) -> list[str]:
        """The splits that there are."""
        return list(self._splits)

    def digest(self, split: str) -> str:
        """Name, version and split: TFDS checks the sums of what a version holds."""
        return f"{self.source}:{self._splits[split]}"

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """The rows of a split, in the order of the dataset's files.

        Raises `InputError` where TensorFlow is not installed and for a dataset that is neither there nor downloadable.
        """
        self.skipped[split] = Counter()
        try:
            # TensorFlow explains itself at length.
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            import seqio
        except ImportError as error:
            raise InputError(f"{self.source} needs TensorFlow ({error}): pip install 'gqa[data]'") from error
        name = self.source.removeprefix(PREFIX)
        try:
            source = seqio.TfdsDataSource(tfds_name=name, splits=self._splits)
            dataset = source.get_dataset(split, shuffle=False)
        except Exception as error:  # whatever the network, the file system and TFDS come up with
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"dataset {name} is not there and cannot be downloaded: {reason}") from error
        for row in dataset.as_numpy_iterator():
            yield _python(row)


def _python(value):
    """Nested dictionaries of bytes and arrays as texts, numbers and lists."""
    if isinstance(value, Mapping):
        return {name: _python(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "values") and hasattr(value, "nested_row_splits"):  # ragged: a sequence of sequences
        return [_python(item) for item in value.to_list()]
    if hasattr(value, "tolist"):
        return _python(value.tolist())
    if isinstance(value, list | tuple):
        return [_python(item) for item in value]
    return value
