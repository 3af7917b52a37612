"""The tasks of lm-eval on the models of a recipe: RULER and whatever else it has.

The model is built as everywhere in `evaluation/` (the run's RoPE, adapter, quantization, tokenizer)
and handed to lm-eval as an object; what is scored is lm-eval's own. Nothing is cut without a word:

- a task that makes a text of the length asked for (RULER, BABILong) is never cut: space for the
  answer is added where the task leaves none, as RULER's fwe does;
- any other text is cut from the left to the length, as lm-eval does, and counted in `truncated`.

RULER's generators never end where not even the shortest text fits, so that is found out first.
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any
from unittest import mock

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from longlora_plugin.evaluation.fitting import fitting
from longlora_plugin.evaluation.loading import LoadedModel, ModelSource
from longlora_plugin.evaluation.options import BenchOptions
from longlora_plugin.evaluation.passkey import WORDING
from longlora_plugin.evaluation.processes import Processes
from longlora_plugin.evaluation.rows import BenchFigures, BenchScores
from longlora_plugin.evaluation.suites import (
    QUESTIONS_FROM,
    RULER_OFFLINE,
    RULER_QUESTIONS,
    SUITES,
    has_length,
    makes_its_text,
    metadata_for,
)
from longlora_plugin.evaluation.sweep import Cell, Experiment, NotMeasurable

PREFERRED_METRICS = ("acc_norm", "exact_match", "f1", "acc")
"""The one that is a task's score, where it has several; else its first."""


class Bench(Experiment):
    """lm-eval's tasks at every length.

    Args:
        tokenizers: of each model, by label.
        options: `tasks` and `lengths` are not empty.
        note: told what the user should know.

    Raises:
        ValueError: no such task, or its data cannot be had.
    """

    question = ("limit", "chat_template")

    def __init__(
        self,
        tokenizers: Mapping[str, Any],
        options: BenchOptions,
        processes: Processes,
        note: Callable[[str], None] = lambda note: None,
    ) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.options, self.processes, self.note = options, processes, note
        self.tokenizers = tokenizers
        self.manager = TaskManager()
        self.tasks = list(
            dict.fromkeys(leaf for name in options.tasks for leaf in self._leaves(name))
        )
        self.lengths = sorted(set(options.lengths))
        short = [length for length in self.lengths if length < QUESTIONS_FROM]
        if short and set(RULER_QUESTIONS) & set(self.tasks):
            note(
                f"RULER's questions are no test below {QUESTIONS_FROM} tokens: hardly more than "
                "the documents that answer them fits"
            )
        for task in self.tasks:
            if missing := [length for length in self.lengths if not has_length(task, length)]:
                note(f"{task} has lengths of 1k, 2k, 4k, …: no rows at {missing}")
            if task not in RULER_OFFLINE:
                self._check_data(task)

    def _leaves(self, name: str) -> Iterator[str]:
        """The tasks of a suite, group or tag."""
        if name in SUITES and SUITES[name] != (name,):
            for task in SUITES[name]:
                yield from self._leaves(task)
            return
        entry = self.manager.task_index.get(name)
        if entry is None:
            near = [*SUITES, *self.manager.all_tasks]
            raise ValueError(
                f"--tasks {name}: neither a suite ({', '.join(SUITES)}) nor a task of lm-eval"
                + _nearest(name, near)
            )
        if entry["type"] in ("task", "python_task"):
            yield name
            return
        members = entry["task"]
        if members == -1:
            members = self.manager._get_config(name)["task"]
        for member in [members] if isinstance(members, str) else members:
            yield from self._leaves(member if isinstance(member, str) else member["task"])

    def _check_data(self, task: str) -> None:
        length = max(self.lengths) if not makes_its_text(task) else min(self.lengths)
        tokenizer = next(iter(self.tokenizers.values()))
        try:
            with _quiet(), fitting(task, length, tokenizer):
                self.manager.metadata = metadata_for(task, length, tokenizer.name_or_path)
                self.manager.load_task_or_group([task])
        except NotMeasurable:
            return
        except Exception as error:
            config = self.manager._get_config(task)
            data = config.get("dataset_path") or "texts from the web"
            raise ValueError(
                f"{task} needs {data}, which cannot be had here ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else error!r}). Where the hub can be "
                f"reached run the same command once, or hf download --repo-type dataset {data}; "
                "ruler-offline needs no data"
            ) from error

    def cells(self) -> list[Cell]:
        return [
            {"task": task, "length": length}
            for length in self.lengths
            for task in self.tasks
            if has_length(task, length) and (makes_its_text(task) or length == self.lengths[-1])
        ]

    def settings(self, source: ModelSource, cell: Cell) -> dict[str, Any]:
        ids = self.tokenizers[source.label](WORDING)["input_ids"]
        return {
            **cell,
            "limit": self.options.limit,
            "chat_template": self.options.chat_template,
            "tokenizer": ids,
            "lm_eval": version("lm_eval"),
        }

    def measure(
        self, model: LoadedModel, cell: Cell, progress: Callable[[int, int], None]
    ) -> BenchFigures:
        task, length = cell["task"], cell["length"]
        language_model = CountingLM(
            model,
            length,
            grows=makes_its_text(task),
            batch_size=self.options.batch_size,
            processes=self.processes,
            progress=progress,
        )
        self.manager.metadata = metadata_for(task, length, model.tokenizer.name_or_path)
        with _quiet(), fitting(task, length, model.tokenizer):
            found = simple_evaluate(
                language_model,
                tasks=[task],
                task_manager=self.manager,
                limit=self.options.limit,
                batch_size=self.options.batch_size,
                apply_chat_template=self.options.chat_template,
            )
        counted = self.processes.gather([language_model.counted()])
        scored: BenchScores = self.processes.from_main(
            None if found is None else self._scored(found, cell)
        )
        row: BenchFigures = {
            **scored,
            "truncated": sum(each["truncated"] for each in counted),
            "beyond_length": sum(each["beyond_length"] for each in counted),
            "longest_prompt": max(each["longest_prompt"] for each in counted),
            "max_gen_toks": max(each["max_gen_toks"] for each in counted),
            "max_length": max(each["max_length"] for each in counted),
        }
        self._tell(model.source.label, cell, row)
        if found is not None and self.options.output_path:
            _write_as_lm_eval(found, self.options.output_path, model.source.label)
        return row

    def _scored(self, found: Mapping[str, Any], cell: Cell) -> BenchScores:
        task, length = cell["task"], cell["length"]
        results = found["results"][task]
        metric, filter_name = _metric_of(results, str(length))
        samples = [
            float(sample[metric])
            for sample in found["samples"][task]
            if sample["filter"] == filter_name and _is_number(sample.get(metric))
        ]
        stderr = results.get(f"{metric}_stderr,{filter_name}")
        if not _is_number(stderr):  # lm-eval gives none for RULER's own lengths
            spread = len(samples) > 1
            stderr = statistics.stdev(samples) / len(samples) ** 0.5 if spread else None
        return {
            "score": float(results[f"{metric},{filter_name}"]),
            "stderr": stderr,
            "metric": metric,
            "filter": filter_name,
            "metrics": {
                name: value
                for name, value in results.items()
                if "," in name and _is_number(value) and value != -1
            },
            "examples": found["n-samples"][task]["effective"],
            "limit": self.options.limit,
            "chat_template": self.options.chat_template,
            "lm_eval": version("lm_eval"),
        }

    def _tell(self, label: str, cell: Cell, row: BenchFigures) -> None:
        where = f"{label}, {cell['task']} at {cell['length']}"
        if row["truncated"]:
            self.note(
                f"{where}: {row['truncated']} prompts are longer than {cell['length']} tokens (up "
                f"to {row['longest_prompt']}) and were cut from the left"
            )
        elif row["beyond_length"]:
            self.note(
                f"{where}: {row['beyond_length']} prompts need more than {cell['length']} tokens "
                f"with their answer (up to {row['longest_prompt']} + {row['max_gen_toks']}); none "
                "was cut"
            )


