"""A run as frozen, validated dataclasses: all that a config file may say, checked before anything is allocated."""

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from gqa import checkpoints, models
from gqa.adapters.lora import LoRAConfig
from gqa.command_line import build, coerce
from gqa.data import tokenizer_json
from gqa.data.examples import DECODER_TASKS, TASKS
from gqa.data.mixtures import MixtureConfig, prepare_mixture
from gqa.data.prepare import Manifest, PrepareSpec, default_directory, prepare, read_manifest
from gqa.errors import InputError, one_of
from gqa.models.heads import divisors
from gqa.models.stacks import REMAT_POLICIES
from gqa.sharding import MESH_AXES, RULES, MeshConfig
from gqa.training.optimizer import OptimizerConfig
from gqa.training.preferences import DPOConfig, RewardConfig

DTYPES = ("float32", "bfloat16")
Run = typing.TypeVar("Run")


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """Which model is trained, and how it computes."""

    size: str | None  # ready-made architecture to train from scratch, such as t5_1_1_base …
    changes: Mapping[str, Any]  # … fields of that architecture to change
    checkpoint: str | None  # folder of a (converted) checkpoint to go on from; beside a size: it must be of that one
    dropout_rate: float  # 0 in pre-training and uptraining, 0.1 in fine-tuning (GQA §3.1)
    dtype: str  # of activations and matrix products: float32 or bfloat16
    param_dtype: str  # of the parameters; float32 masters unless memory forbids
    scan_layers: bool  # scan over stacked layers (compile time independent of depth) or unroll them
    remat: str  # what the backward pass recomputes: none, dots, full

    def __post_init__(self):
        if self.size is None and self.checkpoint is None:
            raise InputError("model.size (from scratch) or model.checkpoint (go on from a folder): set one of them")
        if self.size is None and self.changes:
            raise InputError("model.changes belongs to model.size; a checkpoint has the architecture it has")
        if not 0 <= self.dropout_rate < 1:
            raise InputError(f"model.dropout_rate={self.dropout_rate}; expected a number in [0, 1), such as 0.1")
        one_of("model.dtype", self.dtype, DTYPES)
        one_of("model.param_dtype", self.param_dtype, DTYPES)
        one_of("model.remat", self.remat, REMAT_POLICIES)

    def architecture(self) -> models.ModelConfig:
        """The model's configuration, read from the checkpoint or from the ready-made sizes.

        Raises `InputError` where both are given and differ.
        """
        found = None
        if self.checkpoint is not None:
            found = checkpoints.read_config(self.checkpoint, **self.run_choices())
        if self.size is None:
            return found
        base = models.size(self.size)
        hints = typing.get_type_hints(type(base))
        for name, value in self.changes.items():
            one_of("model.changes", name, hints)
            coerce(hints[name], value, f"model.changes.{name}")
        wanted = dataclasses.replace(base, **{**self.changes, **self.run_choices()})
        if found is None:
            return wanted
        if type(found) is not type(wanted):
            raise InputError(f"model.checkpoint={self.checkpoint} is no {self.size}; name that one, or model.size=None")
        for field in dataclasses.fields(wanted):
            theirs, ours = (getattr(each, field.name) for each in (found, wanted))
            if theirs != ours:
                raise InputError(
                    f"model.checkpoint={self.checkpoint} has {field.name}={theirs}, model.size={self.size} with "
                    f"model.changes {ours}; expected the same"
                )
        return wanted

    def run_choices(self) -> dict[str, Any]:
        """Fields of the architecture that are a choice of the run, not of the checkpoint."""
        return {name: getattr(self, name) for name in ("dropout_rate", "dtype", "param_dtype", "scan_layers", "remat")}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int | None  # optimizer steps of this run; None where `uptrain` says it
    batch_size: int  # rows a step, over all devices
    accumulation: int  # micro-batches a step; the update is that of the whole batch
    seed: int  # of initialisation, epoch order, noise and dropout
    z_loss: float  # coefficient of log(Z)^2 (T5: 1e-4)
    log_every: int  # steps between lines of metrics
    eval_every: int  # steps between held-out losses; the last step always has one
    eval_examples: int  # held-out rows scored
    save_every: int  # steps between checkpoints; the last step always has one
    keep: int  # newest checkpoints kept; the one with the least held-out loss is kept as well
    keep_minutes: float | None = None  # of every so many minutes one more checkpoint is kept; None: none
    mirror: str | None = None  # folder of this run's own that checkpoints are copied to, and come back from; None: none
    skip_above: float | None = None  # a step's update is left out where loss or gradient norm is so many times its mean
    roll_back_after: int | None = None  # updates left out in a row, after which the run goes back and passes them over
    peak_tflops: float | None = None  # of one device, that MFU is measured against; None: as its maker says

    def __post_init__(self):
        for name, least, example in (
            ("keep_minutes", 0, "60"),
            ("skip_above", 1, "5"),
            ("roll_back_after", 0, "20"),
            ("peak_tflops", 0, "989"),
        ):
            value = getattr(self, name)
            if value is not None and not least < value < float("inf"):
                raise InputError(f"train.{name}={value}; expected more than {least}, such as {example}, or None")
        for name in ("batch_size", "accumulation", "log_every", "eval_every", "eval_examples", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)}; expected at least 1")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"train.steps={self.steps}; expected at least 1")
        if not 0 <= self.z_loss < math.inf:
            raise InputError(f"train.z_loss={self.z_loss}; expected a finite number of at least 0 (T5: 1e-4)")
        if self.batch_size % self.accumulation:
            nearest = min(divisors(self.batch_size), key=lambda n: abs(n - self.accumulation))
            raise InputError(
                f"train.accumulation={self.accumulation} does not divide train.batch_size={self.batch_size}; "
                f"nearest: {nearest}"
            )


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Gradual merging: the checkpoint is the unconverted one, its heads move to their group's mean while it trains."""

    kv_heads: Mapping[str, int]  # attention site -> key/value heads to end with
    steps: int  # until the heads of a group are one

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"uptrain.merge.steps={self.steps}; expected at least 1")


