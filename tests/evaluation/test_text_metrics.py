import collections
import random
import re
import string
import sys

import numpy as np
import pytest
import rouge_score.rouge_scorer
import rouge_score.scoring
import sacrebleu

from gqa.errors import InputError
from gqa.evaluation import text_metrics
from gqa.evaluation.text_metrics import METRICS, bleu, check, evaluate, normalized_answer, rouge, trivia_qa

WORDS = "the a An cat Cats sat runs, on mat. it's 3.5 über_x 'twas (old) river ' ’tis".split(" ")


@pytest.fixture(scope="module")
def random_pairs():
    """100 targets and predictions that share about half of their words; some predictions are empty or equal."""
    rng = random.Random(0)
    targets = [" ".join(rng.choices(WORDS, k=rng.randint(1, 25))) for _ in range(100)]
    predictions = [" ".join(rng.choice([word, rng.choice(WORDS)]) for word in target.split()) for target in targets]
    predictions[3], predictions[7], targets[9] = "", targets[7], "the . a . cat sat . on"
    return targets, predictions


def test_rouge_of_published_examples():
    # rouge_score's own tests; the last one is Lin (2004), §3.2.
    assert rouge(["testing one two"], ["testing"])["rouge1"] == pytest.approx(50)
    assert rouge(["testing one two"], ["testing one"])["rouge2"] == pytest.approx(200 / 3)
    found = rouge(["w1 w2 w3 w4 w5"], ["w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5"])
    assert found["rougeLsum"] == pytest.approx(100 * 2 * 0.4 * 0.8 / 1.2)
    # Without stemming "jumps" and "jumped" differ; a sentence ends at " . ", as T5's evaluation has it.
    assert rouge(["he jumps"], ["he jumped"])["rouge1"] == pytest.approx(50)
    joined, split = "w1 w2 w6 w7 w8 . w1 w3 w8 w9 w5", "w1 w2 w6 w7 w8 .\nw1 w3 w8 w9 w5"
    assert rouge(["w1 w2 w3 w4 w5"], [joined]) == rouge(["w1 w2 w3 w4 w5"], [split])


def test_rouge_is_the_reference(random_pairs):
    names = ["rouge1", "rouge2", "rougeLsum"]
    scorer = rouge_score.rouge_scorer.RougeScorer(names)
    split = [[text.replace(" . ", " .\n") for text in texts] for texts in random_pairs]
    scores = [scorer.score(target, prediction) for target, prediction in zip(*split, strict=True)]
    expected = {name: 100 * np.mean([score[name].fmeasure for score in scores]) for name in names}
    found = rouge(*random_pairs)
    assert found == pytest.approx(expected)
    assert all(10 < value < 90 for value in expected.values())
    # Its own aggregate is the median of resampled means, drawn anew each time.
    aggregator = rouge_score.scoring.BootstrapAggregator()
    for score in scores:
        aggregator.add_scores(score)
    aggregate = {name: 100 * score.mid.fmeasure for name, score in aggregator.aggregate().items()}
    assert found == pytest.approx(aggregate, abs=1)


def test_bleu_of_a_worked_example():
    # Precisions 5/6, 4/5, 3/4, 2/3, whose product is 1/3; as long as the reference.
    assert bleu(["the cat sat on the rug"], ["the cat sat on the mat"])["bleu"] == pytest.approx(100 * (1 / 3) ** 0.25)
    # International tokens (mteval-v14): punctuation of any script is a token.
    assert bleu(["er sagte „ ja “"], ["er sagte „ja“"])["bleu"] == pytest.approx(100)


def test_bleu_is_the_reference(random_pairs):
    targets, predictions = random_pairs
    expected = sacrebleu.corpus_bleu(predictions, [targets], tokenize="intl").score
    assert bleu(targets, predictions)["bleu"] == pytest.approx(expected)
    # sacrebleu's published example with two references.
    system = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
        ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."],
    ]
    expected = sacrebleu.corpus_bleu(system, references, tokenize="intl").score
    assert bleu(list(zip(*references, strict=True)), system)["bleu"] == pytest.approx(expected)
    assert bleu(["no word in common"], ["x y"])["bleu"] == 0


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Beatles", "beatles"),
        ("a  cat\tand an owl", "cat and owl"),
        ("Rock-'n'-Roll!", "rock n roll"),  # punctuation becomes a space, unlike SQuAD's, which drops it
        ("AC/DC", "ac dc"),
        ("snake_case", "snake case"),
        ("‘Twas ´the` night’", "twas night"),
        ("Atheneum, Ann", "atheneum ann"),  # articles are whole words
        ("Málaga", "málaga"),
        ("the", ""),
    ],
)
def test_normalisation_of_answers(text, normalized):
    assert normalized_answer(text) == normalized


