"""What each template makes of a conversation, token by token; `*` before a token says that it is trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from gqa.command_line import run
from gqa.data import templates
from gqa.data.conversations import cut, last_turn_only, messages_of
from gqa.data.templates import Template, Unusable, check, marked
from gqa.data.tokenizer_json import open_vocabulary
from gqa.data.vocabulary import Vocabulary
from gqa.errors import InputError

VOCABULARY = Path(__file__).parents[2] / "assets" / "vocabulary" / "python_4096.model"
SYSTEM = {"role": "system", "content": "S"}
ONE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TWO = [*ONE, {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' '  + m['content'] + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
SPECIAL = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "added_tokens_decoder": {
        str(91 + i): {"content": name, "special": True} for i, name in enumerate(("<|im_start|>", "<|im_end|>"))
    },
}


def pieces(tokens, vocabulary):
    names = {91: "<|im_start|>", 92: "<|im_end|>"}
    model = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary.path))
    return [
        names[token] if token in names else model.IdToPiece(token).replace("\n", "\\n") for token in map(int, tokens)
    ]


def table(example, vocabulary) -> str:
    marks = ("*" if trained else "" for trained in example.trained)
    return " ".join(mark + piece for mark, piece in zip(marks, pieces(example.tokens, vocabulary), strict=True))


@pytest.fixture
def tokenizer(chat_vocabulary, tmp_path):
    """A function (chat_template, changes of tokenizer_config.json) -> the template beside a copy of the vocabulary."""

    def make(source: str, **changes) -> Template:
        (tmp_path / "tokenizer.model").write_bytes(chat_vocabulary.path.read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **SPECIAL, **changes}))
        return Template("tokenizer", Vocabulary(tmp_path / "tokenizer.model", foreign=True))

    return make


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        (
            "alpaca",
            [SYSTEM, *ONE],
            r"<s> ▁ S \n \n ### ▁ Instruction: \n h i \n \n ### ▁ Response: *y *o *</s>",
        ),
        (
            "alpaca",
            [SYSTEM, *TWO],
            r"<s> ▁ S \n \n ### ▁ Instruction: \n h i \n \n ### ▁ Response: *y *o *</s> "
            r"▁ \n \n ### ▁ Instruction: \n a ▁ b \n \n ### ▁ Response: *c *</s>",
        ),
        (
            "alpaca",
            [SYSTEM, {**ONE[0], "input": "x"}, ONE[1]],
            r"<s> ▁ S \n \n ### ▁ Instruction: \n h i \n \n ### ▁ Input: \n x \n \n ### ▁ Response: *y *o *</s>",
        ),
        (
            "openbezoar",
            [SYSTEM, *ONE],
            r"<s> ▁ ### ▁ System: \n S \n \n ### ▁ Instruction: \n h i \n \n ### ▁ Response: \n *y *o *</s>",
        ),
        (
            "openbezoar",
            [SYSTEM, {**ONE[0], "input": "x"}, *TWO[1:]],
            r"<s> ▁ ### ▁ System: \n S \n \n ### ▁ Instruction: \n h i \n \n x \n \n ### ▁ Response: \n *y *o *</s> "
            r"▁ \n \n ### ▁ Instruction: \n a ▁ b \n \n ### ▁ Response: \n *c *</s>",
        ),
        ("human_bot", ONE, r"<s> ▁ <human>: ▁ h i \n <bot>: *▁ *y *o *\n *<human>: *</s>"),
        (
            "human_bot",
            [SYSTEM, *TWO],
            r"<s> ▁ S \n <human>: ▁ h i \n <bot>: *▁ *y *o *\n *<human>: ▁ a ▁ b \n <bot>: *▁ *c *\n *<human>: *</s>",
        ),
        ("llama2", ONE, "<s> ▁ [INST] ▁ h i ▁ [/INST] *▁ *y *o *▁ *</s>"),
        (
            "llama2",
            [SYSTEM, *TWO],
            r"<s> ▁ [INST] ▁ <<SYS>> \n S \n <</SYS>> \n \n h i ▁ [/INST] *▁ *y *o *▁ *</s> "
            "<s> ▁ [INST] ▁ a ▁ b ▁ [/INST] *▁ *c *▁ *</s>",
        ),
        # The loss of earlier turns left out, as ghost attention wants it.
        (
            "llama2",
            last_turn_only(TWO),
            "<s> ▁ [INST] ▁ h i ▁ [/INST] ▁ y o ▁ </s> <s> ▁ [INST] ▁ a ▁ b ▁ [/INST] *▁ *c *▁ *</s>",
        ),
    ],
)
def test_tokens_and_loss_of_a_template(chat_vocabulary, name, messages, expected):
    template = Template(name, chat_vocabulary)
    example = template.example(messages)
    assert table(example, chat_vocabulary) == expected
    # Each response is predicted from just the tokens that its prompt has.
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = template.prompt(messages[:number])
            assert example.tokens[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize(
    ("source", "eos_ids", "expected"),
    [
        (CHATML, {92}, "<|im_end|> ▁ \\n"),
        (CHATML, {2, 92}, "<|im_end|> ▁ \\n"),
        (CHATML, {2}, "</s>"),  # which it never writes
        (CHATML, {75, 70}, 70),
        (CHATML, set(), ""),
        (LLAMA2, {2}, "</s>"),
        ("{{ raise_exception('no') }}", {2}, "</s>"),
    ],
)
def test_what_ends_an_example(tokenizer, source, eos_ids, expected):
    template = tokenizer(source)
    assert template.eos_id == 2
    found = template.ending(eos_ids)
    assert found == [expected] or " ".join(pieces(found, template.vocabulary)) == expected


def test_a_tokenizers_own_template(tokenizer):
    """ChatML, whose special tokens follow the vocabulary's, and Llama 2's, whose spelling gives ours token by token."""
    template = tokenizer(CHATML)
    assert template.num_ids == 93
    assert table(template.example([SYSTEM, *TWO]), template.vocabulary) == (
        r"<s> <|im_start|> ▁ s y s t e m \n S <|im_end|> ▁ \n <|im_start|> ▁ u s e r \n h i <|im_end|> ▁ \n "
        r"<|im_start|> ▁ a s s i s t a n t \n *y *o *<|im_end|> *▁ *\n <|im_start|> ▁ u s e r \n a ▁ b <|im_end|> ▁ \n "
        r"<|im_start|> ▁ a s s i s t a n t \n *c *<|im_end|> *▁ *\n"
    )
    prompt = template.prompt([*ONE, TWO[2]])
    assert template.example(TWO).tokens[: len(prompt)].tolist() == prompt
    ours, theirs = Template("llama2", template.vocabulary).example(TWO), tokenizer(LLAMA2).example(TWO)
    assert (theirs.tokens.tolist(), theirs.trained.tolist()) == (ours.tokens.tolist(), ours.trained.tolist())
    # A response always ends: where the template writes no special token, EOS does.
    plain = tokenizer("{% for m in messages %}{{ m.role[0] + ':' + m.content + ';' }}{% endfor %}")
    assert table(plain.example(ONE), plain.vocabulary) == "▁ u : h i ; *a *: *y *o *; *</s>"
    padded = tokenizer("{% for m in messages %}{{ pad_token + m.content }}{% endfor %}", pad_token="</s>")
    assert table(padded.example(ONE), padded.vocabulary) == "</s> ▁ h i *</s> *▁ *y *o"
    # A prompt is what the template makes of it, also where it leaves out what was said before.
    source = "{% for m in messages if m.role == 'user' or m == messages[-1] %}{{ m.content + ';' }}{% endfor %}"
    forgetful = tokenizer(source)
    assert forgetful.vocabulary.decode(forgetful.prompt(TWO[:3])) == "hi;a b;"


def test_a_tokenizers_own_template_is_read_whole_by_a_tokenizer_json(tmp_path):
    """As transformers does: special tokens take the blanks beside them, and the first text alone gets a space."""
    tokenizers = pytest.importorskip("tokenizers")
    characters = {character: i for i, character in enumerate(["<unk>", *"▁hiyoabc"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(characters, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    marks = [tokenizers.AddedToken(f"<|{name}|>", rstrip=True) for name in ("user", "assistant", "end")]
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": source}))
    template = Template("tokenizer", open_vocabulary(tmp_path, foreign=True))
    example = template.example(TWO)
    rendered = "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in TWO)
    assert example.tokens.tolist() == tokenizer.encode(rendered).ids
    found = zip(example.tokens.tolist(), example.trained.tolist(), strict=True)
    assert " ".join("*" * trained + tokenizer.id_to_token(number) for number, trained in found) == (
        "<|user|> h i <|end|> <|assistant|> *y *o *<|end|> <|user|> a ▁ b <|end|> <|assistant|> *c *<|end|>"
    )
    assert template.prompt([*ONE, TWO[2]]) == example.tokens[:-2].tolist()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only in Latin') }}", "refuses the conversation: only in Latin"),
        ("{{ messages.__class__.__mro__ }}", "refuses the conversation: access to attribute '__class__'"),
        ("{{ 'a' * 10000000000 }}", r"refuses the conversation: \* of other than two numbers"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{% for m in messages %}{{ m.content", "the chat_template is no Jinja"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "train on conversations of one turn",
        ),
        ({"no": "text"}, "has no chat_template in tokenizer_config.json and no chat_template.jinja"),
    ],
)
def test_templates_of_strangers_are_data(tokenizer, source, message):
    with pytest.raises(InputError, match=message):
        tokenizer(source).example(TWO)


def test_a_text_that_spells_a_special_token(tokenizer, chat_vocabulary):
    """In our templates it is text; in a tokenizer's, which is text with special tokens in it, it is refused."""
    spelling = [{"role": "user", "content": "<s>"}, ONE[1]]
    assert 1 not in Template("llama2", chat_vocabulary).example(spelling).tokens[1:].tolist()
    with pytest.raises(Unusable, match="message 1 spells the special token '<s>'") as caught:
        tokenizer(CHATML).example(spelling)
    assert caught.value.reason == "special token in a text"


