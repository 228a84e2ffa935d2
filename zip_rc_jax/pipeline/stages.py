"""The stages, each from files to files in one run directory, each restartable by calling it again.

policy -> rollouts -> graded -> critic -> labelled -> final (and lite). `zip-rc` has one subcommand per stage; `demo` runs them all.
Grading, labelling and training the head read `config.data` instead, if it names rollouts from elsewhere.

With several processes, all call the same stage. Training is one program on all their devices. Sampling, grading and labelling are cut into
chunks that the processes share; each works on its own devices, and the first joins what they made.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import DecodeConfig, PipelineConfig, TrainConfig, to_dict
from zip_rc_jax.data.parquet import GenerationInfo, open_rollouts, read_generation, read_parquet_metadata, write_parquet
from zip_rc_jax.data.prompts import prompt_texts, prompt_time
from zip_rc_jax.data.rollouts import Rollout, RolloutSource, read_metadata, summary_of
from zip_rc_jax.data.tasks import MATH, Problem, problems
from zip_rc_jax.data.worked_solutions import vocabulary, write_solution
from zip_rc_jax.grading.grader import Grader, check_entry, correct
from zip_rc_jax.grading.summary import summarize, to_json
from zip_rc_jax.head import HeadDefaults
from zip_rc_jax.inference.engine import Engine, ResultEvent
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.inference.requests import Request
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.io.tokenizer import Tokenizer, word_level
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.chunks import remove_remains, write_in_chunks
from zip_rc_jax.pipeline.seeds import with_own_samples
from zip_rc_jax.predict import ForwardSettings, final_values, profiles
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import console, progress
from zip_rc_jax.runtime.sharding import DECODE_RULES, TRAIN_RULES, Layout, devices_worth_using, make_mesh, side_by_side
from zip_rc_jax.runtime.storage import check_writable, fit_path, write_json
from zip_rc_jax.training.loop import split_validation, train

LARGEST_NUMBER = 120  # a chain sum of 8 digits stays within 72 even if every step slips by 3
# What a chunk of grading and of labelling holds: enough for minutes of work at most, of which an interruption loses no more than one.
GRADED_ROLLOUTS, LABELLED_ROLLOUTS = 1024, 1024
TRAIN_STAGES = ("policy", "critic", "final", "lite")


def run_directory(config: PipelineConfig) -> pathlib.Path:
    """Where all stages read and write; a leading `~` is the home directory.

    Raises:
      UsageError: the config names none, or one below which checkpoints would be lost (see `fit_path`).
    """
    if not config.run_dir:
        raise UsageError("run_dir=''", "every stage reads and writes there", "add run_dir=runs/NAME")
    return fit_path(config.run_dir, "run_dir")


def check_output(config: PipelineConfig, name: str, *parts: str) -> None:
    """Before anything expensive: what the stage writes to `run_dir/NAME` can be written, unless it is there already.

    Args:
      parts: of the name of the directory below `run_dir/NAME` that files go to.

    Raises:
      UsageError: a file has that name, or nothing can be written there.
    """
    directory = run_directory(config) / name
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"run_dir {config.run_dir!r}", f"{name} in it is a file, not a directory", "rename it, or use another run_dir")
    if parts or not directory.is_dir():
        check_writable(directory.joinpath(*parts), f"{name} in run_dir")


def source_path(config: PipelineConfig, stage: str) -> pathlib.Path:
    """The rollouts that a stage reads: `config.data`, or those that the stage before left in the run directory."""
    return pathlib.Path(config.data) if config.data else run_directory(config) / stage


def load_policy(config: PipelineConfig, layout: Layout | None = None, dtype: str = "float32") -> LanguageModel:
    """The starting policy: `policy.path`, or what `train --stage policy` left in the run directory. `layout`, `dtype`: see `load`.

    Raises:
      UsageError: there is none, or see `load`.
    """
    if config.policy.path:
        return load(config.policy.path, layout=layout, dtype=dtype)
    trained = run_directory(config) / "policy"
    if not trained.is_dir():
        raise UsageError(
            "policy.path=''", f"there is no {trained}", "set policy.path to a model, or run `zip-rc train --stage policy` to make one"
        )
    return load(trained, layout=layout, dtype=dtype)


def train_layout(config: PipelineConfig) -> Layout:
    """Where training lies. Raises UsageError for a mesh that the devices do not give."""
    return Layout(make_mesh(**to_dict(config.mesh)), TRAIN_RULES)


# Policy.


def solution_rollouts(config: PipelineConfig, tokenizer: Tokenizer) -> list[Rollout]:
    """Training texts of a demo policy as rollouts: prompts of the training split with written solutions.

    Raises:
      UsageError: a problem that is no chain sum, a prompt that leaves no room in a row for the shortest of several solutions, or see
        `prompt_texts`.
    """
    rng = random.Random(config.policy.train.seed)
    found = problems(config.task, "train", config.policy.examples)
    rollouts = []
    for p, prompt in zip(found, prompt_texts(found, config, tokenizer), strict=True):
        if p.task != "chain_sum":
            raise UsageError(
                f"task {p.task!r}", "worked solutions are written for chain_sum alone", "set policy.path to a model that knows the task"
            )
        chat, added = config.prompt.style == "chat", config.decode.add_special_tokens
        prompt_ids = tokenizer.encode_prompt(prompt, chat=chat, add_special_tokens=added)
        room = config.policy.train.row_tokens + 1 - len(prompt_ids)  # the last token is never an input
        for _ in range(100):  # the rare solution that does not fit is written anew
            solution = write_solution(p.question, config.policy, rng)
            output = [*tokenizer.encode(solution), tokenizer.eos_ids[0]]
            if len(output) <= room:
                break
        else:
            raise UsageError(
                f"policy.train.row_tokens={config.policy.train.row_tokens}",
                f"problem {p.index} has a prompt of {len(prompt_ids)} tokens, and none of 100 solutions fits behind it",
                "make the rows longer",
            )
        rollouts.append(_rollout(p, 0, prompt, prompt_ids, output, solution, True, 1.0))
    return rollouts


def make_policy(config: PipelineConfig) -> LanguageModel:
    """Trains a demo policy on worked solutions, from scratch or from `policy.start`; result in `run_dir/policy`."""
    if config.policy.start:
        lm = load(config.policy.start, layout=train_layout(config))
    else:
        lm = LanguageModel.create(config.model, word_level(vocabulary(LARGEST_NUMBER)), config.policy.train.seed)
        lm = dataclasses.replace(lm, layout=train_layout(config))
    text = {name: value for name, value in to_dict(config.policy).items() if name not in ("train", "path", "start")}
    source: dict[str, Any] = {"policy": text, "task": to_dict(config.task)}
    if config.policy.start:
        source |= {"start": lm.digest(), **prompt_record(config, lm.tokenizer), **added_record(config, lm.tokenizer)}
    lm = lm.with_head(config.grid.grid("correct"), "correct")
    directory, rollouts, start = run_directory(config) / "policy", solution_rollouts(config, lm.tokenizer), [lm]
    del lm  # see `train`
    return train(start.pop(), rollouts, config.policy.train, directory, source=source, title="policy")


# Rollouts.


def _rollout(
    p: Problem, sample: int, prompt: str, prompt_ids: Any, output: Any, text: str, finished: bool, grade: float = math.nan
) -> Rollout:
    return Rollout(
        prompt_index=p.index,
        sample_index=sample,
        level=p.level,
        seed=p.seed,
        task=p.task,
        prompt=prompt,
        question=p.question,
        answer=p.answer,
        entry_json=p.entry_json,
        prompt_token_ids=prompt_ids,
        output_token_ids=output,
        response=text,
        finished=finished,
        correct=grade,
    )


def run_all(engine: Engine, prompts: Sequence[str | Request], title: str = "") -> list[Result]:
    """Results of all prompts in order, with a progress bar if `title` is given."""
    results: dict[int, Result] = {}
    with progress(title or "decode", len(prompts)) as bar:
        tokens = 0
        for event in engine.run(prompts, stream=False):
            if isinstance(event, ResultEvent):
                results[event.prompt_index] = event.result
                tokens += event.result.usage.tokens
                if title:
                    bar(len(results), f"{tokens:,} tokens")
    return [results[i] for i in range(len(prompts))]


def make_rollouts(config: PipelineConfig) -> pathlib.Path:
    """Samples the policy on the training problems; result in `run_dir/rollouts`. Finished chunks survive an interruption.

    Several processes share the chunks that are not there yet. A sample depends on the seed, its prompt and how many problems before it
    have the same one, so the result is the same for any number of them, also if it changes between an interruption and the next start.

    Raises:
      UsageError: `config.data` names other rollouts, the directory holds some of other settings, or the policy or task is impossible.
    """
    if config.data:
        raise UsageError(f"data={config.data!r}", "this stage samples rollouts itself", "leave data out, or go on with `zip-rc grade`")
    r, directory = config.rollout, run_directory(config) / "rollouts"
    check_output(config, "rollouts")
    rows = max(r.rows, r.samples)
    policy = load_policy(config, sampling_layout(rows, r.samples), config.dtype)
    settings = {"rollout": to_dict(r), "task": to_dict(config.task), "policy": policy.digest(), **prompt_record(config, policy.tokenizer)}
    settings |= added_record(config, policy.tokenizer)
    if directory.is_dir():
        _same_source(directory, settings)
        return directory
    found = problems(config.task, "train", r.prompts)
    requests = with_own_samples(prompt_texts(found, config, policy.tokenizer), r.seed)
    decode = DecodeConfig(
        strategy="fixed",
        n=r.samples,
        max_num_seqs=rows,
        interval=16,
        window=1,
        max_tokens=r.max_tokens,
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_p=r.min_p,
        add_special_tokens=config.decode.add_special_tokens,
    )
    # The joint is not read here; a head is attached so that sampling runs on the one engine there is.
    engine = Engine(policy.with_head(config.grid.grid("correct"), "correct"), decode, r.seed)

    def sample(part: Sequence[Problem]) -> list[Rollout]:
        results = run_all(engine, [requests[p.index] for p in part])
        return [x for p, result in zip(part, results, strict=True) for x in as_rollouts(p, result, policy, decode.add_special_tokens)]

    return write_in_chunks("rollout", directory, settings, found, max(1, rows // r.samples) * 4, sample, each=r.samples)


def sampling_layout(rows: int, samples: int) -> Layout:
    """Most devices of this process worth using over which `rows` rows divide, with room for all samples of a prompt on each; else one."""
    devices = devices_worth_using()
    used = max((count for count in range(1, devices + 1) if rows % count == 0 and rows // count >= samples), default=1)
    return side_by_side(used, DECODE_RULES)


def refuse_failure(p: Problem, result: Result) -> None:
    """Raises UsageError if the model failed on the prompt; what broke off there is no sample of the policy."""
    if result.error:
        raise UsageError(f"problem {p.index} (level {p.level}, seed {p.seed})", result.error, "look at the model's weights and dtype")


def as_rollouts(p: Problem, result: Result, lm: LanguageModel, add_special_tokens: bool) -> list[Rollout]:
    """The prefixes of a result as ungraded rollouts. Raises as `refuse_failure`.

    Args:
      add_special_tokens: as in the `DecodeConfig` that it was decoded with.
    """
    refuse_failure(p, result)
    chat = result.template_hash is not None
    prompt_ids = lm.tokenizer.encode_prompt(result.prompt, chat=chat, add_special_tokens=add_special_tokens)
    return [_rollout(p, x.id, result.prompt, prompt_ids, x.token_ids, x.text, x.finish_reason == "stop") for x in result.prefixes]


def prompt_record(config: PipelineConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decided the text of the prompts, for the records of what was made from them."""
    found = {"prompt": to_dict(config.prompt), "template_hash": tokenizer.template_hash if config.prompt.style == "chat" else None}
    seen = prompt_time(config, tokenizer)  # recorded only where a template writes the date
    return found | {"prompt_time": seen.isoformat()} if seen else found


