"""python -m gqa.generate --checkpoint=DIR --prompt=TEXT
python -m gqa.generate --checkpoint=DIR --input=prompts.jsonl --output=out.jsonl
python -m gqa.generate --checkpoint=DIR --interactive

Generates text from a checkpoint with a tokenizer (SentencePiece's *.model, or tokenizer.json): T5 reads the prompt as
its input (a prompt may name sentinels: "def f(<extra_id_0>):"), a decoder goes on from it. Without --temperature,
--top_k and --top_p every token is the most likely one.

--input has a JSON object with a "prompt" on every line; --output gets the same objects, in the same order, with
"output" and "num_tokens" (and "error" instead for a line that is none). Interrupted and started again, it goes on.
--interactive streams a conversation: a decoder sees all of it, and an empty line starts over.

--weights and --cache store kernels, keys and values in fewer bits (python -m gqa.evaluate says what that costs). With
--draft a cheaper checkpoint proposes tokens, a version with fewer key/value heads, say: the outputs are the model's own
(drawn ones by distribution), and come sooner where the draft is cheap and most of its proposals are kept.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gqa import command_line
from gqa.decode.journal import append, open_journal
from gqa.errors import InputError

CHUNK = 8  # tokens streamed at a time


def main() -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m gqa.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a checkpoint, or WORKDIR/model")
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt; its output is streamed")
    parser.add_argument("--input", type=Path, metavar="FILE", help="prompts, a JSON object a line")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the outputs of --input go; must not exist")
    parser.add_argument("--interactive", action="store_true", help="a conversation in the terminal")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="most new tokens of a prompt (default: 128)")
    parser.add_argument("--temperature", type=float, help="divides the logits (default: 1 with --top_k or --top_p)")
    parser.add_argument("--top_k", type=int, help="draw from the K most likely tokens")
    parser.add_argument("--top_p", type=float, help="draw from the fewest tokens that hold this probability")
    parser.add_argument("--beams", type=int, default=1, help="beam search with as many beams (default: 1, none)")
    parser.add_argument("--length_penalty", type=float, help="of --beams: above 0 favours long outputs (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts of --input decoded at a time (default: 8)")
    parser.add_argument("--cache", metavar="TYPE", help="int8: keys and values in int8 (default: the compute type)")
    parser.add_argument("--weights", metavar="TYPE", help="int8, int4 or nf4: kernels in few bits (default: none)")
    parser.add_argument("--draft", type=Path, metavar="DIR", help="a cheaper checkpoint that proposes tokens")
    parser.add_argument("--draft_tokens", type=int, help="tokens that --draft proposes at a time (default: 4)")
    args = command_line.parse_arguments(parser)
    _check_arguments(args)
    from gqa.decode import batches
    from gqa.decode.sampling import sampling

    drawn = None
    if (args.temperature, args.top_k, args.top_p) != (None, None, None):
        drawn = sampling(1.0 if args.temperature is None else args.temperature, args.top_k, args.top_p)
    settings = batches.Settings(
        max_new_tokens=args.max_new_tokens,
        eos_ids=(),
        sampling=drawn,
        seed=args.seed,
        num_beams=args.beams,
        length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
        batch_size=args.batch_size,
        cache_dtype=args.cache,
    )
    draft_tokens = 4 if args.draft_tokens is None else args.draft_tokens
    generator = _Generator(args.checkpoint, settings, args.weights, args.draft, draft_tokens)
    if args.prompt is not None:
        generator.print_stream(generator.tokens(args.prompt))
    elif args.interactive:
        _converse(generator)
    else:
        _generate_file(generator, args.input, args.output)


def _check_arguments(args: argparse.Namespace) -> None:
    modes = [args.prompt is not None, args.input is not None, args.interactive]
    if sum(modes) != 1:
        raise InputError("expected one of --prompt=TEXT, --input=FILE with --output=FILE, and --interactive")
    if (args.input is None) != (args.output is None):
        raise InputError("--input and --output go together; expected both")
    if args.length_penalty is not None and args.beams <= 1:
        raise InputError(f"--length_penalty={args.length_penalty} is of beam search; add --beams=4, say")
    if args.draft_tokens is not None and args.draft is None:
        raise InputError(f"--draft_tokens={args.draft_tokens} is of speculative decoding; add --draft=DIR")
    if args.draft is not None and args.beams > 1:
        raise InputError(f"--beams={args.beams} with --draft; expected one of them")
    if args.max_new_tokens < 1:
        raise InputError(f"--max_new_tokens={args.max_new_tokens} is below 1; expected 1 or more")
    if args.output is None:
        return
    command_line.check_new_file(args.output)
    if not args.input.is_file():
        raise InputError(f"--input={args.input} is not a file; expected one with a JSON object a line")


class _Generator:
    """A checkpoint ready to decode: text in, text out."""

    def __init__(self, checkpoint: Path, settings, weights: str | None, draft: Path | None, draft_tokens: int):
        import jax

        from gqa import checkpoints
        from gqa.checkpoints.source import identity
        from gqa.decode import batches
        from gqa.decode.speculative import check_draft
        from gqa.evaluation.checkpoint_text import CheckpointText
        from gqa.models.llama import LlamaConfig
        from gqa.models.quantize import check_weights, quantize

        if weights is not None:
            check_weights(weights)
        # XLA:CPU multiplies bfloat16 several times slower than float32.
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        choices = dict(dtype=dtype, param_dtype=dtype, scan_layers=False, remat="none", dropout_rate=0.0)
        contents = checkpoints.read(checkpoint, **choices)
        self.batches, self.config = batches, contents.config
        self.identity = identity([*contents.weight_files, *contents.companions])
        self.is_decoder = isinstance(contents.config, LlamaConfig)
        self.side = CheckpointText(checkpoint, contents)
        self.vocabulary, self.bos_ids, self.eos_ids = self.side.vocabulary, self.side.bos_ids, self.side.eos_ids
        self.settings = dataclasses.replace(settings, eos_ids=self.eos_ids)
        # What outputs depend on: not the batch, which may turn out too large.
        settings = repr(dataclasses.replace(self.settings, batch_size=1))
        self.outputs = {"settings": settings, "weights": weights, "draft": None}

        def load(directory: Path):
            model = checkpoints.load(directory, **choices)
            return (model if weights is None else quantize(model, weights)).unstacked()

        self.draft = None
        if draft is not None:
            draft_contents = checkpoints.read(draft, **choices)
            check_draft(contents.config, draft_contents.config, draft_tokens)
            _check_same_tokenizer(self.vocabulary.path, draft, draft_contents.companions)
            self.outputs["draft"] = [identity(draft_contents.weight_files), draft_tokens]
            self.draft = batches.Draft(load(draft), draft_tokens)
        self.model = load(checkpoint)

    def kept(self) -> str:
        """What the draft was worth so far, to be added to a line."""
        if self.draft is None or not self.draft.num_proposed:
            return ""
        share = self.draft.num_accepted / self.draft.num_proposed
        return f", {share:.0%} of the draft's {self.draft.num_proposed} tokens kept"

    def tokens(self, prompt: str) -> list[int]:
        """What the model reads for `prompt`; raises `InputError` where it cannot."""
        tokens = self.side.tokens(prompt)
        self.batches.check_prompt(self.config, tokens, self.settings.max_new_tokens)
        if self.draft is not None:
            self.batches.check_draft_prompt(self.draft.model.config, tokens, self.settings.max_new_tokens)
        return tokens

    def text(self, prompt: list[int], new: list[int]) -> str:
        """The text of new tokens."""
        return self.side.text(prompt, new)

    def print_stream(self, prompt: list[int]) -> list[int]:
        """Prints the output as it comes, and how fast; returns its tokens."""
        start, first, new, printed = time.perf_counter(), None, [], 0
        for chunk in self._chunks(prompt):
            first = first or time.perf_counter()
            new += chunk
            # A character may lack bytes that are still to come.
            text = self.text(prompt, new).rstrip("\ufffd")
            print(text[printed:], end="", flush=True)
            printed = max(printed, len(text))
        print(self.text(prompt, new)[printed:], flush=True)
        seconds = time.perf_counter() - start
        to_first = f", the first after {first - start:.2f} s" if self._streams() else ""
        print(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s{to_first}{self.kept()}", file=sys.stderr)
        return new

    def _chunks(self, prompt: list[int]) -> Iterator[list[int]]:
        if self._streams():
            return self.batches.stream(self.model, prompt, self.settings, CHUNK)
        return (new for _, new in self.all_tokens({0: prompt}))

    def _streams(self) -> bool:
        return self.settings.num_beams == 1 and self.draft is None

    def all_tokens(self, prompts: Mapping[int, list[int]]) -> Iterator[tuple[int, list[int]]]:
        """New tokens of every prompt with its number, as they finish."""
        return self.batches.generate_all(self.model, prompts, self.settings, self.draft)


def _check_same_tokenizer(vocabulary: Path, draft: Path, companions: Sequence[Path]) -> None:
    """Raises `InputError` where the draft has a tokenizer that is not the model's."""
    from gqa.data.tokenizer_json import FILE, tokenizer_file

    if not any(file.suffix == ".model" or file.name == FILE for file in companions):
        return
    file = tokenizer_file(draft, companions)
    # Of two kinds, what the model has of the draft's.
    ours = vocabulary if file.suffix == vocabulary.suffix else vocabulary.with_name(file.name)
    if ours.is_file() and file.read_bytes() != ours.read_bytes():
        raise InputError(f"--draft={draft}: {file.name} is another vocabulary than {ours}; expected the same")