def test_answers_that_are_right():
    assert trivia_qa([["Sunset Blvd", "Sunset Boulevard"]], ["sunset boulevard."]) == {"f1": 100, "exact_match": 100}
    # The best alias counts: 2 of 2 words found of 3 said.
    found = trivia_qa([["Boulevard of Dreams and Sorrow", "Sunset Boulevard"]], ["old Sunset Boulevard"])
    assert found == {"f1": pytest.approx(80), "exact_match": 0}
    assert trivia_qa(["one two", "three"], ["one two", "four"]) == {"f1": 50, "exact_match": 50}
    assert trivia_qa(["cat cat dog"], ["cat"])["f1"] == pytest.approx(50)  # a word counts as often as it is there
    assert trivia_qa(["x"], ["the"]) == {"f1": 0, "exact_match": 0}


def test_answers_are_scored_as_by_the_official_script(random_pairs):
    def normalize_answer(s):  # github.com/mandarjoshi90/triviaqa, evaluation/triviaqa_evaluation.py
        exclude = set(string.punctuation + "".join(["‘", "’", "´", "`"]))
        lower = s.replace("_", " ").lower()
        without = "".join(ch if ch not in exclude else " " for ch in lower)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", without).split()).strip()

    def f1_score(prediction, ground_truth):
        prediction_tokens = normalize_answer(prediction).split()
        ground_truth_tokens = normalize_answer(ground_truth).split()
        num_same = sum((collections.Counter(prediction_tokens) & collections.Counter(ground_truth_tokens)).values())
        if num_same == 0:
            return 0
        precision, recall = num_same / len(prediction_tokens), num_same / len(ground_truth_tokens)
        return 2 * precision * recall / (precision + recall)

    targets, predictions = random_pairs
    aliases = [[target, target[: len(target) // 2]] for target in targets]
    pairs = list(zip(aliases, predictions, strict=True))
    expected = {
        "f1": 100 * np.mean([max(f1_score(prediction, one) for one in answers) for answers, prediction in pairs]),
        "exact_match": 100
        * np.mean([max(normalize_answer(x) == normalize_answer(p) for x in answers) for answers, p in pairs]),
    }
    assert trivia_qa(aliases, predictions) == pytest.approx(expected)
    assert 10 < expected["f1"] < 90


def test_intervals(random_pairs):
    targets, predictions = ["yes"] * 400, ["yes", "no"] * 200
    found = evaluate("trivia_qa", targets, predictions, samples=2000, seed=1)["exact_match"]
    half = 1.96 * 100 * np.sqrt(0.25 / 400)  # of a proportion
    assert found == pytest.approx((50, 50 - half, 50 + half), abs=0.7)
    assert evaluate("trivia_qa", targets, predictions, samples=2000, seed=1)["exact_match"] == found
    assert evaluate("trivia_qa", targets, predictions, samples=2000, seed=2)["exact_match"] != found
    found = evaluate("bleu", *random_pairs, samples=200, seed=0)["bleu"]
    assert found.value == pytest.approx(bleu(*random_pairs)["bleu"])
    assert found.low < found.value < found.high
    # sacrebleu's own bootstrap, of the same corpus.
    own = sacrebleu.metrics.BLEU(tokenize="intl").corpus_score(random_pairs[1], [random_pairs[0]], n_bootstrap=200)
    assert (found.high - found.low) / 2 == pytest.approx(own._ci, rel=0.3)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_whose_package_is_missing(name, monkeypatch):
    check(name)
    text_metrics._rouge_scorer.cache_clear()
    text_metrics._sacrebleu.cache_clear()
    for package in ("rouge_score.rouge_scorer", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, package, None)
    if name == "trivia_qa":  # ours
        check(name)
    else:
        with pytest.raises(InputError, match=rf"^{name.upper()} needs the package .*: pip install -e '\.\[eval\]'$"):
            check(name)


def test_bad_input():
    for arguments, message in (
        (
            ("rogue", ["x"], ["x"]),
            r"^metric 'rogue' is unknown; expected one of rouge, bleu, trivia_qa; nearest: rouge$",
        ),
        (("rouge", ["x"], []), "^1 targets and 0 predictions; expected as many of each, not 0$"),
        (("rouge", [], []), "^0 targets and 0 predictions; expected as many of each, not 0$"),
        (("bleu", ["x", []], ["x", "y"]), "^row 2 has no right answer; expected at least one$"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(*arguments, samples=0, seed=0)