@dataclasses.dataclass(frozen=True)
class UptrainConfig:
    """Uptraining: the original pre-training goes on for a share of its steps (GQA §2.1)."""

    original_steps: int  # steps of the original pre-training; its schedule goes on from there
    alpha: float  # share of them to uptrain for; the paper's headline is 0.05
    merge: MergeConfig | None = None  # None: the checkpoint is converted already

    def __post_init__(self):
        if self.original_steps < 1:
            raise InputError(f"uptrain.original_steps={self.original_steps}; expected at least 1 (T5.1.1: 1000000)")
        if not 0 < self.alpha <= 1:
            raise InputError(f"uptrain.alpha={self.alpha}; expected a share in (0, 1], such as 0.05")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """A teacher's say in uptraining, beside the loss of the text."""

    teacher: str  # folder of its checkpoint, usually the one that was converted
    text_weight: float  # of the cross-entropy of the text; 1 keeps it as it is, 0 leaves the teacher alone
    kl_weight: float  # of KL(teacher || student) at each target
    attention_weight: float  # of the relative squared error of each decoder attention's output
    top_k: int | None  # teacher's tokens that the divergence tells apart; None: all
    cache: str | None  # folder where the teacher's top_k are kept by step, for runs on the same batches; None: live

    def __post_init__(self):
        for name in ("text_weight", "kl_weight", "attention_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"distillation.{name}={getattr(self, name)}; expected at least 0")
        if self.kl_weight == self.attention_weight == 0:
            raise InputError("distillation.kl_weight and attention_weight are 0; expected one above 0, or None")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"distillation.top_k={self.top_k}; expected at least 1, or None for all tokens")
        if self.cache is not None and (self.top_k is None or self.attention_weight > 0):
            raise InputError("distillation.cache keeps a top_k and no attention outputs; set top_k, attention_weight=0")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run."""

    model: ModelChoice
    data: PrepareSpec
    records: str | None  # folder of prepared records; None: prepared into the cache when missing
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig
    uptrain: UptrainConfig | None
    distillation: DistillationConfig | None = None
    mixture: MixtureConfig | None = None  # what is read instead of one task's records; data says vocabulary and lengths
    adapter: LoRAConfig | None = None  # trains adapters beside a frozen checkpoint; None: all parameters
    dpo: DPOConfig | None = None  # objective on preferences
    reward: RewardConfig | None = None  # objective on preferences: a reward model

    def __post_init__(self):
        self.optimizer.validate()
        self._check_objective()
        if self.mixture is not None and self.records is not None:
            raise InputError("mixture or records: set at most one of them; a folder of records is a part of a mixture")
        if (self.train.steps is None) == (self.uptrain is None):
            raise InputError("train.steps or uptrain (original_steps and alpha): set exactly one of them")
        if self.schedule_offset + self.steps >= 2**31:  # steps are int32
            raise InputError(
                f"the run ends at step {self.schedule_offset + self.steps} of its schedule; expected at most "
                f"{2**31 - 1}: check {'train.steps' if self.uptrain is None else 'uptrain.original_steps'}"
            )

    def _check_objective(self) -> None:
        named = {name: getattr(self, name) for name in ("dpo", "reward", "distillation")}
        chosen = [name for name, value in named.items() if value is not None]
        if len(chosen) > 1:
            raise InputError(f"{' and '.join(chosen)} are set; expected one objective")
        on_preferences = self.dpo is not None or self.reward is not None
        if on_preferences != (self.data.task == "preferences"):
            wanted = "the task preferences" if on_preferences else "dpo or reward to be set"
            raise InputError(f"data.task={self.data.task!r} with objective {chosen or 'none'}; expected {wanted}")
        if on_preferences and self.mixture is not None:
            raise InputError(f"mixture and {chosen[0]} are both set; expected one of them: preferences are not mixed")
        if on_preferences and self.train.z_loss:
            raise InputError(f"train.z_loss={self.train.z_loss} has no meaning on preferences; expected 0.0")
        if self.adapter is not None and (self.reward is not None or self.uptrain is not None):
            other = "reward" if self.reward is not None else "uptrain"
            raise InputError(f"adapter and {other} are both set; expected one of them")

    def check_start(self) -> None:
        """Raises `InputError` where the run goes on from a checkpoint and none is named; a plan needs none."""
        needs = [name for name in ("dpo", "reward", "adapter") if getattr(self, name) is not None]
        if needs and self.model.checkpoint is None:
            raise InputError(f"{needs[0]} goes on from a checkpoint; set model.checkpoint")

    @property
    def steps(self) -> int:
        """Optimizer steps of this run; α × original steps when uptraining."""
        return (
            self.train.steps
            if self.uptrain is None
            else max(1, round(self.uptrain.alpha * self.uptrain.original_steps))
        )

    @property
    def schedule_offset(self) -> int:
        """Where in the learning-rate schedule the run starts."""
        return 0 if self.uptrain is None else self.uptrain.original_steps

    def prepared_records(self) -> Path:
        """The folder of this run's records, prepared now if it is not there yet."""
        if self.mixture is not None:
            return prepare_mixture(self.mixture, self.data)
        if self.records is None:
            directory = default_directory(self.data)
            prepare(self.data, directory)
            return directory
        manifest, vocabulary = read_manifest(self.records), self.data.open_vocabulary()
        wanted = self.data.make_task(manifest.vocabulary_size)
        if manifest.template != self.data.template:
            raise InputError(
                f"records {self.records} have template {manifest.template}; the data's is {self.data.template}"
            )
        if manifest.make_task() != wanted:
            raise InputError(f"records {self.records} are of {manifest.make_task()}; the config's data says {wanted}")
        if manifest.vocabulary_sha256 != vocabulary.sha256:
            raise InputError(f"records {self.records} were prepared with another vocabulary than {vocabulary.path}")
        return Path(self.records)

    def check_devices(self, num_devices: int) -> None:
        """Raises `InputError` unless mesh and batch fit `num_devices`."""
        sizes = dict(zip(MESH_AXES, self.mesh.sizes(num_devices), strict=True))
        names = [name for name in RULES["batch"] if name != "slice" or sizes[name] > 1]
        rows, ways = self.train.batch_size // self.train.accumulation, math.prod(sizes[name] for name in names)
        if rows % ways:
            step = ways * self.train.accumulation
            nearest = max(step, round(self.train.batch_size / step) * step)
            raise InputError(
                f"train.batch_size={self.train.batch_size} in {self.train.accumulation} micro-batch(es) is not "
                f"divisible by {'*'.join(names)}={ways} devices; nearest: {nearest}"
            )