class CountingLM(HFLM):
    """lm-eval's view of a loaded model, which counts what does not fit.

    Args:
        length: tokens of a prompt; longer ones are cut from the left unless it `grows`.
        grows: whether the limit is raised instead.
        progress: told the prompts just done, and those of this process in all.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        length: int,
        *,
        grows: bool,
        batch_size: int,
        processes: Processes,
        progress: Callable[[int, int], None],
    ) -> None:
        # lm-eval ties weights again, which PEFT's trained copies of tied embeddings do not survive.
        with mock.patch.object(loaded.model, "tie_weights", create=True):
            super().__init__(
                pretrained=loaded.model,
                tokenizer=loaded.tokenizer,
                backend="causal",
                max_length=length,
                batch_size=batch_size,
            )
        self._device = loaded.device
        if processes.count > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = processes.rank, processes.count
        self._length, self._grows, self._progress = length, grows, progress
        self._prompts: list[int] = []
        self._answer = 0
        self._in_all = 0

    def counted(self) -> dict[str, int]:
        """What was seen, of this process."""
        over = sum(tokens > self._length for tokens in self._prompts)
        beyond = sum(tokens + self._answer > self._length for tokens in self._prompts)
        return {
            "truncated": 0 if self._grows else over,
            "beyond_length": beyond,
            "longest_prompt": max(self._prompts, default=0),
            "max_gen_toks": self._answer,
            "max_length": self.max_length,
        }

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [self.tok_batch_encode([request.args[0]])[0].shape[1] for request in requests]
        answers = [
            normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks)["max_gen_toks"]
            for request in requests
        ]
        self._prompts += prompts
        self._answer = max([self._answer, *answers])
        longest = max(prompts, default=0) if self._grows else self._length
        self._max_length = max(self._length, longest + self._answer)
        self._in_all = len(requests)
        texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        return texts

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> Any:
        # A model reads all but the last token of prompt and continuation.
        self._prompts += [len(prompt) + len(answer) - 1 for _, prompt, answer in requests]
        self._in_all = len(requests)
        return super()._loglikelihood_tokens(requests, **options)

    def _model_generate(self, context: Any, *args: Any, **options: Any) -> Any:
        self._progress(context.shape[0], self._in_all)
        return super()._model_generate(context, *args, **options)

    def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
        self._progress(inps.shape[0], self._in_all)
        return super()._model_call(inps, *args, **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Generators print each step they take, and lm-eval has bars of its own."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _metric_of(results: Mapping[str, Any], length: str) -> tuple[str, str]:
    """The metric that is the task's score, and its filter."""
    names = [
        tuple(name.split(",", 1))
        for name, value in results.items()
        if "," in name and "_stderr," not in name and _is_number(value)
    ]
    for wanted in (length, *PREFERRED_METRICS):
        for metric, filter_name in names:
            if metric == wanted:
                return metric, filter_name
    return names[0][0], names[0][1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, str) and value == value


def _nearest(name: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _write_as_lm_eval(found: dict[str, Any], folder: str, label: str) -> None:
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=folder)
    tracker.general_config_tracker.log_experiment_args(
        model_source="hf",
        model_args=f"pretrained={label}",
        system_instruction=None,
        chat_template=None,
        fewshot_as_multiturn=False,
    )
    samples = found.get("samples")
    content = {name: value for name, value in found.items() if name != "samples"}
    tracker.save_results_aggregated(results=content, samples=samples)
