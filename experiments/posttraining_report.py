"""What each stage of the post-training example (`experiments.posttraining`) makes of the thing that it optimises.

All on functions of files that no stage has seen, responses drawn at temperature 1. KL is from the SFT model, nats a
response, estimated on the model's own samples.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import pictures
from experiments.measure import write_json
from experiments.posttraining_data import INSTRUCTION, PROMPT_TOKENS, RESPONSE_TOKENS, TEMPLATE, VOCABULARY, mentioned
from gqa import checkpoints
from gqa.checkpoints import reward as reward_checkpoints
from gqa.data.conversations import RATINGS, lines
from gqa.data.templates import Template
from gqa.data.vocabulary import Vocabulary
from gqa.decode.buckets import padded
from gqa.models.llama import Llama
from gqa.models.reward import RewardModel
from gqa.objectives.log_probs import target_log_probs
from gqa.posttraining import rollouts
from gqa.training import metrics

FOLDERS = {"SFT": "sft", "SFT on the best": "rejection", "PPO": "ppo", "DPO": "dpo"}  # of WORKDIR
OWN = "own docstrings"
NUM_PROMPTS, NUM_PAIRS = 56, 400  # held out
SAMPLES, BEST_OF = 4, 16  # responses to a prompt: of every model, and of SFT's for the best of them
ROWS = 64  # responses drawn or read at a time
LENGTH = PROMPT_TOKENS + RESPONSE_TOKENS + 1  # with an EOS
BIN = 4  # tokens, of rewards at matched length
LEAST_OF_BIN = 5
SHOWN = 10
CHOICES = dict(dtype="float32", param_dtype="float32", scan_layers=False, remat="none", dropout_rate=0.0)


class Text(NamedTuple):
    """A prompt and a response, in tokens."""

    tokens: list[int]
    num_prompt: int


class Responses(NamedTuple):
    """Responses to the prompts, all arrays `[P, N]`."""

    texts: np.ndarray
    rewards: np.ndarray
    mentions: np.ndarray  # the rule of the preferences
    lengths: np.ndarray  # tokens
    kl: np.ndarray  # log-probability less the reference's, nats

    def at(self, places_P: np.ndarray) -> "Responses":
        """One response of each prompt."""
        return Responses(*(np.take_along_axis(values, places_P[:, None], axis=1) for values in self))


class Judge:
    """Texts in batches of one shape: rewards and log-probabilities."""

    def __init__(self, reward: RewardModel, eos_id: int):
        self._reward, self._eos_id = reward, eos_id

    def rewards(self, texts: Sequence[Text]) -> np.ndarray:
        """The reward model's score of each."""
        none_B = np.zeros(ROWS, bool)
        # As rejection sampling and PPO do it: a response that was cut is scored with its EOS.
        texts = [
            text._replace(tokens=text.tokens + [self._eos_id] * (text.tokens[-1] != self._eos_id)) for text in texts
        ]
        return _in_batches(
            texts,
            lambda tokens_BT, lengths_B, _: rollouts.score(
                self._reward, None, tokens_BT, lengths_B, none_B, gate=0.0, size=ROWS
            ),
        )

    def log_probs(self, model: Llama, texts: Sequence[Text]) -> np.ndarray:
        """The log-probability of each response, nats."""
        return _in_batches(texts, lambda *batch: _response_log_probs(model, *batch))


def _in_batches(texts: Sequence[Text], function) -> np.ndarray:
    found = []
    for first in range(0, len(texts), ROWS):
        here = texts[first : first + ROWS]
        tokens_BT, lengths_B = padded([text.tokens for text in here], ROWS, LENGTH)
        prompts_B = np.pad([text.num_prompt for text in here], (0, ROWS - len(here)))
        found.append(np.asarray(function(tokens_BT, lengths_B, prompts_B))[: len(here)])
    return np.concatenate(found)


@jax.jit
def _response_log_probs(model: Llama, tokens_BT, lengths_B, prompts_B) -> jax.Array:
    places_T = jnp.arange(1, tokens_BT.shape[1])
    is_response_BT = (places_T >= prompts_B[:, None]) & (places_T < lengths_B[:, None])
    log_probs_BT = target_log_probs(model(tokens_BT[:, :-1]), tokens_BT[:, 1:])
    return jnp.sum(jnp.where(is_response_BT, log_probs_BT, 0.0), axis=1)