def check_vocabulary(manifest: Manifest, architecture: models.ModelConfig, companions: Sequence[Path] = ()) -> None:
    """Raises `InputError` when records hold tokens that the model's embedding does not, or of another vocabulary.

    Which vocabulary is a checkpoint's its tokenizer says, among the files beside its weights; without one, none.
    """
    if manifest.vocabulary_size > architecture.vocab_size:
        raise InputError(
            f"the records' vocabulary has {manifest.vocabulary_size} pieces, the model's embedding "
            f"{architecture.vocab_size}; use the model's own vocabulary"
        )
    tokenizers = sorted(file for file in companions if file.suffix == ".model")
    tokenizers += [file for file in companions if file.name == tokenizer_json.FILE]
    digests = (tokenizer_json.open_vocabulary(file, foreign=True).sha256 for file in tokenizers)
    if tokenizers and manifest.vocabulary_sha256 not in digests:
        raise InputError(
            "the records were prepared with another vocabulary than the checkpoint's; "
            f"set data.vocabulary={tokenizers[0]}"
        )


def check_heads(architecture: models.ModelConfig, tensor: int) -> None:
    """Raises `InputError` where a mesh's `tensor` does not divide the query heads, which it cuts."""
    heads = architecture.num_heads
    if heads % tensor:
        nearest = min(divisors(heads), key=lambda n: (abs(n - tensor), n))
        raise InputError(f"mesh.tensor={tensor} does not divide num_heads={heads}; nearest: {nearest}")


