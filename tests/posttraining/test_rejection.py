"""Rejection sampling: what is kept, rounds that are merged, runs that go on, what is refused."""

import json
import re
import shutil

import pytest
import tokenizers

from gqa.checkpoints import reward
from gqa.data.conversations import messages_of
from gqa.errors import InputError
from gqa.posttraining import opening, rejection
from gqa.posttraining.config import RejectionConfig
from gqa.training import config as run_config

pytestmark = pytest.mark.usefixtures("compilation_cache")
CHANGES = {"temperatures": (0.8, 1.2), "samples": 4, "batch_size": 16, "new_tokens": 12}


def kept(prompt, response, score, number):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return rejection.Kept(messages, score, number, 1.0)


@pytest.fixture
def run(sampling_config, folders):
    """A function (output, changes) -> the lines of the output."""

    def run(output, changes=()):
        changes = {"policy": str(folders["talker"]), **CHANGES, **dict(changes)}
        config = run_config.parse(sampling_config("rejection_sampling", changes), RejectionConfig)
        rejection.run(config, output)
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_the_best_of_all_rounds():
    first = [kept("a", "old", 1.0, 1), kept("b", "old", 5.0, 1), kept("c", "old", 2.0, 1)]
    second = [kept("a", "poor", 0.5, 2), kept("a", "new", 3.0, 2), kept("b", "new", 5.0, 2), kept("d", "new", 0.0, 2)]
    merged = rejection.merge([first, second])
    found = {line.messages[0]["content"]: (line.messages[1]["content"], line.round) for line in merged}
    assert found == {"a": ("new", 2), "b": ("old", 1), "c": ("old", 1), "d": ("new", 2)}


def test_two_rounds(run, tmp_path, capsys, prompts_file):
    lines = run(tmp_path / "one.jsonl")
    prompts = [json.loads(line)["prompt"] for line in prompts_file.read_text().splitlines()]
    found = [line["messages"][0]["content"] for line in lines]
    assert found == [prompt for prompt in prompts if prompt in found] and len(found) > 30
    assert all(line["round"] == 1 and line["temperature"] in (0.8, 1.2) for line in lines)
    assert all(messages_of(line)[-1]["content"].strip() for line in lines), "what sft.py trains on"
    statistics = json.loads((tmp_path / "one.json").read_text())
    assert [curve["temperature"] for curve in statistics["curves"]] == [0.8, 1.2] and statistics["prompts"] == 40
    for curve in statistics["curves"]:
        assert len(curve["max"]) == len(curve["median"]) == 4
        assert curve["max"] == sorted(curve["max"]) and curve["max"][0] == pytest.approx(curve["median"][0])
    assert "| samples |" in (tmp_path / "one.md").read_text() and (tmp_path / "one.png").stat().st_size > 1000
    assert f"round 1, {len(lines)} conversations, 0 of them of former rounds" in capsys.readouterr().out

    # Round two, of other draws: no prompt has a worse response than before, and some are better.
    again = run(tmp_path / "two.jsonl", {"former": str(tmp_path / "one.jsonl"), "seed": 1})
    before, after = ({line["messages"][0]["content"]: line for line in found} for found in (lines, again))
    assert before.keys() <= after.keys()
    for prompt, line in before.items():
        assert after[prompt]["score"] >= line["score"] - 1e-6
        assert after[prompt]["round"] == 2 or after[prompt]["messages"] == line["messages"]
    assert {line["round"] for line in again} == {1, 2}
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"{name}.{suffix}" for name in ("one", "two") for suffix in ("json", "jsonl", "md", "png")]


def test_an_interrupted_round_ends_with_the_same_bytes(run, tmp_path, monkeypatch):
    run(tmp_path / "whole.jsonl")
    append, calls = rejection.append, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) in (100, 150):  # in the middle of a batch
            raise KeyboardInterrupt
        append(*arguments)

    monkeypatch.setattr(rejection, "append", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts.jsonl")
        with (tmp_path / ".parts.jsonl.partial").open("ab") as file:
            file.write(b"[7, [1")  # torn by a kill
    assert not (tmp_path / "parts.jsonl").exists()
    run(tmp_path / "parts.jsonl")
    assert len(calls) == 2 * 40 * 4 + 2
    for suffix in ("jsonl", "md", "png"):
        assert (tmp_path / f"parts.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        calls.clear()
        run(tmp_path / "other.jsonl")
    with pytest.raises(InputError, match="holds a run with another settings; delete it or name another --output"):
        run(tmp_path / "other.jsonl", {"seed": 1})


def test_a_safety_model_scores_what_is_tagged(run, tmp_path, folders, prompts_file):
    """The safety model likes what the other does not; with gate 0 it scores tagged prompts alone."""
    lines = run(tmp_path / "one.jsonl", {"safety": str(folders["safety"]), "safety_gate": 0.0})
    plain = {line["messages"][0]["content"]: line for line in run(tmp_path / "plain.jsonl")}
    tagged = {row["prompt"] for row in map(json.loads, prompts_file.read_text().splitlines()) if row["safety"]}
    before = [line["messages"] for line in plain.values()]
    changed = {line["messages"][0]["content"] for line in lines if line["messages"] not in before}
    assert changed <= tagged and len(changed) > len(tagged) / 2, "some prompts have one whole response alone"


@pytest.fixture
def chat(tmp_path, tiny_vocabulary):
    """A function (text of a special token) -> the vocabulary with a template of its own beside it, as changes."""

    def make(special):
        config = {
            "chat_template": "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>\n{% endfor %}"
            "{% if add_generation_prompt %}a:{% endif %}",
            "eos_token": "</s>",
            "added_tokens_decoder": {"250": {"content": special, "special": True}},
        }
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        shutil.copy(tiny_vocabulary, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return {"template": "tokenizer", "vocabulary": str(folder / tiny_vocabulary.name)}

    return make


def test_samples_and_lines_that_spell_a_special_token_are_left_out(run, chat, tmp_path, prompts_file, capsys):
    said = "".join(line["messages"][1]["content"] for line in run(tmp_path / "plain.jsonl"))
    special = max(set(said) - set(prompts_file.read_text()), key=lambda character: (said.count(character), character))
    former = tmp_path / "former.jsonl"
    lines = [kept("a", f"say {special}", 9.0, 1), kept("b", "say x", 9.0, 1)]
    former.write_text("".join(json.dumps(line._asdict()) + "\n" for line in lines))
    found = run(tmp_path / "out.jsonl", {**chat(special), "former": str(former)})
    contents = [line["messages"][1]["content"] for line in found]
    assert len(contents) > 20 and not any(special in content for content in contents)
    assert "say x" in contents
    assert f"{former}: 1 lines spell a special token and are left out" in capsys.readouterr().err


def test_what_ends_a_response(sampling_config, chat, folders, tmp_path):
    """EOS and the line's end of the template's examples; every end that `generation_config.json` names."""
    policy = tmp_path / "policy"
    shutil.copytree(folders["policy"], policy)
    (policy / "generation_config.json").write_text(json.dumps({"eos_token_id": [77, 78]}))
    opened, template = [], chat("<|user|>")
    for changes in ({}, template, {**template, "policy": str(policy)}):
        config = run_config.parse(sampling_config("rejection_sampling", changes), RejectionConfig)
        opened.append(opening.open_all(config, {"reward": config.reward}))
    plain, with_template, with_ends = opened
    example = with_template.template.example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert plain.ending == (1,) and len(with_template.ending) == 2
    assert with_template.ending == tuple(example.tokens[-2:].tolist()) and with_template.ending[0] == 1
    assert with_template.eos_ids == plain.eos_ids and with_ends.eos_ids == (1, 77, 78)


def test_a_tokenizer_json_in_place_of_sentencepiece(run, sampling_config, folders, tmp_path):
    """The policy's folder as vocabulary; another's is known by its tokens, however the file is written."""
    characters = tokenizers.pre_tokenizers.Split("", "isolated")
    ids = {"<pad>": 0, "</s>": 1} | {chr(code): code for code in range(32, 127)}
    models = {name: tmp_path / name for name in ("talker", "reward", "other")}
    for name, model in models.items():
        shutil.copytree(folders["reward" if name == "other" else name], model)
        next(model.glob("*.model")).unlink()
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=" "))
        tokenizer.pre_tokenizer, tokenizer.decoder = characters, tokenizers.decoders.Fuse()
        tokenizer.add_special_tokens(["<pad>", "</s>"])
        tokenizer.save(str(model / "tokenizer.json"), pretty=name == "talker")
        (model / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        ids = ids | {"a": ids["b"], "b": ids["a"]} if name == "reward" else ids
    changes = {"policy": str(models["talker"]), "vocabulary": str(models["talker"]), "reward": str(models["reward"])}
    lines = run(tmp_path / "one.jsonl", changes)
    assert len(lines) > 30 and all(messages_of(line)[-1]["content"].isascii() for line in lines)

    config = run_config.parse(sampling_config("rejection_sampling", changes), RejectionConfig)
    opened = opening.open_all(config, {"reward": config.reward})
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert opened.eos_ids[0] == 1 and [file.name for file in opened.tokenizer_files] == names
    (models["talker"] / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    config = run_config.parse(
        sampling_config("rejection_sampling", changes | {"vocabulary": str(models["reward"])}), RejectionConfig
    )
    files = opening.open_all(config, {"reward": config.reward}).tokenizer_files
    assert sorted(files) == [models["reward"] / names[0], models["talker"] / names[1]], "what the policy lacks"
    with pytest.raises(InputError, match=r"reward .* is of another vocabulary: tokenizer.json differs from"):
        run(tmp_path / "two.jsonl", changes | {"vocabulary": str(models["reward"]), "reward": str(models["other"])})


def test_fewer_rows_at_a_time_than_samples(run, tmp_path):
    whole, parts = run(tmp_path / "whole.jsonl"), run(tmp_path / "parts.jsonl", {"batch_size": 3})
    assert [line["messages"] for line in parts] == [line["messages"] for line in whole]


def test_what_is_refused(run, tmp_path, tiny_run, tiny_vocabulary, folders, liking_model):
    other = tiny_run("llama", {"model.changes": {"vocab_size": 300, "d_model": 32, "num_layers": 1}})
    reward.save(liking_model(other.model.architecture()), tmp_path / "reward", extra_files=[tiny_vocabulary])
    with pytest.raises(InputError, match=r"reward .* is of another vocabulary: 300 ids, the policy has 256"):
        run(tmp_path / "x.jsonl", {"reward": str(tmp_path / "reward")})
    vocabulary = folders["policy"] / tiny_vocabulary.name
    changed = tmp_path / tiny_vocabulary.name
    changed.write_bytes(vocabulary.read_bytes() + b"\n\x02\x08\x01")
    reward.save(liking_model(tiny_run("llama").model.architecture()), tmp_path / "other", extra_files=[changed])
    with pytest.raises(InputError, match=r"reward .* is of another vocabulary: .*\.model differs from"):
        run(tmp_path / "x.jsonl", {"reward": str(tmp_path / "other")})
    for changes, message in (
        ({"reward": str(folders["policy"])}, "has no reward_head.safetensors; expected a reward model"),
        ({"temperatures": (1.0, 0.0)}, "temperature=0.0 is not above 0"),
        ({"temperatures": (1.0, 1.0)}, "expected each once"),
        ({"samples": 0}, "samples=0; expected at least 1"),
        ({"seed": -1}, "seed=-1; expected 0..4294967295; nearest: 0"),
        ({"safety_gate": 1.5}, "safety_gate=1.5; expected a probability"),
        ({"dtype": "float16"}, "dtype: unknown 'float16'; expected one of float32, bfloat16"),
        ({"new_tokens": 5000}, r"line \d+: a prompt of \d+ tokens and max_new_tokens=5000 exceed"),
        ({"inputs_length": 3}, "40 prompts have more than inputs_length=3 tokens, the first: line 1 .* none is left"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path / "x.jsonl", changes)
    former = tmp_path / "former.jsonl"
    former.write_text(json.dumps(kept("a", "b", 1.0, 1)._asdict()) + '\n{"messages": []}\n')
    with pytest.raises(InputError, match=re.escape(f"{former} line 2: there are no messages")):
        run(tmp_path / "x.jsonl", {"former": str(former)})
    assert not (tmp_path / "x.jsonl").exists()


def test_a_policy_that_never_ends_leaves_nothing(run, tmp_path):
    with pytest.raises(InputError, match="none of 80 samples is a whole response within new_tokens=1"):
        run(tmp_path / "x.jsonl", {"new_tokens": 1, "samples": 1})
