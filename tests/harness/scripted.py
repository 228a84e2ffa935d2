"""A scripted model: the first generated token draws a plan, and the plan says how long the prefix
becomes and what the head predicts.

Its cache is the token history itself, so a row that is moved, branched or resumed wrongly goes on
with the wrong history. That shows: after a history whose ids sum to `s`, filler word `s % 4` is
never generated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import ZipHead
from zip_rc_jax.models.io.tokenizer import word_level
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.sharding import Layout, single_device

PLANS = 3
FILLERS = 4
WORDS = (
    [f"plan{i}" for i in range(PLANS)]
    + [f"w{i}" for i in range(FILLERS)]
    + ["x", "y", "z", "Answer:"]
)
TOKENIZER = word_level(WORDS)
EOS = TOKENIZER.eos_ids[0]
FIRST_PLAN = TOKENIZER.encode("plan0")[0]
FIRST_FILLER = TOKENIZER.encode("w0")[0]
GRID = Grid((0.0, 0.5, 1.0), (0, 4, 8, 16, 32))
HEAD = ZipHead(GRID, "value", first_id=40, used_ids=TOKENIZER.size)
POSITIONS = 64
NEVER = -1e9
SHARP = 1e-4  # mass outside the predicted cells


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The cache: `tokens [X, P, page]`, and the table `[X, W, N]` of the lanes; None: lane `i` has
    page `i`."""

    tokens: jax.Array
    table: jax.Array | None = None

    def axes(self) -> History:
        return History(("batch", None, None))

    def lanes(self, slots, table) -> History:
        return History(self.tokens, table)

    def with_lanes(self, lanes: History, slots) -> History:
        return History(lanes.tokens)

    def copy_pages(self, from_pages, to_pages, count, slots) -> History:
        def copy(i, tokens):
            copied = tokens[0, from_pages[i], :slots]
            return tokens.at[0, to_pages[i], : len(copied)].set(copied)

        return History(jax.lax.fori_loop(0, count, copy, self.tokens))

    def copy_slot(self, source, target) -> History:
        return self

    def take_pages(self, pages):
        return jax.vmap(lambda x, at: x.at[at].get(mode="clip"))(self.tokens, pages)[None]

    def put_pages(self, pages, content) -> History:
        put = jax.vmap(lambda x, at, new: x.at[at].set(new, mode="drop"))
        return History(put(self.tokens, pages, content[0]))

    def take_slots(self, slots):
        return ()

    def put_slots(self, slots, content) -> History:
        return self

    def clear_pages(self, pages) -> History:
        clear = jax.vmap(lambda x, at: x.at[at].set(-1, mode="drop"))
        return History(clear(self.tokens, pages))

    def read(self, lanes: int, slots: int) -> jax.Array:
        """The first `slots` tokens of every lane."""
        width = lanes // len(self.tokens)
        if self.table is None:
            return self.tokens[:, :width, :slots].reshape(lanes, slots)
        pages = jax.vmap(lambda x, at: x[at])(self.tokens, self.table)
        return pages.reshape(lanes, -1)[:, :slots]

    def write(self, positions, tokens, live) -> History:
        """`tokens [N, T]` at `positions` of the lanes that are live."""
        shards, pages, page = self.tokens.shape
        table = self.table
        if table is None:
            width = len(positions) // shards
            table = jnp.broadcast_to(jnp.arange(width)[:, None], (shards, width, 1))
        table = table.reshape(len(positions), -1)
        number = jnp.take_along_axis(
            table, jnp.minimum(positions // page, table.shape[1] - 1), axis=1
        )
        inside = live[:, None] & (positions < table.shape[1] * page)
        number = jnp.where(inside, number, pages)

        def by_shard(x):
            return x.reshape(shards, -1, *x.shape[1:])

        put = jax.vmap(lambda x, at, place, new: x.at[at, place].set(new, mode="drop"))
        arguments = by_shard(number), by_shard(positions % page), by_shard(tokens)
        return History(put(self.tokens, *arguments), self.table)


@dataclasses.dataclass(frozen=True)
class ScriptedNetwork:
    """Implements `inference.network.Network`; its params are `Script.params`."""

    vocab_size: int = 64
    layout: Layout = dataclasses.field(default_factory=single_device)
    page: int = 0

    def empty_cache(self, shards: int, rows: int, slots: int, pages: int) -> History:
        return History(jnp.full((shards, pages, self.page or slots), -1, jnp.int32))

    def logits(self, params, tokens, positions, last, live, cache, slots):
        lanes = jnp.arange(tokens.shape[0])
        # What is not live writes nonsense here, which must not be kept.
        history = cache.read(len(lanes), slots)
        history = history.at[lanes[:, None], positions].set(
            jnp.where(live[:, None], tokens, FIRST_PLAN), mode="drop"
        )
        position = positions[lanes, last]
        seen = jnp.arange(history.shape[1]) <= position[:, None]
        planned = seen & (history >= FIRST_PLAN) & (history < FIRST_PLAN + PLANS)
        started, start = planned.any(1), planned.argmax(1)
        plan = jnp.where(started, history[lanes, start] - FIRST_PLAN, 0)
        generated = position - start + 1

        forbidden = jnp.sum(jnp.where(seen, history, 0), axis=1) % FILLERS
        fillers = jnp.where(jnp.arange(FILLERS) == forbidden[:, None], NEVER, 0.0)
        empty = jnp.full((len(lanes), self.vocab_size), NEVER)
        at_root = empty.at[:, FIRST_PLAN : FIRST_PLAN + PLANS].set(params["draw"])
        within = empty.at[:, FIRST_FILLER : FIRST_FILLER + FILLERS].set(fillers)
        ending = (generated >= params["length"][plan] - 1)[:, None]
        logits = jnp.where(
            started[:, None], jnp.where(ending, empty.at[:, EOS].set(0.0), within), at_root
        )
        cells = jnp.where(
            started[:, None],
            params["joint"][plan, jnp.clip(generated, 0, POSITIONS - 1)],
            params["root"],
        )
        logits = logits.at[:, HEAD.first_id : HEAD.last_id].set(cells)
        return logits, cache.write(positions, tokens, live)

    def temporary_bytes(self, rows, tokens, slots):
        return 4 * rows * slots


@dataclasses.dataclass(frozen=True)
class Plan:
    """A prefix of `length` tokens (plan word and end token included); `reward(t)` is the predicted
    value after `t` tokens, and
    `remaining(t)` the predicted remaining tokens (default: the truth).
    """

    length: int
    reward: float | Callable[[int], float]
    remaining: Callable[[int], int] | None = None

    def joint(self, t: int) -> np.ndarray:
        # Asked for every position of the table, also past the plan's end, where a formula may leave
        # [0, 1].
        reward = float(np.clip(self.reward(t), 0, 1)) if callable(self.reward) else self.reward
        remaining = self.remaining(t) if self.remaining else max(self.length - t, 0)
        return cells(reward, remaining)


def cells(reward: float, remaining: int) -> np.ndarray:
    """A joint `[B_V, B_T]` with mean reward `reward` (mass at 0 and 1) and nearly all mass in the
    length bin of `remaining`."""
    by_length = np.full(GRID.n_length, SHARP)
    by_length[int(GRID.length_bin(remaining))] = 1
    by_reward = np.array([1 - reward, 0.0, reward]) + SHARP
    joint = np.outer(by_reward, by_length)
    return joint / joint.sum()


class Script:
    """`root` is the joint of the empty prefix: (mean reward, remaining tokens)."""

    def __init__(
        self,
        plans: list[Plan],
        root: tuple[float, int] = (0.5, 12),
        draw: tuple[float, ...] | None = None,
    ):
        self.plans = plans + [plans[-1]] * (PLANS - len(plans))
        self.root = cells(*root)
        with np.errstate(divide="ignore"):
            weights = (
                np.log(draw)
                if draw
                else np.array([0.0 if i < len(plans) else NEVER for i in range(PLANS)])
            )
        self.params = {
            "length": jnp.asarray([p.length for p in self.plans]),
            "joint": jnp.asarray(
                np.log([[p.joint(t).ravel() for t in range(POSITIONS)] for p in self.plans]),
                jnp.float32,
            ),
            "root": jnp.asarray(np.log(self.root).ravel(), jnp.float32),
            "draw": jnp.asarray(np.maximum(weights, NEVER), jnp.float32),
        }

    def lm(self, max_positions: int = POSITIONS) -> LanguageModel:
        config = ModelConfig(vocab_size=ScriptedNetwork().vocab_size, max_positions=max_positions)
        return LanguageModel(config, TOKENIZER, self.params, HEAD)

    def plan_of(self, token_ids) -> int:
        return token_ids[0] - FIRST_PLAN

    def joint_after(self, token_ids, t: int) -> np.ndarray:
        """What the head says once `t` of `token_ids` have been generated."""
        return self.root if t == 0 else self.plans[self.plan_of(token_ids)].joint(t)
