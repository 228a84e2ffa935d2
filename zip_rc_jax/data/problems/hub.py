"""Problems of data sets on the Hugging Face hub, and of local directories in its layout.

The `datasets` library reads both. Without a network, what `hf download` left in the hub's cache is
read as a local directory, else what the library prepared itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from zip_rc_jax.config import SourceConfig
from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.data.problems.columns import Row
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.[^/]+)")
HUB_SECONDS = 20.0  # for the answer which revision is the newest


def is_local(source: SourceConfig) -> bool:
    """Whether the source is a directory of this machine."""
    return source.name.startswith((".", "/", "~"))


def hub_rows(source: SourceConfig) -> tuple[list[Row], dict[str, Any]]:
    """All rows of a split, and where they come from (`revision`, `split`).

    Raises:
      UsageError: no such directory or data set; an unknown or unnamed configuration or split, or an
        empty one; or neither a network nor a local copy.
    """
    with optional_import():
        import datasets
    with _quiet(datasets):
        if is_local(source):
            path, config = _directory(source)
            builder, revision = _builder(source, path, config), ""
        else:
            repository, config = _repository(source)
            builder, revision = _of_hub(source, repository, config)
        split = _split(source, builder)
        try:
            builder.download_and_prepare()
            table = builder.as_dataset(split=split).with_format("arrow")[:]
        except Exception as error:  # the library raises what its readers and its network raise
            if _tells_of_no_rows(error):
                raise _empty(source, split) from None
            raise _refused(source, error) from error
        rows = table.to_pylist()
    if not rows:
        raise _empty(source, split)
    found = [Row(row, f"{source.name} {split}, row {i}", i) for i, row in enumerate(rows)]
    return found, {"split": split} | ({"revision": revision} if revision else {})


def _empty(source: SourceConfig, split: str) -> UsageError:
    return UsageError(
        f"split {split!r} of {shown(source.source)}", "it has no rows", "name another split"
    )


def _tells_of_no_rows(error: BaseException | None) -> bool:
    """Whether the library, or what it reads with, failed on a split without rows."""
    said = ("corresponds to no data", "BatchSize must be greater than 0")
    while error is not None:
        if any(text in str(error) for text in said):
            return True
        error = error.__cause__
    return False


def _directory(source: SourceConfig) -> tuple[str, str | None]:
    """Directory and configuration of "./directory/configuration"."""
    path = pathlib.Path(source.name).expanduser()
    if path.is_dir():
        return str(path), None
    if path.parent.is_dir() and path.parent != path and _looks_like_data(path.parent):
        return str(path.parent), path.name
    reason = "it is a file" if path.is_file() else "there is no such directory"
    raise UsageError(
        f"problems of {shown(source.source)}",
        reason,
        "give a directory in the hub's layout (README.md, Parquet shards), or hf:ORG/NAME",
    )


def _looks_like_data(path: pathlib.Path) -> bool:
    readme = path / "README.md"
    named = readme.is_file() and "config_name:" in readme.read_text("utf-8", "replace")
    return named or any(path.glob("*.parquet"))


def _repository(source: SourceConfig) -> tuple[str, str | None]:
    """ "ORG/NAME" and configuration of "ORG/NAME/CONFIGURATION"."""
    parts = source.name.split("/")
    if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"[\w.-]+", part) for part in parts):
        raise UsageError(
            f"problems of {shown(source.source)}",
            "it is no name of a data set",
            "write hf:ORG/NAME, hf:ORG/NAME/CONFIG or hf:./DIRECTORY",
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _of_hub(source: SourceConfig, repository: str, config: str | None) -> tuple[Any, str]:
    """A builder of a data set of the hub, and its commit."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    revision = source.revision or None
    # Online: the newest commit, which the record then names.
    commit, online_error = "", None
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        try:
            info = huggingface_hub.HfApi().dataset_info(
                repository, revision=revision, timeout=HUB_SECONDS
            )
            commit = info.sha or ""
        except RevisionNotFoundError:
            raise UsageError(
                f"revision={shown(source.revision)} of {shown(source.source)}",
                "the hub has no such branch, tag or commit",
                "correct it, or leave it out for the newest",
            ) from None
        except HfHubHTTPError as error:
            raise UsageError(
                f"problems of {shown(source.source)}",
                f"the hub does not give it ({in_short(error)})",
                "correct the name; log in with `hf auth login` where the data set is gated",
            ) from None
        except Exception as error:  # what the HTTP library raises without a network
            online_error = error
    if commit:
        return _builder(source, repository, config, revision=commit), commit

    # Offline: the hub's cache, then the library's own.
    if local := _snapshot(repository, revision):
        return _builder(source, str(local), config), local.name
    try:
        import datasets

        with _offline(datasets):
            builder = datasets.load_dataset_builder(repository, config)
    except Exception as error:
        raise _not_there(source, repository, online_error or error) from None
    commit = str(builder.hash)  # the library names what it prepares by the commit
    if revision not in (None, "main") and not commit.startswith(str(revision)):
        raise UsageError(
            f"revision={shown(source.revision)} of {shown(source.source)}",
            f"without a network nothing tells which commit that is, and the cache of datasets has "
            f"{commit[:40]}",
            "name that commit, or leave the revision out",
        )
    return builder, commit


