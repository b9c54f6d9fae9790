"""Files of conversations and of preferences as packed rows, and what is refused or left out of them."""

import json

import numpy as np
import pytest

from gqa.data import loader, tokenise
from gqa.data import prepare as prepare_module
from gqa.data.conversations import Conversations, messages_of
from gqa.data.examples import TRAINED, make_task
from gqa.data.packing import packed_row
from gqa.data.prepare import PrepareSpec, prepare
from gqa.errors import InputError


def flagged(*tokens):
    """Tokens of a chunk; those that are trained are given as negative."""
    return np.array([-token + TRAINED if token < 0 else token for token in tokens], np.int32)


def rows(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def row(number, **changes):
    return {"instruction": f"say {number}", "output": f"number {number}", **changes}


def pair(number, **changes):
    return {"prompt": f"say {number}", "chosen": f"{number} is good", "rejected": f"{number} is bad", **changes}


def test_packed_conversations():
    row = packed_row([flagged(1, 5, -6, -7), flagged(1, 8, 9, -2, 4)], make_task("sft", 10, None, 100), None)
    assert {name: array.tolist() for name, array in row.items()} == {
        "targets": [5, 6, 7, 8, 9, 2, 4, 0, 0, 0],
        "targets_segments": [1, 1, 1, 2, 2, 2, 2, 0, 0, 0],
        "decoder_inputs": [1, 5, 6, 1, 8, 9, 2, 0, 0, 0],
        "loss_weights": [0, 1, 1, 0, 0, 1, 0, 0, 0, 0],
    }
    assert row["loss_weights"].dtype == np.float32 and row["targets"].dtype == np.int32


def test_packed_preferences():
    chunks = [np.array([17, 3, 3, *flagged(1, 5, -6), *flagged(1, 5, -7, -8)], np.int32)]
    chunks.append(np.array([4, 0, 2, *flagged(1, -9), *flagged(1, -8)], np.int32))
    row = packed_row(chunks, make_task("preferences", 12, None, 100), None)
    assert {name: array.tolist() for name, array in row.items()} == {
        "targets": [5, 6, 0, 5, 7, 8, 0, 9, 0, 8, 0, 0],
        "targets_segments": [1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 0],
        "decoder_inputs": [1, 5, 6, 1, 5, 7, 8, 1, 9, 1, 8, 0],
        "loss_weights": [0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0],
        "pairs": [17, 4, 0],
        "ratings": [3, 0, 0],
    }


@pytest.mark.parametrize("task", ["sft", "preferences"])
def test_every_usable_line_is_in_a_row_once(chat_vocabulary, tmp_path, task):
    make = {"sft": row, "preferences": pair}[task]
    content = [make(number) for number in range(60)]
    if task == "sft":
        content += [row(100, output=""), row(101, instruction="x" * 100)]
        skipped = {"empty response": 1, "prompt too long": 1}
        # Of a preference the chosen response alone: one that is equal to the rejected or has none beside it is as good.
        content[:2] = [pair(0, chosen="number 0", rejected="number 0"), {"prompt": "say 1", "chosen": "number 1"}]
    else:
        content += [pair(100, rejected="100 is good"), pair(101, chosen=" "), pair(102, prompt="x" * 100)]
        skipped = {"chosen equal to rejected": 1, "empty response": 1, "prompt too long": 1}
    source = rows(tmp_path / "rows.jsonl", content)
    spec = PrepareSpec(task, source, str(chat_vocabulary.path), 100, None, template="llama2")
    manifest = prepare(spec, tmp_path / "records")
    counts = {name: sum(split.get(name, 0) for split in manifest.num_skipped.values()) for name in skipped}
    assert counts == skipped and manifest.template == "llama2"
    seen = []
    for batches in (
        loader.train_batches(tmp_path / "records", 1, 0),
        loader.heldout_batches(tmp_path / "records", 1, 99),
    ):
        for step in range(manifest.num_records["train" if len(batches) > 10**6 else "heldout"]):
            batch = {name: array[0] for name, array in batches(step).items()}
            for segment in range(1, batch["targets_segments"].max() + 1):
                here = batch["targets_segments"] == segment
                trained = batch["targets"][here & (batch["loss_weights"] > 0)]
                seen.append(chat_vocabulary.decode(trained.tolist()).strip())
                assert batch["decoder_inputs"][here][0] == chat_vocabulary.bos_id
                assert trained[-1] == chat_vocabulary.eos_id
    if task == "sft":
        assert sorted(seen) == sorted(f"number {number}" for number in range(60))
    else:
        assert sorted(seen) == sorted(f"{number} is {what}" for number in range(60) for what in ("good", "bad"))
        assert all(good.replace("good", "bad") == bad for good, bad in zip(seen[::2], seen[1::2], strict=True))


def test_an_interrupted_preparation_goes_on_and_counts_what_is_left_out_once(chat_vocabulary, tmp_path, monkeypatch):
    for module in (tokenise, prepare_module):
        monkeypatch.setattr(module, "BLOCK", 16)
    content = [row(number) for number in range(60)] + [row(100, output="")]
    source = rows(tmp_path / "rows.jsonl", content[::-1])
    spec = PrepareSpec("sft", source, str(chat_vocabulary.path), 100, None, template="llama2")
    whole = prepare(spec, tmp_path / "whole")
    assert sum(whole.num_documents.values()) == 60
    pack, calls = tokenise.pack, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pack(*arguments)

    monkeypatch.setattr(tokenise, "pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(spec, tmp_path / "parts")
    assert (tmp_path / ".parts.partial").is_dir()
    assert prepare(spec, tmp_path / "parts") == whole
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


def test_a_preference_is_a_conversation_with_its_chosen_response():
    expected = [{"role": "user", "content": "say 3"}, {"role": "assistant", "content": "3 is good"}]
    assert messages_of(pair(3)) == messages_of({"prompt": expected[:1], "chosen": "3 is good"}) == expected


def test_no_prompt_is_in_both_splits(tmp_path):
    content = [pair(number % 40, rejected=f"bad {number}", chosen="good") for number in range(200)]
    conversations = Conversations(rows(tmp_path / "rows.jsonl", content), "preferences")
    prompts = [{content[int(n) - 1]["prompt"] for n in conversations.names(split)} for split in ("train", "heldout")]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 40


def test_conversations_that_begin_alike_are_in_one_split(tmp_path):
    content, expected = [], []
    for number in range(100):
        question = f"say {number}"
        first = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
        more = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
        content.append({"messages": first})
        content.append({"messages": [{"role": "system", "content": "be brief"}, *first, *more]})
        content.append(row(number, input=None, system="be brief"))
        content.append(pair(number))
        content.append(pair(number, prompt=[{"role": "user", "content": question, "input": ""}]))
        expected += [question] * 5
    conversations = Conversations(rows(tmp_path / "rows.jsonl", content), "sft")
    asked = [{expected[int(name) - 1] for name in conversations.names(split)} for split in ("train", "heldout")]
    assert not asked[0] & asked[1] and len(conversations.names("heldout")) == 5 * len(asked[1])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(1, output=str(i))) + "\n" for i in range(9)))
    with pytest.raises(InputError, match="9 lines, 1 different first messages of a user, none in the train split"):
        Conversations(str(tmp_path / "rows.jsonl"), "sft")


