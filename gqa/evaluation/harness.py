"""EleutherAI's LM Evaluation Harness on our checkpoints: https://github.com/EleutherAI/lm-evaluation-harness

Texts become tokens, long contexts lose their beginning and generations end as in the harness's own `hf` model, so that
scores compare. Needs the package `lm_eval`, without torch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from gqa.checkpoints.hf_config import read_json
from gqa.decode import batches
from gqa.decode.sampling import sampling
from gqa.decode.score import score_and_rank
from gqa.errors import InputError, nearest
from gqa.evaluation.checkpoint_text import TextModel

MAX_GENERATED = 256  # tokens, where a task does not say: the harness's own
MAX_INPUT = 2048  # tokens an encoder-decoder reads where its files say nothing: the harness's own
_NO_LENGTH = 10**9  # transformers writes a larger one where a tokenizer knows none
_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")

# What a task may say about generation.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names for one thing
_UNDERSTOOD = ("until", "do_sample", "temperature", "top_k", "top_p", *_LIMITS)


def encoder_length(folder: Path) -> int:
    """Tokens of a text that the harness's `hf` model lets the encoder-decoder in `folder` read."""
    for name, keys in (("config.json", _POSITIONS), ("tokenizer_config.json", ("model_max_length",))):
        if (folder / name).is_file():
            said = read_json(folder / name)
            for value in map(said.get, keys):
                if type(value) is int and 0 < value < _NO_LENGTH:
                    return value
    return MAX_INPUT


class HarnessModel(TemplateLM):
    """A checkpoint as the harness sees a model.

    Args:
      checkpoint: a decoder or an encoder-decoder.
      batch_size: rows scored or decoded at a time.
    """

    def __init__(self, checkpoint: TextModel, batch_size: int):
        super().__init__()
        self._checkpoint, self._text, self._batch_size = checkpoint, checkpoint.text, batch_size
        self.backend = "causal" if self._text.is_decoder else "seq2seq"
        self.max_length = (
            checkpoint.config.max_position if self._text.is_decoder else encoder_length(checkpoint.checkpoint)
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self._text.bos_ids[0] if self._text.bos_ids else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Tokens of a text, with those that the model expects around one unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return self._text.vocabulary.encode(string)
        return self._text.tokens(string) if string else [self.prefix_token_id]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        rows = [self._truncated(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool] | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda number: -sum(map(len, rows[number])))
        with tqdm(total=len(rows), desc="score", unit="row", delay=1, disable=disable_tqdm) as bar:
            for first in range(0, len(order), self._batch_size):
                chosen = order[first : first + self._batch_size]
                batch = [rows[number] for number in chosen]
                # A last batch of fewer rows would be a program of its own.
                padded = batch + [batch[-1]] * (min(self._batch_size, len(rows)) - len(batch))
                scored = score_and_rank(self._checkpoint.model, *zip(*padded, strict=True))
                for number, (log_probs, best) in zip(chosen, scored, strict=False):
                    found[number] = (float(log_probs.sum()), bool(best.all()))
                    cached, _, _ = requests[number]
                    if cached is not None:
                        self.cache_hook.add_partial("loglikelihood", cached, found[number])
                bar.update(len(chosen))
        return found

    def _truncated(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], list[int]]:
        if self.backend == "seq2seq":
            return list(context)[-self.max_length :], list(continuation)
        if len(continuation) > self.max_length:
            raise InputError(
                f"a continuation has {len(continuation)} tokens, the model {self.max_length} positions; "
                "expected a task with shorter ones"
            )
        return list(context)[-(self.max_length + 1 - len(continuation)) :], list(continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows as long as the model reads."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (log_prob, _) in zip(owners, scored, strict=True):
            totals[number] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of each context up to the first of its stop strings."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate", unit="row", delay=1, disable=disable_tqdm) as bar:
            for numbers in groups.values():
                settings, stops = self._settings(requests[numbers[0]].args[1])
                room = self.max_length - (settings.max_new_tokens if self.backend == "causal" else 0)
                if room < 1:
                    raise InputError(
                        f"a task asks for {settings.max_new_tokens} new tokens, the model has {self.max_length} "
                        "positions; expected a task of shorter answers"
                    )
                prompts = {number: self.tok_encode(requests[number].args[0])[-room:] for number in numbers}
                for number, text in self._generated(prompts, settings, stops):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update()
        return found

    def _generated(self, prompts, settings, stops: Sequence[str]) -> Iterator[tuple[int, str]]:
        for number, new in batches.generate_all(self._checkpoint.model, prompts, settings):
            ends = [place for place, token in enumerate(new) if token in settings.eos_ids]
            text = self._text.decode(new[: ends[0]] if ends else new)
            for stop in stops:
                text = text.split(stop)[0]
            yield number, text

    def _settings(self, asked: dict[str, Any]) -> tuple[batches.Settings, list[str]]:
        for name in asked.keys() - set(_UNDERSTOOD):
            raise InputError(
                f"a task asks for generation with {name!r}; expected only {', '.join(_UNDERSTOOD)}; "
                f"nearest: {nearest(name, _UNDERSTOOD)}"
            )
        until = asked.get("until") or []
        temperature = asked.get("temperature")
        drawn = None
        if asked.get("do_sample", bool(temperature)):
            drawn = sampling(float(temperature or 1.0), asked.get("top_k"), asked.get("top_p"))
        settings = batches.Settings(
            max_new_tokens=int(next((asked[name] for name in _LIMITS if name in asked), MAX_GENERATED)),
            eos_ids=self._text.eos_ids,
            sampling=drawn,
            seed=0,
            num_beams=1,
            length_penalty=1.0,
            batch_size=self._batch_size,
        )
        return settings, [stop for stop in ([until] if isinstance(until, str) else until) if stop]


class Harness:
    """Tasks of the harness.

    Args:
      tasks: their names.
      include_path: folder of further task YAMLs.
      num_fewshot: examples before each question; `None`: the task's own.
      limit: first questions of each task; `None`: all.

    Raises `InputError` for a task that is not there.
    """

    def __init__(self, tasks: Sequence[str], include_path: Path | None, num_fewshot: int | None, limit: int | None):
        self._manager = TaskManager(include_path=None if include_path is None else str(include_path))
        for task in tasks:
            if not self._manager.match_tasks([task]):
                raise InputError(
                    f"the harness has no task {task!r}; nearest: {nearest(task, self._manager.all_tasks)}; "
                    "further ones are read from --include_path=FOLDER"
                )
        self._arguments = dict(tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, log_samples=False)

    def run(self, model: LM) -> dict[str, dict[str, float]]:
        """`{task: {metric: score}}` as the harness reports them."""
        results = lm_eval.simple_evaluate(model=model, task_manager=self._manager, **self._arguments)["results"]
        return {
            task: {
                name: value for name, value in scores.items() if isinstance(value, int | float) and name != "sample_len"
            }
            for task, scores in results.items()
        }