def _snapshot(repository: str, revision: str | None) -> pathlib.Path | None:
    """What `hf download` left in the hub's cache, if all its shards are there."""
    import huggingface_hub

    try:
        path = pathlib.Path(
            huggingface_hub.snapshot_download(
                repository, repo_type="dataset", revision=revision, local_files_only=True
            )
        )
    except Exception:  # it is not there, in one of several ways
        return None
    shards = [match for file in path.rglob("*") if (match := _SHARD.fullmatch(str(file)))]
    there = {(match[1], match[3], match[4]): set[str]() for match in shards}
    for match in shards:
        there[match[1], match[3], match[4]].add(match[2])
    whole = all(len(numbers) == int(total) for (_, total, _), numbers in there.items())
    return path if whole else None


def _builder(
    source: SourceConfig, path: str, config: str | None, revision: str | None = None
) -> Any:
    import datasets

    where: dict[str, Any] = {"data_dir": source.data_dir or None, "revision": revision}
    if os.path.isdir(path):
        where["cache_dir"] = _own_cache(pathlib.Path(path))
    try:
        return datasets.load_dataset_builder(path, config, **where)
    except Exception as error:
        raise _refused(source, error) from error


def _own_cache(directory: pathlib.Path) -> str:
    """Where the library prepares a local directory in its present state.

    Its own cache knows a directory by its last name alone: it gives the old rows after a file has
    changed, and the rows of another directory of that name.
    """
    import datasets

    state = [str(directory.resolve())]
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        found = file.stat()
        state.append(f"{file.relative_to(directory)} {found.st_size} {found.st_mtime_ns}")
    digest = hashlib.blake2b("\n".join(state).encode("utf-8", "surrogateescape"), digest_size=8)
    return str(pathlib.Path(datasets.config.HF_DATASETS_CACHE) / f"local-{digest.hexdigest()}")


def _split(source: SourceConfig, builder: Any) -> str:
    """The split to read: the one that is asked for, or the only one."""
    known = [str(name) for name in builder.info.splits or builder.config.data_files or ()]
    base = source.split.partition("[")[0]
    listed = ", ".join(known) or "none"
    if not base and len(known) == 1:
        return known[0]
    if not base:
        raise UsageError(
            f"split of {shown(source.source)}",
            f"it has several: {listed}",
            f"name one beside `source`, such as split: {known[0] if known else 'train'}",
        )
    if base not in known:
        raise UsageError(
            f"split={shown(source.split)} of {shown(source.source)}",
            f"it has no such split; there are {listed}",
            "name one of these",
        )
    return source.split


def _refused(source: SourceConfig, error: Exception) -> UsageError:
    text = " ".join(str(error).split())
    where = f"problems of {shown(source.source)}"
    if available := re.search(r"(?:available configs|Available): (\[.*?\])", text):
        return UsageError(
            where,
            f"it has the configurations {available[1][:300]}",
            "name one: hf:ORG/NAME/CONFIG",
        )
    return UsageError(
        where,
        f"the datasets library cannot read it ({in_short(error)})",
        "give a directory or data set of Parquet, JSON or CSV files",
    )


def _not_there(source: SourceConfig, repository: str, error: Exception) -> UsageError:
    import datasets
    import huggingface_hub

    caches = f"{huggingface_hub.constants.HF_HUB_CACHE} or {datasets.config.HF_DATASETS_CACHE}"
    revision = f" --revision {source.revision}" if source.revision else ""
    return UsageError(
        f"problems of {shown(source.source)}",
        f"the hub cannot be reached ({in_short(error)}), and no copy is in {caches}",
        f"where there is a network, run `hf download --repo-type dataset {repository}{revision}`, "
        "and copy that cache here or point HF_HOME at it",
    )


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars and no advice of the library."""
    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """The library looks at its own cache alone, without trying the network for half a minute."""
    import huggingface_hub

    places: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def needs_network(source: SourceConfig) -> bool:
    """Whether reading the source may ask the hub, so that others are read first."""
    return source.kind == "hf" and not is_local(source) and not os.environ.get("HF_HUB_OFFLINE")