def test_default_words_of_alpaca_and_openbezoar(chat_vocabulary):
    def words(name, messages):
        return marked(Template(name, chat_vocabulary).example(messages), chat_vocabulary)

    assert words("alpaca", ONE) == (
        "‹<s>›Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nhi\n\n### Response:⟦yo‹</s>›⟧"
    )
    row = {"instruction": "hi", "input": "x", "output": "yo"}
    assert words("alpaca", messages_of(row)) == (
        "‹<s>›Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nhi\n\n### Input:\nx\n\n### Response:⟦yo‹</s>›⟧"
    )
    assert words("openbezoar", messages_of(row | {"system": "S"})) == (
        "‹<s>›### System:\nS\n\n### Instruction:\nhi\n\nx\n\n### Response:\n⟦yo‹</s>›⟧"
    )


def test_a_vocabulary_without_bos_and_without_a_space_before_texts():
    vocabulary = Vocabulary(VOCABULARY, foreign=True)
    example = Template("human_bot", vocabulary).example(ONE)
    assert marked(example, vocabulary) == "<human>: hi\n<bot>:⟦ yo\n<human>:‹</s>›⟧"
    assert vocabulary.encode("xy", continued=True) == vocabulary.encode("xy")


def test_truncation(chat_vocabulary):
    example = Template("llama2", chat_vocabulary).example(TWO)
    assert table(cut(example, 11), chat_vocabulary) == "<s> ▁ [INST] ▁ h i ▁ [/INST] *▁ *y *o"
    assert len(cut(example, 9).tokens) == 9
    with pytest.raises(Unusable, match="the prompt has 8 tokens; expected fewer than 8"):
        cut(example, 8)
    assert len(cut(example, 1000).tokens) == len(example.tokens)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages"),
        ("hi", "there are no messages"),
        ([{"role": "user"}], "message 1 has no role and content"),
        ([{"role": "usr", "content": ""}], "message 1 has role 'usr'; .* nearest: user"),
        ([{"role": "user", "content": 3}], "message 1 has a int as content"),
        ([*ONE, SYSTEM, *ONE], "message 3 is a system message; expected it first"),
        ([*ONE, ONE[1]], "message 3 is of role assistant; expected user"),
        ([ONE[1]], "message 1 is of role assistant; expected user"),
        ([SYSTEM], "a system message alone"),
        ([ONE[0], {"role": "assistant", "content": " \n"}], "message 2 is an empty response"),
    ],
)
def test_conversations_that_are_none(messages, message):
    with pytest.raises(InputError, match=message):
        check(messages)


