"""What rejection sampling, PPO and the generation of instructions may say, checked before anything is loaded."""

import dataclasses
import math

from gqa.data.instructions.evol import Evol
from gqa.data.instructions.lamini import Lamini
from gqa.data.instructions.orca import Orca
from gqa.data.instructions.parts import Program
from gqa.decode.sampling import sampling
from gqa.errors import InputError, one_of
from gqa.models.heads import nearest_divisors
from gqa.sharding import MeshConfig
from gqa.training.config import DTYPES
from gqa.training.optimizer import OptimizerConfig

METHODS = ("ppo", "grpo")
JUDGES = ("model", "reward")
PROGRAMS = ("lamini", "evol", "orca")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledConfig:
    """What both have: whose responses to which prompts, and who scores them."""

    policy: str  # folder of the checkpoint that responds
    reward: str  # folder of the reward model (helpfulness)
    safety: str | None  # folder of the safety model; None: helpfulness alone
    safety_gate: float  # probability of being safe below which the safety model's score counts (Llama 2: 0.15)
    prompts: str  # JSONL file
    template: str  # that the policy was tuned with
    vocabulary: str  # of all of these models: SentencePiece's file, a tokenizer.json, or a folder with one of them
    inputs_length: int  # most tokens of a prompt; longer ones are left out
    new_tokens: int  # most tokens of a response
    dtype: str  # of activations and matrix products: float32 or bfloat16

    def __post_init__(self):
        _at_least(self, "inputs_length", "new_tokens")
        one_of("dtype", self.dtype, DTYPES)
        if not 0 <= self.safety_gate <= 1:
            raise InputError(f"safety_gate={self.safety_gate}; expected a probability, such as 0.15")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectionConfig(SampledConfig):
    """A round of rejection sampling."""

    former: str | None  # output of the round before, whose best are merged; None: the first round
    temperatures: tuple[float, ...]  # each gives `samples` of every prompt
    samples: int  # of a prompt at a temperature (Llama 2: 10 to 100)
    batch_size: int  # rows decoded and scored at a time
    seed: int  # of the draws

    def __post_init__(self):
        super().__post_init__()
        _at_least(self, "samples", "batch_size")
        _check_seed(self.seed)
        if not self.temperatures:
            raise InputError("temperatures is empty; expected at least one, such as 1.0")
        for temperature in self.temperatures:
            sampling(temperature)
        if len(set(self.temperatures)) < len(self.temperatures):
            raise InputError(f"temperatures={self.temperatures}; expected each once: samples says how many are drawn")


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """The objective and the size of an iteration."""

    method: str  # ppo: GAE with a value model; grpo: a prompt's other samples are the baseline
    rollouts: int  # responses an iteration (Llama 2: 512)
    samples_per_prompt: int  # of these, to the same prompt; grpo: 2 or more
    minibatch: int  # responses a gradient step (Llama 2: 64)
    epochs: int  # passes over an iteration's responses (Llama 2: 1)
    clip: float  # of the ratio of new to sampling policy (Llama 2: 0.2)
    value_clip: float  # of a value's move, in standard deviations of the initial rewards
    discount: float  # γ
    decay: float  # λ of GAE
    beta: float  # cost of a nat of KL from the reference, in standard deviations of the initial rewards (Llama 2: 0.01)
    kl_limit: float  # nats a response: above it beta doubles; each nat over costs a checkpoint a deviation of reward

    def __post_init__(self):
        one_of("ppo.method", self.method, METHODS)
        _at_least(self, "rollouts", "samples_per_prompt", "minibatch", "epochs", prefix="ppo.")
        for name in ("samples_per_prompt", "minibatch"):
            if self.rollouts % getattr(self, name):
                raise InputError(
                    f"ppo.{name}={getattr(self, name)} does not divide ppo.rollouts={self.rollouts}; nearest: "
                    f"{nearest_divisors(self.rollouts, getattr(self, name))}"
                )
        if self.method == "grpo" and self.samples_per_prompt < 2:
            raise InputError("ppo.samples_per_prompt=1 with grpo; expected 2 or more, such as 8: they are the baseline")
        for name in ("clip", "value_clip", "kl_limit"):
            if not getattr(self, name) > 0:  # NaN is not, infinity is no limit
                raise InputError(f"ppo.{name}={getattr(self, name)}; expected a number above 0")
        for name in ("discount", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"ppo.{name}={getattr(self, name)}; expected a number in [0, 1]")
        if not 0 <= self.beta < math.inf:
            raise InputError(f"ppo.beta={self.beta}; expected at least 0 (Llama 2: 0.01)")