def check_task(manifest: Manifest, architecture: models.ModelConfig) -> None:
    """Raises `InputError` when records are of the other kind of model: with inputs for a decoder, or without."""
    has_encoder, has_inputs = isinstance(architecture, models.t5.T5Config), manifest.inputs_length > 0
    if has_encoder != has_inputs:
        tasks = ", ".join(name for name in TASKS if (name in DECODER_TASKS) != has_encoder)
        family = models.family_of(architecture)
        raise InputError(f"data.task={manifest.task!r} is not for a {family} model; expected one of {tasks}")


# What may differ between two starts of the same run in one working folder.
MAY_CHANGE = ("train.steps", "train.log_every", "train.eval_every", "train.save_every", "train.keep", "records")
MAY_CHANGE += tuple(f"train.{n}" for n in "keep_minutes mirror skip_above roll_back_after peak_tflops".split())
MAY_CHANGE += ("distillation.cache", "dpo.reference", "uptrain.alpha", "train.accumulation")
MAY_CHANGE += tuple(f"mesh.{axis}" for axis in MESH_AXES)


def parse(config: ml_collections.ConfigDict | Mapping, kind: type[Run] = RunConfig) -> Run:
    """The validated run of a config file's dictionary; an unknown or missing key raises `InputError`.

    `kind` is the dataclass of the run.
    """
    raw = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return build(kind, raw, "config")


def to_json(config) -> dict:
    """The run as plain JSON values."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value

    return plain(config)


def flatten(plain: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested sections as `a.b` keys."""
    flat = {}
    for name, value in plain.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat
