"""The checkpoints of post-training by sampling, opened together: all of one vocabulary."""

from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from gqa import checkpoints
from gqa.checkpoints import reward
from gqa.checkpoints.source import Contents, special_ids
from gqa.data import tokenizer_json
from gqa.data.templates import Template
from gqa.data.tokenizer_json import TokenizerJson
from gqa.data.vocabulary import Vocabulary
from gqa.decode.generate import check_lengths
from gqa.errors import InputError
from gqa.models.llama import Llama, LlamaConfig
from gqa.models.reward import RewardModel
from gqa.posttraining.config import InstructionsConfig, SampledConfig
from gqa.posttraining.prompts import Prompt


class Opened(NamedTuple):
    """What was found in the folders, before any weight is read."""

    template: Template
    policy: Contents
    eos_ids: tuple[int, ...]  # tokens that end a response
    ending: tuple[int, ...]  # what stands at the end of a response that reward models have read: EOS, and what follows

    @property
    def token_ids(self) -> dict[str, int | list[int]]:
        """For the policy's `config.json`."""
        return self.policy.token_ids or self.template.vocabulary.token_ids

    @property
    def tokenizer_files(self) -> list[Path]:
        """What a copy of the policy takes along."""
        files, vocabulary = self.policy.companions, self.template.vocabulary
        if _tokenizers(self.policy, vocabulary):
            return files
        names = {file.name for file in files}
        return [*files, *(file for file in vocabulary.files if file.name not in names)]


def run_choices(config: SampledConfig | InstructionsConfig) -> dict:
    """What the checkpoints do not say; parameters are float32."""
    return dict(dtype=config.dtype, param_dtype="float32", scan_layers=False, remat="none", dropout_rate=0.0)


def open_all(config: SampledConfig, others: dict[str, str | None]) -> Opened:
    """Checks the policy and `others` (name of the config's field -> folder or `None`) against the vocabulary.

    Raises `InputError` for a folder that is no decoder's or of another vocabulary, no reward model where one is needed,
    and where nothing ends a response.
    """
    opened = open_model("policy", config.policy, config.template, config.vocabulary, config)
    policy, vocabulary = opened.policy, opened.template.vocabulary
    if not opened.eos_ids:
        raise InputError(f"policy {config.policy} and {vocabulary.path} name no EOS, which ends a response")
    for name, folder in others.items():
        if folder is None:
            continue
        if name != "reference":
            check_reward(name, folder)
        other = _open(name, folder, config, vocabulary).config
        if other.vocab_size != policy.config.vocab_size:
            raise InputError(
                f"{name} {folder} is of another vocabulary: {other.vocab_size} ids, the policy has "
                f"{policy.config.vocab_size}; expected one tuned from the same model"
            )
        if other.max_position < policy.config.max_position:
            check_lengths(other, config.inputs_length, config.new_tokens)
    return opened


def open_model(
    name: str, folder: str, template: str, vocabulary: str, config: SampledConfig | InstructionsConfig
) -> Opened:
    """Checks one checkpoint, the `name` of a config, against its template and vocabulary; errors as of `open_all`."""
    tokens = tokenizer_json.open_vocabulary(vocabulary, foreign=True)
    opened = Template(template, tokens)
    contents = _open(name, folder, config, tokens)
    if opened.num_ids > contents.config.vocab_size:
        raise InputError(
            f"vocabulary {vocabulary} has {opened.num_ids} ids, {name} {folder} {contents.config.vocab_size}; "
            f"expected the {name}'s own"
        )
    eos_ids = {*special_ids(Path(folder), contents).get("eos_token_id", []), tokens.eos_id, opened.eos_id} - {-1}
    return Opened(opened, contents, tuple(sorted(eos_ids)), tuple(opened.ending(eos_ids)))


def check_reward(name: str, folder: str) -> None:
    """Raises `InputError` for a folder, the `name` of a config, that is no reward model's."""
    if not (Path(folder) / reward.HEAD).is_file():
        raise InputError(f"{name} {folder} has no {reward.HEAD}; expected a reward model that gqa.train wrote")


def load_policy(folder: str, config: SampledConfig | InstructionsConfig, mesh: Mesh | None = None) -> Llama:
    """The policy, or a reference."""
    return checkpoints.load(folder, mesh=mesh, **run_choices(config))


def load_reward(
    folder: str | None, config: SampledConfig | InstructionsConfig, mesh: Mesh | None = None
) -> RewardModel | None:
    """A reward model; `None` where there is none."""
    return None if folder is None else reward.load(Path(folder), mesh=mesh, **run_choices(config))


def prompt_length(prompts: list[Prompt], config: SampledConfig, opened: Opened) -> int:
    """The one length that all prompts are padded to: that of the longest, up to a multiple of 8.

    Raises `InputError`, with its line, for a prompt whose response does not fit the policy's positions.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    try:
        check_lengths(opened.policy.config, len(longest.tokens), config.new_tokens)
    except InputError as error:
        raise InputError(f"{config.prompts} line {longest.line}: {error}") from None
    return -(-len(longest.tokens) // 8) * 8


def _open(
    name: str, folder: str, config: SampledConfig | InstructionsConfig, vocabulary: Vocabulary | TokenizerJson
) -> Contents:
    contents = checkpoints.read(folder, **run_choices(config))
    if not isinstance(contents.config, LlamaConfig):
        raise InputError(f"{name} {folder} is an encoder-decoder; expected a decoder")
    for file in _tokenizers(contents, vocabulary):
        if not _same(file, vocabulary):
            raise InputError(f"{name} {folder} is of another vocabulary: {file.name} differs from {vocabulary.path}")
    return contents


def _tokenizers(contents: Contents, vocabulary: Vocabulary | TokenizerJson) -> list[Path]:
    """A checkpoint's tokenizers of the vocabulary's kind."""
    files = contents.companions or []
    if isinstance(vocabulary, TokenizerJson):
        return [file for file in files if file.name == tokenizer_json.FILE]
    return [file for file in files if file.suffix == ".model"]


def _same(file: Path, vocabulary: Vocabulary | TokenizerJson) -> bool:
    """Whether a tokenizer is the vocabulary; of a `tokenizer.json` the tokens count, which others write differently."""
    if file.read_bytes() == vocabulary.path.read_bytes():
        return True
    return isinstance(vocabulary, TokenizerJson) and TokenizerJson(file).ids == vocabulary.ids