def draw(
    model: Llama, reference: Llama, prompts: Sequence[str], template: Template, judge: Judge, samples: int, name: str
) -> Responses:
    """`samples` responses of a model to each prompt, at temperature 1, and what judge and rule say of them."""
    ready, at_once = rollouts.unstacked(model), ROWS // samples
    tokens = [template.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    texts: list[Text] = []
    for first in tqdm(range(0, len(tokens), at_once), desc=f"draw, {name}", delay=1):
        here = tokens[first : first + at_once]
        found = rollouts.draw(
            ready,
            here,
            first * samples + np.arange(ROWS),
            shape=(at_once, PROMPT_TOKENS, RESPONSE_TOKENS),
            eos_ids=(template.vocabulary.eos_id,),
            temperature=1.0,
            seed=0,
        )
        response_BN, counts_B = jax.device_get((found.response_BN, found.counts_B))
        for row in range(len(here) * samples):
            prompt = here[row // samples]
            response = response_BN[row, : counts_B[row]].tolist()
            texts.append(Text(prompt + response, len(prompt)))
    written = [template.response(text.tokens[text.num_prompt :]) for text in texts]
    kl = np.zeros(len(texts))
    if model is not reference:
        kl = judge.log_probs(model, texts) - judge.log_probs(reference, texts)
    return _responses(prompts, texts, written, kl, judge)


def _responses(prompts: Sequence[str], texts: Sequence[Text], written: Sequence[str], kl, judge: Judge) -> Responses:
    samples = len(texts) // len(prompts)
    asked = np.repeat(prompts, samples)
    columns = (
        written,
        judge.rewards(texts),
        [mentioned(prompt, response) for prompt, response in zip(asked, written, strict=True)],
        [len(text.tokens) - text.num_prompt for text in texts],
        kl,
    )
    return Responses(*(np.array(column).reshape(len(prompts), samples) for column in columns))


def matched(values: np.ndarray, lengths: np.ndarray, base: np.ndarray) -> float | None:
    """The mean of `values` if their responses were as long as those of `base`: mean by length, weighted as there.

    Lengths of which there are fewer than `LEAST_OF_BIN` responses are left out; `None`: that leaves none.
    """
    values, bins, shares = values.ravel(), lengths.ravel() // BIN, Counter((base.ravel() // BIN).tolist())
    means = {bin: values[bins == bin].mean() for bin in shares if (bins == bin).sum() >= LEAST_OF_BIN}
    total = sum(shares[bin] for bin in means)
    return float(sum(shares[bin] * mean for bin, mean in means.items()) / total) if total else None


def summary(found: Responses, base: Responses) -> dict[str, float | None]:
    """A row of the table; gains are in standard deviations of `base`'s rewards."""
    mean, deviation = base.rewards.mean(), base.rewards.std(ddof=1)
    at_length = matched((found.rewards - mean) / deviation, found.lengths, base.lengths)
    return {
        "reward": float(found.rewards.mean()),
        "deviation": float(found.rewards.std(ddof=1)),
        "gain": float((found.rewards.mean() - mean) / deviation),
        "gain_at_length": at_length,
        "mentioned": float(found.mentions.mean()),
        "mentioned_at_length": matched(found.mentions, found.lengths, base.lengths),
        "tokens": float(found.lengths.mean()),
        "kl": None if np.isnan(found.kl).any() else float(found.kl.mean()),
    }


def baselines(train: Sequence[Mapping], heldout: Sequence[Mapping], vocabulary: Vocabulary) -> dict[str, float]:
    """Accuracy of "the longer one", in characters, and of the token that is the best sign on `train`; ties are half."""
    pairs = {
        name: [[set(vocabulary.encode(row[side])) for side in ("chosen", "rejected")] for row in rows]
        for name, rows in (("train", train), ("heldout", heldout))
    }
    wins = Counter()
    for chosen, rejected in pairs["train"]:
        wins.update(chosen - rejected)
        wins.subtract(rejected - chosen)
    token = max(wins, key=lambda token: (abs(wins[token]), token))
    sign = 1 if wins[token] >= 0 else -1
    longer = [np.sign(len(row["chosen"]) - len(row["rejected"])) for row in heldout]
    of_token = [sign * ((token in chosen) - (token in rejected)) for chosen, rejected in pairs["heldout"]]
    return {"longer": float(0.5 + np.mean(longer) / 2), "token": float(0.5 + np.mean(of_token) / 2)}


def accuracies(rows: Sequence[Mapping], models: Mapping[str, Llama], template: Template, judge: Judge) -> dict:
    """Accuracy on pairs: of the reward model, overall and by rating, and of the implicit reward of `models["DPO"]`."""
    texts = {}
    for side in ("chosen", "rejected"):
        texts[side] = []
        for row in rows:
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            example = template.example(messages)
            texts[side].append(Text(example.tokens.tolist(), len(example.tokens) - int(example.trained.sum())))
    is_right = judge.rewards(texts["chosen"]) > judge.rewards(texts["rejected"])
    ratings = np.array([row["rating"] for row in rows])
    margins = {
        name: judge.log_probs(models[name], texts["chosen"]) - judge.log_probs(models[name], texts["rejected"])
        for name in ("SFT", "DPO")
    }
    return {
        "pairs": len(rows),
        "reward": float(is_right.mean()),
        "by_rating": {name: float(is_right[ratings == name].mean()) for name in RATINGS if (ratings == name).any()},
        "sft": float((margins["SFT"] > 0).mean()),
        "dpo": float((margins["DPO"] - margins["SFT"] > 0).mean()),
    }


def evaluate(workdir: Path) -> dict:
    """Everything in the report that is measured of the models."""
    data = workdir / "data"
    template = Template(TEMPLATE, Vocabulary(VOCABULARY, foreign=True))
    read = {name: [row for _, row in lines(data / f"{name}.jsonl")] for name in ("preferences", "preferences_heldout")}
    pairs = read["preferences_heldout"][:NUM_PAIRS]
    asked = [row for _, row in lines(data / "prompts_heldout.jsonl")][:NUM_PROMPTS]
    prompts = [row["prompt"] for row in asked]
    models = {name: checkpoints.load(workdir / folder / "model", **CHOICES) for name, folder in FOLDERS.items()}
    reward = reward_checkpoints.load(workdir / "reward" / "model", **CHOICES)
    judge = Judge(reward, template.vocabulary.eos_id)

    many = draw(models["SFT"], models["SFT"], prompts, template, judge, BEST_OF, "SFT")
    found = {OWN: own(asked, models["SFT"], template, judge), "SFT": many}
    best = many.at(many.rewards.argmax(axis=1))
    # How far the best of N can be from what it is drawn from (Beirami et al. 2024 theorem 1).
    found[f"best of {BEST_OF}"] = best._replace(kl=np.full(best.kl.shape, math.log(BEST_OF) - 1 + 1 / BEST_OF))
    for name in list(FOLDERS)[1:]:
        found[name] = draw(models[name], models["SFT"], prompts, template, judge, SAMPLES, name)
    return {
        "preferences": accuracies(pairs, models, template, judge),
        "baselines": baselines(read["preferences"], read["preferences_heldout"], template.vocabulary),
        "models": {name: summary(responses, many) for name, responses in found.items()},
        "prompts": len(prompts),
        "samples": [
            {
                "prompt": prompt.removeprefix(INSTRUCTION),
                "responses": {
                    name: {
                        "text": str(responses.texts[number, 0]),
                        "reward": float(responses.rewards[number, 0]),
                        "mentioned": int(responses.mentions[number, 0]),
                    }
                    for name, responses in found.items()
                },
            }
            for number, prompt in enumerate(prompts[:SHOWN])
        ],
        "data": json.loads((data / "data.json").read_text()),
    }


def own(asked: Sequence[Mapping], reference: Llama, template: Template, judge: Judge) -> Responses:
    """The docstrings that the functions have."""
    texts = []
    for row in asked:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        example = template.example(messages)
        texts.append(Text(example.tokens.tolist(), len(example.tokens) - int(example.trained.sum())))
    kl = np.full(len(texts), np.nan)
    return _responses([row["prompt"] for row in asked], texts, [row["response"] for row in asked], kl, judge)


def checks(report: Mapping) -> list[tuple[str, str, bool]]:
    """What the example should reach: the aim, what was found, whether it is met."""
    preferences, minutes = report["preferences"], sum(report["seconds"].values()) / 60
    found = [
        ("reward model, held-out accuracy ≥ 0.8", f"{preferences['reward']:.3f}", preferences["reward"] >= 0.8),
        *(
            (f"accuracy of {name} ≤ 0.6", f"{value:.3f}", value <= 0.6)
            for name, value in zip(("the longer one", "the best token"), report["baselines"].values(), strict=True)
        ),
    ]
    for name in (f"best of {BEST_OF}", "SFT on the best", "PPO"):
        row = report["models"][name]
        shown = f"{row['gain']:+.2f} SD, {row['kl']:.1f} nats"
        found.append((f"{name}: reward ≥ SFT's + 1 SD at KL ≤ 10 nats", shown, row["gain"] >= 1 and row["kl"] <= 10))
    found.append(("DPO, held-out accuracy ≥ 0.8", f"{preferences['dpo']:.3f}", preferences["dpo"] >= 0.8))
    found.append(("all within 20 minutes", f"{minutes:.1f} minutes", minutes <= 20))
    return found


def as_markdown(report: Mapping) -> str:
    """The report: table, aims, samples."""
    preferences = report["preferences"]
    text = [
        "# Post-training in miniature",
        "",
        "| responses | reward | against SFT, SD | the same at SFT's lengths | words mentioned (the rule) "
        "| the same at SFT's lengths | tokens | KL from SFT, nats |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in report["models"].items():
        upper = "≤ " if name.startswith("best of") else ""
        text.append(
            f"| {name} | {row['reward']:.2f} ± {row['deviation']:.2f} | {row['gain']:+.2f} "
            f"| {_shown(row['gain_at_length'], '+.2f')} | {row['mentioned']:.2f} "
            f"| {_shown(row['mentioned_at_length'], '.2f')} | {row['tokens']:.1f} | {upper}{_shown(row['kl'], '.2f')} |"
        )
    text += [
        "",
        f"{report['prompts']} held-out prompts, {BEST_OF} samples of SFT's to each and {SAMPLES} of the others', "
        "at temperature 1; ± is the standard deviation.",
        "",
        f"| accuracy on {preferences['pairs']} held-out pairs | |",
        "|---|--:|",
        f"| reward model | {preferences['reward']:.3f} |",
        *(f"| — where the chosen one is {name} | {value:.3f} |" for name, value in preferences["by_rating"].items()),
        f"| DPO's implicit reward | {preferences['dpo']:.3f} |",
        f"| the SFT model's log-probability | {preferences['sft']:.3f} |",
        f"| the longer response | {report['baselines']['longer']:.3f} |",
        f"| the token that is the best sign in training | {report['baselines']['token']:.3f} |",
        "",
        "| aim | found | met |",
        "|---|---|---|",
        *(f"| {aim} | {found} | {'yes' if met else '**no**'} |" for aim, found, met in checks(report)),
        "",
        f"Minutes: {', '.join(f'{name} {seconds / 60:.1f}' for name, seconds in report['seconds'].items())}, on "
        f"{report['machine']['cores']} cores ({report['machine']['cpu']}), commit {report['commit']}.",
        "",
        "![Curves](curves.png)",
        "",
        "## First sample of each model for unseen functions",
        "",
        "Behind each: its reward, and how many words of the code it mentions.",
    ]
    for sample in report["samples"]:
        text += ["", "```python", sample["prompt"], "```", ""]
        for name, response in sample["responses"].items():
            shown = " ".join(response["text"].split()).replace("`", "'")
            text.append(f"- {name}: `{shown}` ({response['reward']:+.2f}, {response['mentioned']})")
    return "\n".join(text) + "\n"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def curves(workdir: Path) -> dict:
    """What the report's picture is drawn from: scores on held-out examples by step, and of rejection sampling."""
    found = {}
    for title, folder, name in (
        ("reward model", "reward", "accuracy"),
        ("DPO", "dpo", "accuracy"),
        ("PPO, held-out prompts", "ppo", "reward"),
        ("PPO, KL from the SFT model", "ppo", "kl"),
    ):
        lines = [line for line in metrics.read(workdir / folder) if line["split"] == "heldout"]
        found[title] = {
            "score": name,
            "steps": [line["step"] for line in lines],
            "values": [line[name] for line in lines],
        }
    return {"curves": found, "rejection": json.loads((workdir / "rejection.json").read_text())["curves"]}


def write(report: dict, folder: Path) -> None:
    """report.md, report.json and curves.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(as_markdown(report))
    pictures.save(pictures.posttraining(report), folder / "curves.png")
