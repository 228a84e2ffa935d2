"""What decoding needs of a model: the network and its parameters, made once for all decoders."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from typing import Any

from zip_rc_jax.inference import memory
from zip_rc_jax.inference.network import TransformerNetwork, page_size
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.stacks import unstack
from zip_rc_jax.models.transformer import unembedding
from zip_rc_jax.runtime.errors import UsageError


def check_head(lm: LanguageModel) -> None:
    """Raises UsageError for a model without a head."""
    if lm.head is None:
        reason = "the search reads the joint from reserved logits"
        raise UsageError("model without a ZIP head", reason, "train one with `zip-rc train`")


def transformer_network(lm: LanguageModel) -> tuple[TransformerNetwork, dict[str, Any]]:
    """The network that decodes with `lm`, and its parameters.

    On CPU layers are unrolled, see `models.stacks.unstack`. On TPU and GPU the cache lies in
    pages, and each sequence is read only as far as it is long.

    Raises:
      UsageError: the copies that this makes do not fit into the device's memory.
    """
    devices = lm.layout.mesh.devices
    unrolled = devices.flat[0].platform == "cpu"
    copied = [
        lm.params["body"]["blocks"] if unrolled else {},
        unembedding(lm.config, lm.params["body"]),
    ]
    memory.check_parameters(lm.params, copied, memory.device_limit(devices.flat[0], devices.size))
    body = unstack(lm.config, lm.params["body"]) if unrolled else lm.params["body"]
    dtype, page = str(body["embed"].dtype), page_size(lm.layout.platform)
    network = TransformerNetwork(lm.config, lm.layout, dtype, unrolled, page)
    return network, {"body": body, "table": lm.folded_table()}


@dataclasses.dataclass(eq=False)
class Prepared:
    """What decoding needs of a model: the network and its parameters. On CPU most are copies."""

    network: TransformerNetwork
    params: dict[str, Any]


_PREPARED: weakref.WeakKeyDictionary[LanguageModel, weakref.ref[Prepared]]
_PREPARED = weakref.WeakKeyDictionary()
_PREPARING = threading.Lock()


def prepared(lm: LanguageModel) -> Prepared:
    """`transformer_network(lm)`, made once and shared by all that hold it at the same time.

    It is not kept: the copies would nearly double the memory of a model as long as it lives.

    Raises:
      UsageError: see `transformer_network`.
    """
    with _PREPARING:
        held = _PREPARED.get(lm)
        prepared = held() if held is not None else None
        if prepared is None:
            prepared = Prepared(*transformer_network(lm))
            _PREPARED[lm] = weakref.ref(prepared)
        return prepared