@dataclasses.dataclass(frozen=True)
class IterationsConfig:
    """The loop."""

    steps: int  # iterations: responses, then gradient steps on them
    seed: int  # of the order of prompts, the draws and the mini-batches
    heldout: int  # prompts held out
    eval_every: int  # iterations between rewards on them; the last iteration always has one
    patience: int | None  # such rewards in a row without a new best, after which the run stops early; None: never
    save_every: int  # iterations between checkpoints; the best and the last one always have one
    keep: int  # newest checkpoints kept, and the best

    def __post_init__(self):
        _at_least(self, "steps", "eval_every", "save_every", "keep", prefix="train.")
        _check_seed(self.seed, prefix="train.")
        if self.heldout < 2:
            raise InputError(f"train.heldout={self.heldout}; expected 2 or more: rewards are in their deviations")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"train.patience={self.patience}; expected 1 or more, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPORunConfig(SampledConfig):
    """A run of PPO or GRPO."""

    reference: str | None  # folder of the checkpoint that KL is taken from; None: the initial policy
    temperature: float  # divides the logits, of the draws and of all log-probabilities
    ppo: PPOConfig
    optimizer: OptimizerConfig  # of the policy
    value_optimizer: OptimizerConfig  # of the value model; grpo has none
    train: IterationsConfig
    mesh: MeshConfig

    def __post_init__(self):
        super().__post_init__()
        sampling(self.temperature)
        self.optimizer.validate()
        self.value_optimizer.validate()

    @property
    def steps(self) -> int:
        """Iterations of this run."""
        return self.train.steps


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Who accepts a conversation."""

    kind: str  # model: asked whether the response is good; reward: a reward model's score
    checkpoint: str  # folder of that model
    template: str  # that it was tuned with
    vocabulary: str  # its own: SentencePiece's file, a tokenizer.json, or a folder with one of them
    threshold: float  # least score accepted: log-odds of Yes over No of a model, else the reward model's

    def __post_init__(self):
        one_of("judge.kind", self.kind, JUDGES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionsConfig:
    """A run of one of the prompt programs."""

    parent: str  # folder of the checkpoint that writes
    template: str  # that the parent was tuned with
    vocabulary: str  # its own: SentencePiece's file, a tokenizer.json, or a folder with one of them
    seeds: str  # JSONL file
    inputs_length: int  # most tokens of what the parent is asked; longer ones are rejected
    new_tokens: int  # most tokens of what it answers
    temperature: float  # divides the logits
    batch_size: int  # rows decoded and scored at a time
    seed: int  # of the choices and draws
    dtype: str  # of activations and matrix products: float32 or bfloat16
    judge: JudgeConfig
    lamini: Lamini | None = None  # one of the three
    evol: Evol | None = None
    orca: Orca | None = None

    def __post_init__(self):
        _at_least(self, "inputs_length", "new_tokens", "batch_size")
        _check_seed(self.seed)
        one_of("dtype", self.dtype, DTYPES)
        sampling(self.temperature)
        named = [name for name in PROGRAMS if getattr(self, name) is not None]
        if len(named) != 1:
            raise InputError(f"sections {' and '.join(named) or 'of none'}; expected one of {', '.join(PROGRAMS)}")

    @property
    def program_name(self) -> str:
        """Which section there is."""
        return next(name for name in PROGRAMS if getattr(self, name) is not None)

    @property
    def program(self) -> Program:
        """The program."""
        return getattr(self, self.program_name)


def _check_seed(seed: int, prefix: str = "") -> None:
    if not 0 <= seed < 2**32:
        raise InputError(f"{prefix}seed={seed}; expected 0..{2**32 - 1}; nearest: {min(max(seed, 0), 2**32 - 1)}")


def _at_least(config, *names: str, prefix: str = "") -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"{prefix}{name}={getattr(config, name)}; expected at least 1")