def test_names_of_templates(chat_vocabulary):
    with pytest.raises(InputError, match=r"template='lama2'; expected one of alpaca, .*; nearest: llama2"):
        Template("lama2", chat_vocabulary)
    with pytest.raises(InputError, match="has no chat_template"):
        Template("tokenizer", chat_vocabulary)


def test_show(chat_vocabulary, tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": TWO}) + "\n\n" + json.dumps({"instruction": "hi"}))

    def show(number):
        arguments = ["--template=llama2", f"--input={file}", f"--vocabulary={chat_vocabulary.path}"]
        monkeypatch.setattr("sys.argv", ["templates.py", *arguments, f"--number={number}"])
        with pytest.raises(SystemExit) as stopped:
            run(templates.main)
        return stopped.value.code, capsys.readouterr()

    code, shown = show(1)
    assert code == 0 and shown.out == (
        "line 1: 26 tokens, 9 trained\n‹<s>›[INST] hi [/INST]⟦ yo ‹</s>›⟧‹<s>›[INST] a b [/INST]⟦ c ‹</s>›⟧\n\n"
    )
    code, shown = show(2)
    assert code == 2
    assert shown.err == (
        f"error: {file} line 3: there is no 'output' among instruction; expected messages, or instruction and output\n"
    )
    file.write_text("")
    code, shown = show(1)
    assert code == 2 and shown.err == f"error: {file} is empty; expected conversations, a JSON object a line\n"


def test_characters_of_several_tokens_are_shown():
    vocabulary = Vocabulary(VOCABULARY, foreign=True)
    example = Template("llama2", vocabulary).example(
        [{**ONE[0], "content": "naïve 中文"}, {**ONE[1], "content": "中 é"}]
    )
    assert "naïve 中文 [/INST]⟦ 中 é" in marked(example, vocabulary)


def test_trained_tokens_are_never_the_first(chat_vocabulary):
    for name in templates.TEMPLATES[:-1]:
        example = Template(name, chat_vocabulary).example(ONE)
        assert not example.trained[0] and example.trained.dtype == bool and example.tokens.dtype == np.int32


@pytest.mark.parametrize("name", ["alpaca", "openbezoar", "human_bot", "llama2", "tokenizer"])
def test_a_response_without_what_its_template_adds(chat_vocabulary, tokenizer, name):
    """What follows the prompt, read as a response, is the assistant's text again; ids of nothing are passed over."""
    template = tokenizer(CHATML) if name == "tokenizer" else Template(name, chat_vocabulary)
    whole, prompt = template.example(TWO).tokens.tolist(), template.prompt(TWO[:-1])
    assert whole[: len(prompt)] == prompt
    assert template.response([*whole[len(prompt) :], 149]) == "c"
