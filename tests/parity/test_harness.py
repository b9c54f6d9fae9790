"""The LM Evaluation Harness gives our adapter the scores of its own `hf` model."""

import json
import sys
import warnings

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml

from gqa import evaluate, models
from gqa.checkpoints import hf
from gqa.evaluation.checkpoint_text import TextModel

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's and its datasets'

WORDS = "the a cat dog sat ran on in mat house red blue . , ? answer : question is what".split()
LONGEST = 24


def instances(kind: str, *arguments):
    """Requests as the harness makes them."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random Llama of 24 positions with a word tokenizer: the harness's `hf` model of it, ours, and its folder."""
    from lm_eval.models.huggingface import HFLM

    from gqa.evaluation.harness import HarnessModel

    folder = tmp_path_factory.mktemp("llama")
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    files = folder / "tokenizer"
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(files)
    config = models.replace(
        models.size("llama_mini"), vocab_size=len(vocabulary), max_position=LONGEST, decoder_self_kv_heads=2
    )
    network = jax.tree.map(lambda leaf: leaf * 4, models.create(config, jax.random.key(0)))  # far from uniform
    names = ("tokenizer.json", "tokenizer_config.json")
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    checkpoint = folder / "checkpoint"
    hf.save(network, checkpoint, dtype="float32", token_ids=ids, extra_files=[files / name for name in names])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        theirs = HFLM(pretrained=reference, tokenizer=fast, batch_size=2, device="cpu")
    return theirs, HarnessModel(TextModel(checkpoint), batch_size=4), checkpoint


def test_requests(pair):
    theirs, ours, _ = pair
    assert (ours.max_length, ours.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id) == (LONGEST, 1)
    long = " ".join(WORDS * 3)
    asked = [("the cat", " sat"), ("the cat ", "sat on the mat ."), ("", "the dog"), ("what ? unheard", " red blue")]
    asked += [(long, " house . red"), ("is", " " + " ".join(WORDS)[:90])]
    # A greedy continuation, so that one of the answers is.
    [greedy] = theirs.generate_until(instances("generate_until", ("the cat", {"until": [], "max_gen_toks": 3})))
    asked.append(("the cat", f" {greedy}"))
    expected = theirs.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True)
    found = ours.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True)
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=1e-4, atol=1e-5)
    assert [best for _, best in found] == [best for _, best in expected]
    assert {best for _, best in expected} == {True, False}

    texts = [("the cat sat",), (long,), ("red",)]
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", *texts), disable_tqdm=True)
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", *texts), disable_tqdm=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)

    free = {"until": [], "max_gen_toks": 8, "do_sample": False}
    asked = [(text, free) for text in ("the cat", "what is", long, "red blue")]
    expected = theirs.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    assert ours.generate_until(instances("generate_until", *asked), disable_tqdm=True) == expected
    longest = max(range(4), key=lambda number: len(expected[number].split()))
    stop = expected[longest].split()[1]
    asked = [(text, {"until": [stop, "</s>"], "max_gen_toks": 8}) for text, _ in asked]
    stopped = theirs.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    assert ours.generate_until(instances("generate_until", *asked), disable_tqdm=True) == stopped
    assert stopped[longest] == expected[longest].split(stop)[0] != ""


@pytest.mark.full
def test_tasks(pair, tmp_path, monkeypatch):
    """Multiple choice and generation, from local files through task YAMLs, by the command."""
    import datasets

    from gqa.evaluation.harness import Harness

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    theirs, _, checkpoint = pair
    rng = np.random.default_rng(0)
    choices = [
        {
            "question": " ".join(rng.choice(WORDS, 5)),
            "choices": [" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(3)],
            "answer": int(rng.integers(3)),
        }
        for _ in range(12)
    ]
    contexts = [" ".join(rng.choice(WORDS, 4)) for _ in range(6)]
    asked = [(f"question : {context} answer :", {"until": ["."], "max_gen_toks": 4}) for context in contexts]
    right = theirs.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    answers = [
        {"question": context, "answer": text if number % 2 else "no"}
        for number, (context, text) in enumerate(zip(contexts, right, strict=True))
    ]
    tasks = {
        "our_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "our_answer": {
            "output_type": "generate_until",
            "doc_to_text": "question : {{question}} answer :",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
            "num_fewshot": 0,
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    (tmp_path / "tasks").mkdir()
    for (name, task), rows in zip(tasks.items(), (choices, answers), strict=True):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **task}))

    expected = Harness(list(tasks), tmp_path / "tasks", None, None).run(theirs)
    arguments = [f"--checkpoint={checkpoint}", f"--harness={','.join(tasks)}", f"--include_path={tmp_path / 'tasks'}"]
    arguments += ["--batch_size=4", f"--output={tmp_path / 'scores'}"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    evaluate.main()
    found = json.loads((tmp_path / "scores" / "scores.json").read_text())["checkpoints"]["checkpoint"]
    for task, metrics in {"our_choice": ["acc,none", "acc_norm,none"], "our_answer": ["exact_match,none"]}.items():
        for metric in metrics:
            assert found[task][metric] == expected[task][metric]
    assert found["our_answer"]["exact_match,none"] == 0.5


@pytest.mark.full
def test_a_task_that_is_not_there():
    from gqa.errors import InputError
    from gqa.evaluation.harness import Harness

    with pytest.raises(InputError, match=r"^the harness has no task 'arc_eazy'; nearest: arc_easy; further ones are"):
        Harness(["arc_eazy"], None, None, None)


def test_bad_input(pair):
    from gqa.errors import InputError

    _, ours, _ = pair
    for asked, message in (
        ({"max_gen_toks": LONGEST}, f"a task asks for {LONGEST} new tokens, the model has {LONGEST} positions"),
        (
            {"until": ["x"], "num_beams": 4},
            "a task asks for generation with 'num_beams'; expected only until, do_sample",
        ),
    ):
        with pytest.raises(InputError, match=message):
            ours.generate_until(instances("generate_until", ("the cat", asked)))
    with pytest.raises(InputError, match=f"^a continuation has 41 tokens, the model {LONGEST} positions"):
        ours.loglikelihood(instances("loglikelihood", ("the", " " + " ".join(["cat"] * 41))))


@pytest.mark.parametrize(
    ("config", "tokenizer", "length"),
    [
        ({"n_positions": 512}, {"model_max_length": 99}, 512),
        ({}, {"model_max_length": 1024}, 1024),
        ({}, {"model_max_length": int(1e30)}, 2048),
        ({}, {}, 2048),
    ],
)
def test_what_an_encoder_reads(config, tokenizer, length, tmp_path):
    from gqa.evaluation.harness import encoder_length

    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert encoder_length(tmp_path) == length
