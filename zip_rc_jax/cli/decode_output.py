"""The directory that `zip-rc decode --output` writes."""

from __future__ import annotations

import datetime
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from zip_rc_jax.config.checks import shown
from zip_rc_jax.inference.requests import TextOrChat
from zip_rc_jax.models.io.chat import reads_clock, template_time
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import check_same_settings
from zip_rc_jax.runtime.storage import START_AGAIN


def hash_of(value: Any) -> str:
    """A short digest of a JSON-able value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


class DecodeOutput:
    """The files of `zip-rc decode --output`, and what they are of.

    Attributes:
      results, metadata, partial: paths.
      fingerprint: all that decides the results: model, settings, and the prompts as the template
        rendered them.
      time: what a template that writes the date sees: when the directory was begun. None if the
        template writes none.
      finished: whether the results are there, of the same fingerprint.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        lm: LanguageModel,
        prompts: Sequence[TextOrChat],
        chat: dict[str, Any],
        asked: dict[str, Any],
    ):
        """Args: `asked` are the further parts of the fingerprint.

        Raises:
          UsageError: results of another fingerprint, or of one that is not known, are there; or a
            template refuses a prompt.
        """
        self.results, self.metadata = directory / "results.jsonl", directory / "metadata.json"
        self.partial = directory / "results.partial.jsonl"
        begun = self._begun()
        dated = any(not isinstance(prompt, str) for prompt in prompts) and reads_clock(
            lm.tokenizer.chat_template
        )
        self.time = _time(begun, directory) if dated else None
        with template_time(self.time):
            texts = [
                prompt if isinstance(prompt, str) else lm.tokenizer.chat(prompt, **chat)
                for prompt in prompts
            ]
        self.fingerprint = {"model": lm.digest(), **asked, "prompts": hash_of(texts)}
        if self.time:
            self.fingerprint["template_time"] = self.time.isoformat()
        # What was interrupted while its last files were written has both, and the journal decides.
        self.finished = self.results.exists() and not self.partial.exists()
        if self.finished:
            if begun is None:
                raise UsageError(
                    f"results in {self.results}",
                    f"{self.metadata.name} does not say with what settings they were made",
                    "choose another directory, or delete them to start again",
                )
            check_same_settings(f"file {self.results}", begun, self.fingerprint, fix=START_AGAIN)

    def _begun(self) -> dict[str, Any] | None:
        """The fingerprint that the files there were made or begun with; None where none is
        known."""
        try:
            if self.partial.exists():
                with self.partial.open("rb") as lines:
                    fingerprint = json.loads(lines.readline())
            else:
                fingerprint = json.loads(self.metadata.read_bytes())["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return fingerprint if isinstance(fingerprint, dict) else None


def _time(begun: dict[str, Any] | None, directory: pathlib.Path) -> datetime.datetime:
    """The time that templates see: the recorded one, so that a run that is resumed on another day
    goes on with the same prompts; or now.
    """
    recorded = (begun or {}).get("template_time")
    if recorded is None:
        return datetime.datetime.now().replace(microsecond=0)
    try:
        return datetime.datetime.fromisoformat(recorded)
    except (TypeError, ValueError):
        raise UsageError(
            f"template_time={shown(recorded)} in {directory}",
            "it is no time",
            "delete the results to start again",
        ) from None
