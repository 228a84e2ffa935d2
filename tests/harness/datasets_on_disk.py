"""Small data sets in the layouts of the Hugging Face hub and of TensorFlow Datasets."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from etils import epath

from zip_rc_jax.data.problems import hub

COMMIT = "e53f048856ff4f594e959d75785d2c2d37b678ee"
Rows = list[dict[str, Any]]
NO_ROWS = [{"question": "", "answer": ""}]


def hub_directory(path: pathlib.Path, configs: dict[str, dict[str, Rows]], shards: int = 1) -> None:
    """A repository as on the hub: Parquet shards, and a README that names configurations and
    splits."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            (path / config).mkdir(parents=True, exist_ok=True)
            n = min(shards, len(rows)) or 1
            for shard in range(n):
                name = f"{split}-{shard:05}-of-{n:05}.parquet"
                part = rows[shard * len(rows) // n : (shard + 1) * len(rows) // n]
                table = pa.Table.from_pylist(part, pa.Table.from_pylist(rows or NO_ROWS).schema)
                pq.write_table(table, path / config / name)
    (path / "README.md").write_text("\n".join([*lines, "---", ""]))


def hub_cache(home: pathlib.Path, repository: str, directory: pathlib.Path) -> pathlib.Path:
    """What `hf download --repo-type dataset` leaves in `home/hub`. Returns the snapshot."""
    cache = home / "hub" / f"datasets--{repository.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    snapshot = cache / "snapshots" / COMMIT
    shutil.copytree(directory, snapshot)
    return snapshot


def datasets_cache(
    home: pathlib.Path, repository: str, config: str, directory: pathlib.Path, splits: Iterable[str]
) -> None:
    """What `datasets.load_dataset` leaves in `home/datasets` of a hub repository. The library
    itself prepares it from the copy in `directory`."""
    from datasets.data_files import DataFilesDict
    from datasets.load import configure_builder_class
    from datasets.packaged_modules.parquet.parquet import Parquet, ParquetConfig

    name = repository.split("/")[-1]
    patterns = {split: [f"{config}/{split}-*"] for split in splits}
    files = DataFilesDict.from_patterns(patterns, base_path=str(directory))
    kind = configure_builder_class(
        Parquet,
        builder_configs=[ParquetConfig(name=config, data_files=files)],
        default_config_name=None,
        dataset_name=name,
    )
    cache = str(home / "datasets")
    builder = kind(cache_dir=cache, config_name=config, dataset_name=name, hash=COMMIT)
    # Given to the builder, files outside the repository's own address would be refused.
    builder.repo_id = repository
    builder._cache_dir = builder._build_cache_dir()
    builder.download_and_prepare()


class _WordProblems(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Written by TFDS itself, and without TensorFlow."""

    VERSION = tfds.core.Version("1.2.0")
    code_path = epath.Path(__file__)
    name = "word_problems"

    def __init__(self, *, splits: dict[str, Rows], **kwargs: Any):
        self._splits = splits
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {"question": text, "answer": text, "level": np.int64, "extra": {"id": text}}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {name: self._generate_examples(name) for name in self._splits}

    def _generate_examples(self, name: str) -> Any:
        yield from enumerate(self._splits[name])

    def _log_download_bytes(self) -> None:
        """No banner."""

    _log_download_done = _log_download_bytes


def tfds_directory(path: pathlib.Path, splits: dict[str, Rows]) -> pathlib.Path:
    """A prepared data set `word_problems:1.2.0` below `path`. Returns its directory."""
    tfds.disable_progress_bar()
    builder = _WordProblems(splits=splits, data_dir=path, file_format="array_record")
    builder.download_and_prepare(
        download_dir=path / "downloads",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    return pathlib.Path(builder.data_dir)


def offline(patch, home):
    """The caches of this test alone, and no network."""
    import datasets

    for place in (datasets.config, huggingface_hub.constants, hub):
        if hasattr(place, "HF_HUB_OFFLINE"):
            patch.setattr(place, "HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
