"""The TFDS builder of rollout records.

Only this module needs TFDS to be imported; see `rollouts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from zip_rc_jax.data.rollouts import FLOATS, INTEGERS, TEXTS, TOKENS, Rollout

FORMAT_VERSION = "1.0.0"


class _SameBytes(tfds.core.ExampleWriter):
    """Equal rollouts become equal bytes: protocol buffers write the fields of an example in another
    order in every process."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        return super().write(path, ((key, _canonical(example)) for key, example in examples))


def _canonical(example: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


class ZipRollouts(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of rollout records; `write_rollouts` drives it.

    One split, "train", in the order given.
    """

    # TFDS writes it into the dataset, whose bytes do not follow this file's name
    __module__ = Rollout.__module__
    VERSION = tfds.core.Version(FORMAT_VERSION)
    # Where TFDS looks for checksum files. Its own property needs importlib_resources, which it no
    # longer installs.
    code_path = epath.Path(__file__)

    def __init__(self, *, rollouts: Iterable[Rollout] = (), **kwargs: Any):
        self._rollouts = rollouts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="On-policy rollouts with labels for ZIP-RC training.",
            features=tfds.features.FeaturesDict(
                dict.fromkeys(INTEGERS, np.int64)
                | {name: tfds.features.Text() for name in TEXTS}
                | {name: tfds.features.Tensor(shape=(None,), dtype=np.int32) for name in TOKENS}
                | dict.fromkeys(FLOATS, np.float32)
                | {"finished": np.bool_}
            ),
            disable_shuffling=True,
        )

    def _log_download_bytes(self) -> None:
        """Silences TFDS's banner: nothing is downloaded."""

    _log_download_done = _log_download_bytes

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _SameBytes(file_format=self.info.file_format)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, rollout in enumerate(self._rollouts):
            # "surrogatepass": JSON input may hold half a surrogate pair, which plain UTF-8 refuses.
            texts = {
                name: getattr(rollout, name).encode("utf-8", "surrogatepass") for name in TEXTS
            }
            yield key, vars(rollout) | texts