def added_record(config: PipelineConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids that prompts begin and end with by the tokenizer's own settings; empty if there are none, as before these were added."""
    added = [list(ids) for ids in tokenizer.added_ids] if config.decode.add_special_tokens else []
    return {"added_ids": added} if any(added) else {}


def _same_source(directory: pathlib.Path, settings: dict[str, Any]) -> None:
    if distributed.is_chief():
        remove_remains(directory)
    if read_metadata(directory) != settings:
        raise UsageError(f"dataset {directory}", "it was made with other settings", "use another run_dir, or delete it to make it again")


# Grades, labels.


def _random_access(path: pathlib.Path) -> tuple[Sequence[Rollout], dict[str, Any]]:
    """See `open_rollouts`. Those of a dataset are read as they are used; those of Parquet files, which are read in order, lie in memory."""
    source, metadata = open_rollouts(path)
    return source if isinstance(source, RolloutSource) else list(source), metadata


def make_grades(config: PipelineConfig) -> pathlib.Path:
    """Grades the rollouts with the task's own scorer, those without a task as free-form mathematics; result in `run_dir/graded`.

    Then it prints the share of right responses, of those without an answer and of those that were cut off, and writes
    the counts to `run_dir/grades.json`. See `GradeConfig` for what a cut-off response is worth, and
    `chunks.write_in_chunks` for interruptions and several processes.

    Raises:
      UsageError: no rollouts there, one without a reference answer, or the result was made from others.
    """
    directory = run_directory(config) / "graded"
    check_output(config, "graded")
    rollouts, metadata = _random_access(source_path(config, "rollouts"))
    settings = {"rollouts": metadata, "grade": to_dict(config.grade)}
    if directory.is_dir():
        _same_source(directory, settings)
        _tell_grades(config)
        return directory
    _check_answers(rollouts)
    with Grader() as grader:

        def grade(part: Sequence[Rollout]) -> list[Rollout]:
            scores = grader.grade_many((r if r.task else dataclasses.replace(r, task=MATH), r.response) for r in part)
            return [
                dataclasses.replace(r, correct=0.0 if config.grade.unfinished == "wrong" and not r.finished else correct(s))
                for r, s in zip(part, scores, strict=True)
            ]

        write_in_chunks("grade", directory, settings, rollouts, GRADED_ROLLOUTS, grade)
    _tell_grades(config)
    return directory


def _tell_grades(config: PipelineConfig) -> None:
    if not distributed.is_chief():
        return
    found = summarize(RolloutSource(run_directory(config) / "graded"))
    write_json(run_directory(config) / "grades.json", to_json(found))
    for name, counts in found.items():
        if name or len(found) > 2:  # one task and level is all there is
            console.print(f"{name or 'all'}: {counts.responses} responses, {counts.line()}", markup=False, highlight=False, soft_wrap=True)
    if warning := found[""].warning():
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _check_answers(rollouts: Sequence[Rollout]) -> None:
    """Against no answer at all, every response would be graded wrong."""
    for number, r in enumerate(rollouts):
        if not r.answer.strip() and not r.entry_json:
            raise UsageError(f"rollout {number}", "it has no reference answer to grade against", "fill `answer`, or leave the rollout out")
        try:
            check_entry(r)
        except UsageError as error:
            raise UsageError(f"rollout {number}, {error.value}", error.reason, error.fix) from None


def make_labels(config: PipelineConfig) -> pathlib.Path:
    """Labels the rollouts with the critic's value; result in `run_dir/labelled`.

    See `chunks.write_in_chunks` for interruptions and several processes.

    Raises:
      UsageError: no rollouts or critic there, rollouts of another model, or the result was made from others.
    """
    directory = run_directory(config) / "labelled"
    check_output(config, "labelled")
    critic = load(run_directory(config) / "critic", layout=side_by_side(devices_worth_using(), TRAIN_RULES), dtype=config.dtype)
    rollouts, metadata = _random_access(source_path(config, "graded"))
    settings = {"graded": metadata, "critic": critic.digest(), "label": {"last": config.label.last}}
    if directory.is_dir():
        _same_source(directory, settings)
        return directory
    _check_tokens(rollouts, critic)

    def label(part: Sequence[Rollout]) -> list[Rollout]:
        values = final_values(profiles(critic, part, ForwardSettings(config.label.batch_tokens)), config.label.last)
        return [dataclasses.replace(r, value=v) for r, v in zip(part, values.tolist(), strict=True)]

    return write_in_chunks("label", directory, settings, rollouts, LABELLED_ROLLOUTS, label)


def _check_tokens(rollouts: Sequence[Rollout], lm: LanguageModel) -> None:
    """An id past the tokenizer's would silently be read as another, or as a reserved one."""
    largest = summary_of(rollouts).largest_id
    if (foreign := largest >= lm.tokenizer.used).any():
        number = int(np.argmax(foreign))
        raise UsageError(
            f"rollout {number}",
            f"it has token id {largest[number]}, and the model's tokenizer has {lm.tokenizer.used} ids, so another model sampled it",
            "set policy.path to the model that the rollouts come from",
        )


# Export.


def export_parquet(config: PipelineConfig, directory: pathlib.Path) -> pathlib.Path:
    """Writes the dataset of a stage also as `run_dir/STAGE.parquet`, in the authors' schema; nothing if that is there already.

    Raises:
      UsageError: another file has that name, or it is unknown how the rollouts were sampled.
    """
    path = directory.with_name(f"{directory.name}.parquet")
    source = RolloutSource(directory)
    if not path.exists():
        write_parquet(path, source, settings=_generation(config, source), metadata=source.metadata)
    elif read_parquet_metadata(path) != source.metadata:
        raise UsageError(f"file {path}", f"it was not written from {directory}, or something else rewrote it", "rename or delete it")
    return path


def _generation(config: PipelineConfig, source: RolloutSource) -> GenerationInfo | list[GenerationInfo]:
    """How the rollouts of a stage's dataset were sampled, from the metadata of the stages before it."""
    origin = source.metadata
    while parent := origin.get("graded") or origin.get("rollouts"):
        origin = parent
    if "parquet" in origin:
        if not config.data or open_rollouts(config.data)[1] != origin:
            raise UsageError(
                "format=parquet",
                "these rollouts come from a Parquet file, and its model_id, temperature, ... stand only there",
                "pass the same data=FILE to `zip-rc grade --format parquet`, then data=run_dir/graded.parquet to `zip-rc label`",
            )
        return read_generation(config.data)
    policy = load_policy(config, dtype=config.dtype)
    if origin.get("policy") != policy.digest():
        raise UsageError(f"policy.path={config.policy.path!r}", "another policy sampled these rollouts", "set it to that one")
    sampling, longest = origin["rollout"], int(summary_of(source).prompt.max(initial=0))
    return GenerationInfo(
        model_id=config.policy.path or str(run_directory(config) / "policy"),
        temperature=sampling["temperature"],
        min_p=sampling["min_p"],
        max_model_len=min(policy.config.max_positions, longest + sampling["max_tokens"]),
        reasoning_enabled=asks_for_reasoning(origin["prompt"], policy.tokenizer.chat_template or ""),
    )


def asks_for_reasoning(prompt: dict[str, Any], template: str) -> bool:
    """Whether these prompts let the model think first: templates that can (Qwen3's) do unless `enable_thinking` is false."""
    return prompt["style"] == "chat" and "enable_thinking" in template and bool(prompt["chat_template_kwargs"].get("enable_thinking", True))


# Training of the head.


def train_head(config: PipelineConfig, stage: str) -> LanguageModel:
    """Trains "critic", "final" or "lite" from the starting policy; result in `run_dir/STAGE`.

    Raises:
      UsageError: an unknown stage, the stage before it has not run, or rollouts that another model sampled or that lack the label.
    """
    if stage not in TRAIN_STAGES:
        raise UsageError(f"stage {stage!r}", f"the stages are {', '.join(TRAIN_STAGES)}", "choose one of them")
    if not (run_directory(config) / stage / "model").is_dir():
        check_output(config, stage, "checkpoints")
    if stage == "policy":
        return make_policy(config)
    settings: TrainConfig = getattr(config, stage)
    path = source_path(config, "graded" if settings.label == "correct" else "labelled")
    if not config.data and not path.is_dir():
        before = {"graded": "zip-rc grade", "labelled": "zip-rc label"}[path.name]
        raise UsageError(f"dataset {path}", f"stage {stage!r} trains on the label {settings.label!r}", f"run `{before}` first")
    policy = load_policy(config, train_layout(config))
    grid = config.grid.grid(settings.label)
    lm = policy.with_head(grid, settings.label, defaults=head_defaults(config))
    if settings.rows_from:
        lm = _with_rows_of(lm, run_directory(config) / settings.rows_from)
    rollouts, metadata = _random_access(path)
    _check_tokens(rollouts, policy)
    training, validation = split_validation(rollouts, settings.eval_rollouts)
    _check_graded(validation, stage, settings)
    source = {"data": metadata, "policy": policy.digest()} | ({"rows": lm.digest()} if settings.rows_from else {})
    if validation:  # a run that was begun with another split would go on with rollouts that it has been tested on
        source["validation"] = "by prompt"
    start = [lm]
    del lm, policy  # see `train`
    return train(
        start.pop(),
        training,
        settings,
        run_directory(config) / stage,
        source=source,
        validation=validation,
        validation_last=config.label.last,
        title=stage,
    )


def head_defaults(config: PipelineConfig) -> HeadDefaults:
    """What a trained head says about decoding: the config's own `decode` section."""
    d = config.decode
    return HeadDefaults(d.interval, d.window, d.max_tokens)


def _with_rows_of(lm: LanguageModel, stage: pathlib.Path) -> LanguageModel:
    """`lm` with the trained reserved rows of another stage of the run."""
    if not stage.is_dir():
        raise UsageError(f"rows_from={stage.name!r}", f"there is no {stage}", f"run `zip-rc train --stage {stage.name}` first")
    trained = load(stage, layout=lm.layout)
    if trained.head != lm.head:
        raise UsageError(
            f"rows_from={stage.name!r}", f"its head is {trained.head}, this stage trains {lm.head}", "use a stage of the same label"
        )
    return dataclasses.replace(lm, params={**lm.params, "zip_rows": trained.params["zip_rows"]})


def _check_graded(validation: Sequence[Rollout], stage: str, settings: TrainConfig) -> None:
    """Foreign rollouts may have values but no grades, and then nothing says whether the head can tell good from bad."""
    if any(math.isnan(r.correct) for r in validation):
        raise UsageError(
            f"{stage}.eval_rollouts={settings.eval_rollouts}",
            "the rollouts held back for validation have no 'correct' label",
            "run `zip-rc grade`" + (f", or set {stage}.eval_rollouts=0 to train without validation" if settings.label == "value" else ""),
        )