def _converse(generator: _Generator) -> None:
    history: list[int] = []
    prompt_text = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt_text)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            print(f"error: the line is no UTF-8: {error.reason}", file=sys.stderr)
            continue
        if not line:
            history = []
            continue
        try:
            if not generator.is_decoder:
                generator.print_stream(generator.tokens(line))
                continue
            turn = generator.tokens(line + "\n")
            tokens = [*history, *(turn[len(generator.bos_ids) :] if history else turn)]
            new = generator.print_stream(tokens)
            history = [*tokens, *(token for token in new if token not in generator.eos_ids)]
        except InputError as error:
            print(f"error: {error}" + ("; an empty line starts over" if history else ""), file=sys.stderr)


class _Line(NamedTuple):
    """A line of the input file."""

    fields: dict[str, Any]
    tokens: list[int]
    error: str | None


def _read_line(number: int, line: bytes, tokens_of: Callable[[str], list[int]]) -> _Line:
    fields = None
    try:
        fields = json.loads(line.decode("utf-8"))
        if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
            raise InputError('expected a JSON object with a "prompt" that is text')
        return _Line(fields, tokens_of(fields["prompt"]), None)
    except UnicodeDecodeError as error:
        message = f"byte {error.start + 1} is no UTF-8"
    except json.JSONDecodeError as error:
        message = f"no JSON: {error.msg} at character {error.pos + 1}"
    except (InputError, RecursionError, UnicodeEncodeError) as error:
        message = str(error)
    except ValueError as error:  # a number of thousands of digits
        message = f"no JSON: {error}"
    return _Line(fields if isinstance(fields, dict) else {}, [], f"line {number}: {message}")