def test_both_tasks_hold_out_the_same_preferences(tmp_path):
    content = [pair(number) for number in range(100)]
    content += [pair(number, prompt=[{"role": "user", "content": f"say {number}"}]) for number in range(100, 200)]
    source = rows(tmp_path / "rows.jsonl", content)
    heldout = {task: Conversations(source, task).names("heldout") for task in ("sft", "preferences")}
    assert heldout["sft"] == heldout["preferences"]
    # And they stay what they are.
    assert Conversations(rows(tmp_path / "rows.jsonl", map(row, range(40))), "sft").names("heldout") == ["20", "36"]


@pytest.mark.parametrize("task", ["sft", "preferences"])
def test_a_vocabulary_reads_the_usable_lines(tmp_path, task):
    content = [pair(1), pair(2), pair(3, chosen="", rejected="x"), pair(4, chosen="x", rejected="x")]
    conversations = Conversations(rows(tmp_path / "rows.jsonl", content), task)
    found = sorted(text for split in ("train", "heldout") for text in conversations.texts(split))
    expected = ["1 is good", "2 is good", "say 1", "say 2"]
    expected += ["say 4", "x"] if task == "sft" else ["1 is bad", "2 is bad"]
    assert found == sorted(expected)


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("sft", row(3, output=7), "line 3: message 2 has a int as content"),
        ("sft", {"messages": [{"role": "bot", "content": "x"}] * 2}, "line 3: message 1 has role 'bot'"),
        ("sft", {"text": "x"}, "line 3: there is no 'instruction' among text; expected messages, or"),
        ("sft", {"messages": None}, "line 3: messages is a NoneType; expected a list of {role, content}"),
        ("sft", {"messages": {"role": "user"}}, "line 3: messages is a dict; expected a list"),
        ("sft", row(3, input=5), "line 3: message 1 has a int as input; expected text"),
        ("sft", row(3, input=0), "line 3: message 1 has a int as input; expected text"),
        (
            "sft",
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "train": "no"}]},
            "line 3: message 2 has train 'no'; expected true or false",
        ),
        ("preferences", {"prompt": "x", "chosen": "y"}, "line 3: there is no 'rejected' among prompt, chosen"),
        (
            "preferences",
            pair(3, rating="much better"),
            "line 3: rating 'much better' is not on the scale 'negligibly better / unsure', .*; nearest: ",
        ),
        ("preferences", pair(3, chosen=["x"]), "line 3: chosen is a list; expected a text"),
        ("preferences", pair(3, prompt=7), "line 3: prompt is a int; expected a text or messages"),
        ("preferences", pair(3, prompt=["x"]), "line 3: message 1 has no role and content"),
    ],
)
def test_lines_that_are_refused(chat_vocabulary, tmp_path, task, line, message):
    make = {"sft": row, "preferences": pair}[task]
    source = rows(tmp_path / "rows.jsonl", [make(1), make(2), line])
    with pytest.raises(InputError, match=message):
        prepare(PrepareSpec(task, source, str(chat_vocabulary.path), 64, None, template="llama2"), tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_specs_that_do_not_suit(chat_vocabulary, tmp_path, tiny_corpus):
    source, vocabulary = rows(tmp_path / "rows.jsonl", [row(1), row(2)]), str(chat_vocabulary.path)
    for spec, message in (
        (PrepareSpec("sft", source, vocabulary, 64, None), "task sft needs a template; expected one of alpaca"),
        (
            PrepareSpec("causal_lm", str(tiny_corpus), vocabulary, 64, None, template="llama2"),
            "template='llama2' has no meaning",
        ),
        (PrepareSpec("sft", source, vocabulary, 64, 32, template="llama2"), "targets_length=32 has no meaning for sft"),
        (
            PrepareSpec("sft", str(tmp_path), vocabulary, 64, None, template="llama2"),
            "is not a file; expected conversations",
        ),
        (PrepareSpec("sft", source, vocabulary, 10, None, template="llama2"), "left out: 1 prompt too long"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(spec, tmp_path / "records")


def test_a_line_that_is_no_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n{"messages"\n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        Conversations(str(path), "preferences")