def _generate_file(generator: _Generator, source: Path, output: Path) -> None:
    """Reads prompts, writes outputs: by line number into a journal as they finish, and in order at the end."""
    from tqdm import tqdm

    content = source.read_bytes()
    lines = {
        number: _read_line(number, line, generator.tokens) for number, line in enumerate(content.splitlines(), start=1)
    }
    if not lines:
        raise InputError(f"--input={source} is empty; expected a JSON object a line")
    bad = [line.error for line in lines.values() if line.error]
    for message in bad:
        print(f"{source}: {message}", file=sys.stderr)
    identity = {
        "input": hashlib.sha256(content).hexdigest(),
        "checkpoint": generator.identity,
        **generator.outputs,
    }
    partial = output.with_name(f".{output.name}.partial")
    with open(partial, "ab+") as journal:
        done = open_journal(journal, partial, identity)
        prompts = {number: line.tokens for number, line in lines.items() if line.error is None and number not in done}
        start, first, num_tokens = time.perf_counter(), None, 0
        bar = tqdm(total=len(lines) - len(bad), initial=len(done), unit="prompt", delay=1, dynamic_ncols=True)
        with bar:
            for number, new in generator.all_tokens(prompts):
                append(journal, number, new)
                first = first or time.perf_counter()
                done[number] = new
                num_tokens += len(new)
                bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                bar.update()
        seconds = time.perf_counter() - start
        finished = partial.with_suffix(".finished")
        # Halves of surrogate pairs, which JSON may spell and UTF-8 has none of, become question marks.
        with open(finished, "w", encoding="utf-8", errors="replace") as file:
            for number, line in lines.items():
                if line.error:
                    entry = line.fields | {"error": line.error}
                else:
                    text = generator.text(line.tokens, done[number])
                    entry = line.fields | {"output": text, "num_tokens": len(done[number])}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(finished, output)
        partial.unlink()
    to_first = f", the first prompt done after {first - start:.2f} s" if first else ""
    rate = f"{num_tokens / seconds:.1f} tokens/s{to_first}{generator.kept()}"
    print(f"wrote {output}: {len(prompts)} prompts, {num_tokens} tokens, {rate}")
    if bad:
        raise InputError(f"{len(bad)} of {len(lines)} lines of {source} are bad, the rest is done; first: {bad[0]}")


if __name__ == "__main__":
    command_line.run(main)
