"""The loop of PPO and GRPO: responses, scores, gradient steps; held-out prompts, checkpoints, the final model."""

import collections
import contextlib
import functools
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from gqa import models, sharding
from gqa.checkpoints import hf, hf_config, training_run
from gqa.checkpoints.store import Store
from gqa.errors import InputError
from gqa.models import reward as reward_models
from gqa.posttraining import rollouts, updates
from gqa.posttraining.config import PPORunConfig
from gqa.posttraining.opening import Opened, load_policy, load_reward, open_all, prompt_length
from gqa.posttraining.prompts import Prompt, held_out, read_prompts
from gqa.sharding import logical_axes
from gqa.training import optimizer as optimizers
from gqa.training import run_folder
from gqa.training.metrics import JSONL, MetricsWriter
from gqa.training.signals import Interrupted, Signals
from gqa.training.state import TrainState, abstract_state, initial_state, jit_train_step, make_train_step

PROMPTS = "prompts.json"  # in the working folder: the digest of the file
_HELDOUT_ROWS = 2**30  # number of the first held-out row: its draws are those of no other row, and always the same


class State(NamedTuple):
    """The whole of a run: with the config and this, every later iteration follows."""

    step: jax.Array  # int32, iterations done
    policy: TrainState
    value: TrainState | None  # None: grpo
    scale: updates.Scale
    beta: jax.Array


class _Kind(NamedTuple):
    """One of the two models that are trained: how, and what its state looks like."""

    step: object  # jitted (state, batch, beside it) -> (state, metrics)
    optimizer: object
    like: TrainState


class _Drawn(NamedTuple):
    """Responses, and which prompts the safety model scores."""

    responses: rollouts.Responses
    is_safety_B: np.ndarray


class _Models(NamedTuple):
    """What stays as it is."""

    reference: models.llama.Llama
    reward: reward_models.RewardModel
    safety: reward_models.RewardModel | None


def run(config: PPORunConfig, workdir: Path) -> None:
    """Trains to the end, going on from the newest intact checkpoint in `workdir` if there is one.

    `workdir` gets `config.json`, `prompts.json`, `architecture.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`
    and, at the end, `model/`: the policy of the iteration that did best on the held-out prompts.

    Raises `InputError` for what the config, the checkpoints, the prompts and the folder may not be, and `Interrupted`
    after a signal.
    """
    mesh = sharding.make_mesh(config.mesh)
    opened = open_all(config, {name: getattr(config, name) for name in ("reward", "safety", "reference")})
    prompts = read_prompts(config.prompts, opened.template, config.inputs_length)
    length = prompt_length(prompts, config, opened)
    train, heldout = held_out(prompts, config.train.heldout)
    run_folder.check(workdir, config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_folder.locked(workdir))
        run_folder.claim(workdir, config)
        check_prompts(workdir, config)
        architecture = opened.policy.config
        written = hf_config.write(architecture, architecture.param_dtype, opened.token_ids)
        run_folder.write_json(workdir / training_run.ARCHITECTURE, written)
        store = stack.enter_context(Store(workdir / training_run.STEPS, config.train.keep))
        signals = stack.enter_context(Signals())
        stack.enter_context(jax.set_mesh(mesh))
        frozen = _Models(
            load_policy(config.reference or config.policy, config, mesh),
            load_reward(config.reward, config, mesh),
            load_reward(config.safety, config, mesh),
        )
        _Run(config, workdir, mesh, opened, frozen, length).train(train, heldout, store, signals)


def check_prompts(workdir: Path, config: PPORunConfig) -> None:
    """Raises `InputError` where the run in `workdir` began with other prompts than are in the file now."""
    digest = hashlib.sha256(Path(config.prompts).read_bytes()).hexdigest()
    path = workdir / PROMPTS
    if not path.exists():
        run_folder.write_json(path, {"sha256": digest})
    elif hf_config.read_json(path).get("sha256") != digest:
        raise InputError(
            f"workdir {workdir} holds a run with other prompts than {config.prompts} has now; choose another folder or "
            "the same prompts"
        )


class _Run:
    """A run that has its models; `train` is the loop."""

    def __init__(self, config: PPORunConfig, workdir: Path, mesh, opened: Opened, frozen: _Models, length: int):
        self._config, self._workdir, self._mesh = config, workdir, mesh
        self._opened, self._frozen, self._length = opened, frozen, length
        self._policy = self._kind(
            models.abstract(opened.policy.config), config.optimizer, updates.policy_loss(config.ppo, config.temperature)
        )
        self._value = None
        if config.ppo.method == "ppo":
            abstract = jax.eval_shape(lambda: frozen.reward)
            self._value = self._kind(abstract, config.value_optimizer, updates.value_model_loss(config.ppo))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        number = functools.partial(jax.ShapeDtypeStruct, (), sharding=self._replicated)
        self._like = State(
            number(jnp.int32),
            self._policy.like,
            self._value and self._value.like,
            updates.Scale(number(jnp.float32), number(jnp.float32)),
            number(jnp.float32),
        )

    def _kind(self, abstract, settings: optimizers.OptimizerConfig, loss_fn) -> _Kind:
        optimizer = optimizers.optimizer(settings, 0, logical_axes(abstract))
        like = abstract_state(abstract, optimizer, self._mesh)
        step = make_train_step(
            loss_fn, optimizer, optimizers.schedule(settings), accumulation=1, seed=self._config.train.seed
        )
        return _Kind(jit_train_step(step, like), optimizer, like)

    def train(self, train: list[Prompt], heldout: list[Prompt], store: Store, signals: Signals) -> None:
        """The loop."""
        config, workdir = self._config, self._workdir
        newest = store.latest_step()
        if newest is not None and newest > config.steps:
            raise InputError(
                f"workdir {workdir} holds {newest} iterations already, the config says {config.steps}; choose more"
            )
        found = store.restore_newest(self._like)
        step, state = found or (0, self._initial())
        writer = MetricsWriter(workdir, step if found else None, store.folder(step) if found else None)
        store.thin(writer.losses)
        clock = _Clock()
        bar = tqdm(total=config.steps, initial=step, unit="iteration", desc="ppo", dynamic_ncols=True)
        with contextlib.closing(writer), bar:

            def save() -> None:
                store.save(step, state, losses=writer.losses, files=[workdir / JSONL])

            def is_due(every: int) -> bool:
                return step == config.steps or step % every == 0

            saved = step if found else None
            while True:
                if is_due(config.train.eval_every) and step not in writer.losses:
                    with clock.timed("heldout"):
                        state, scores = self._score(state, heldout)
                    writer.write(step, "heldout", scores)
                    tqdm.write(f"iteration {step}: held-out reward {scores['reward']:+.3f}, KL {scores['kl']:.2f} nats")
                best = _best(writer.losses)
                ended = step == config.steps or _is_stale(writer.losses, config.train.patience)
                is_new_best = best == step
                if saved != step and (ended or signals.received or is_new_best or is_due(config.train.save_every)):
                    save()
                    saved = step
                if ended or signals.received:
                    break
                clock.start()
                state, metrics = self._iteration(state, step, train, clock)
                step += 1
                metrics |= clock.seconds()
                writer.write(step, "train", metrics)
                bar.update()
                bar.set_postfix_str(f"reward {metrics['reward']:+.2f}, KL {metrics['kl']:.1f}", refresh=False)
                tqdm.write(_line(step, metrics))
            store.wait()
            if not ended:
                raise Interrupted(f"{signals.received} at iteration {step}: saved; the same command goes on from there")
            if best != step:
                state = store.restore(best, self._like)
            self._write_model(state, best, step, writer.losses[best])
            print(clock.summary())

    def _initial(self) -> State:
        config = self._config
        # Loaded once more: a state is donated to its steps, and the reference and the reward model must stay.
        policy = load_policy(config.policy, config, self._mesh)
        value = None
        if self._value is not None:
            value = load_reward(config.reward, config, self._mesh)
            value = initial_state(value, self._value.optimizer, self._value.like)
        return State(
            self._number(np.int32(0)),
            initial_state(policy, self._policy.optimizer, self._policy.like),
            value,
            updates.Scale(self._number(np.float32(0)), self._number(np.float32(1))),
            self._number(np.float32(config.ppo.beta)),
        )

    def _number(self, value) -> jax.Array:
        return jax.device_put(value, self._replicated)

    def _draw(self, state: State, prompts: list[Prompt], rows: np.ndarray, room: int) -> _Drawn:
        """Responses of the policy, an equal number to each of `room` prompts, of which the last may not be there."""
        responses = rollouts.draw(
            rollouts.unstacked(state.policy.model),
            [prompt.tokens for prompt in prompts],
            rows,
            shape=(room, self._length, self._config.new_tokens),
            eos_ids=self._opened.eos_ids,
            temperature=self._config.temperature,
            seed=self._config.train.seed,
        )
        is_safety = [prompt.is_safety for prompt in prompts] + [False] * (room - len(prompts))
        return _Drawn(jax.block_until_ready(responses), np.repeat(is_safety, len(rows) // room))

    def _measure(self, state: State, drawn: _Drawn, value) -> tuple[updates.Measured, jax.Array]:
        """What the models say of responses, and their scores."""
        config = self._config
        responses, size = drawn.responses, config.ppo.minibatch
        measured = updates.measure(
            self._frozen.reference,
            value,
            responses,
            state.scale,
            temperature=config.temperature,
            size=size,
        )
        tokens_BT, lengths_B = rollouts.ended(responses, np.array(self._opened.ending, np.int32))
        scores_B = rollouts.score(
            self._frozen.reward,
            self._frozen.safety,
            tokens_BT,
            lengths_B,
            drawn.is_safety_B,
            gate=config.safety_gate,
            size=size,
        )
        return jax.block_until_ready((measured, scores_B))

    def _score(self, state: State, heldout: list[Prompt]) -> tuple[State, dict[str, float]]:
        """Rewards on the held-out prompts, one response each; those of iteration 0 set the scale."""
        rows, scores, kls, lengths = self._config.ppo.rollouts, [], [], []
        for first in range(0, len(heldout), rows):
            here = heldout[first : first + rows]
            drawn = self._draw(state, here, _HELDOUT_ROWS + first + np.arange(rows), rows)
            measured, scores_B = self._measure(state, drawn, None)
            responses = drawn.responses
            kl_BN = (responses.sampled_BN - measured.reference_BN) * responses.weights_BN
            found = jax.device_get((scores_B, jnp.sum(kl_BN, axis=1), responses.counts_B))
            for values, of_part in zip((scores, kls, lengths), found, strict=True):
                values.append(of_part[: len(here)])
        scores, kl, length = np.concatenate(scores), np.concatenate(kls).mean(), np.concatenate(lengths).mean()
        if int(state.step) == 0:
            numbers = np.float32(scores.mean()), np.float32(max(scores.std(ddof=1), 1e-3))
            state = state._replace(scale=updates.Scale(*map(self._number, numbers)))
        mean, deviation = jax.device_get(tuple(state.scale))
        reward = float((scores.mean() - mean) / deviation)
        over = max(0.0, float(kl) - self._config.ppo.kl_limit)
        # What the best iteration has least of: a nat over the limit costs a deviation.
        found = {"loss": over - reward, "reward": reward, "score": scores.mean(), "kl": kl, "length": length}
        return state, {name: float(value) for name, value in found.items()}

    def _iteration(self, state: State, step: int, train: list[Prompt], clock: "_Clock") -> tuple[State, dict]:
        ppo, seed = self._config.ppo, self._config.train.seed
        count = ppo.rollouts // ppo.samples_per_prompt
        with clock.timed("generation"):
            prompts = [train[number] for number in prompt_numbers(len(train), count, step, seed)]
            drawn = self._draw(state, prompts, step * ppo.rollouts + np.arange(ppo.rollouts), count)
        with clock.timed("scoring"):
            value = None if state.value is None else state.value.model
            measured, scores_B = self._measure(state, drawn, value)
            batch, metrics = updates.prepare(drawn.responses, measured, scores_B, state.scale, state.beta, ppo)
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        with clock.timed("gradient"):
            state, steps = self._gradient_steps(state, batch, np.random.default_rng((seed, 1, step)))
        metrics |= steps
        beta = next_beta(metrics["beta"], metrics["kl"], ppo.beta, ppo.kl_limit)
        return state._replace(step=self._number(np.int32(step + 1)), beta=self._number(np.float32(beta))), metrics

    def _gradient_steps(self, state: State, batch: updates.Batch, rng: np.random.Generator) -> tuple[State, dict]:
        ppo, found = self._config.ppo, collections.defaultdict(list)
        policy, value = state.policy, state.value
        for _ in range(ppo.epochs):
            for rows in rng.permutation(ppo.rollouts).reshape(-1, ppo.minibatch):
                part = updates.rows_of(batch, rows)
                policy, metrics = self._policy.step(policy, part, state.beta)
                for name, ours in _POLICY_METRICS.items():
                    found[ours].append(metrics[name])
                if value is not None:
                    value, metrics = self._value.step(value, part, state.scale)
                    found["value_loss"].append(metrics["loss"])
        found = jax.device_get(dict(found))  # waits for the last step
        means = {name: float(np.mean(values)) for name, values in found.items()}
        # Of the first step alone: before it, the trained policy is the one that sampled.
        means["sampler_difference"] = float(found["sampler_difference"][0])
        return state._replace(policy=policy, value=value), means

    def _write_model(self, state: State, best: int, step: int, loss: float) -> None:
        config, workdir = self._config, self._workdir

        def export(folder: Path) -> None:
            files = self._opened.tokenizer_files
            hf.save(state.policy.model, folder, dtype="float32", token_ids=self._opened.token_ids, extra_files=files)

        run_folder.replace(workdir, run_folder.MODEL, export)
        run_folder.write_json(workdir / run_folder.FINISHED, {"step": config.steps, "stopped": step, "best": best})
        early = f", stopped early after {step}" if step < config.steps else ""
        tqdm.write(f"{workdir / run_folder.MODEL}: iteration {best}, held-out reward {-loss:+.3f}{early}")


_POLICY_METRICS = {
    "loss": "policy_loss",
    "added_loss": "kl_loss",
    "clipped": "clipped",
    "step_kl": "step_kl",
    "grad_norm": "grad_norm",
    "sampler_difference": "sampler_difference",
}


def prompt_numbers(total: int, count: int, step: int, seed: int) -> list[int]:
    """The prompts of an iteration: `count` further ones of an endless row of permutations of all, by seed."""
    places = range(step * count, (step + 1) * count)
    orders = {
        epoch: np.random.default_rng((seed, 0, epoch)).permutation(total) for epoch in {p // total for p in places}
    }
    return [int(orders[place // total][place % total]) for place in places]


def next_beta(beta: float, kl: float, least: float, limit: float) -> float:
    """β doubles above the limit of KL, and halves, down to `least`, where there is room (PPO §4)."""
    if kl > limit:
        return 2 * beta
    return max(beta / 2, least) if kl < limit / 1.5 else beta


def _best(losses: dict[int, float]) -> int:
    return min(losses, key=lambda step: (losses[step], step))


def _is_stale(losses: dict[int, float], patience: int | None) -> bool:
    return patience is not None and sum(step > _best(losses) for step in losses) >= patience


def _line(step: int, metrics: dict[str, float]) -> str:
    value = ""
    if "value_loss" in metrics:
        explained = metrics["explained_variance"]
        value = f", value loss {metrics['value_loss']:.3f} ({explained:.0%} explained)"
    return (
        f"iteration {step}: reward {metrics['reward']:+.3f} (best {metrics['reward_max']:+.2f}), "
        f"KL {metrics['kl']:.2f} nats, entropy {metrics['entropy']:.2f}, {metrics['clipped']:.1%} clipped{value}, "
        f"{metrics['length']:.1f} tokens, sampler and trainer differ by {metrics['sampler_difference']:.1e}; "
        f"{metrics['iteration_seconds']:.1f} s: {metrics['generation_seconds']:.1f} generation, "
        f"{metrics['gradient_seconds']:.1f} gradient steps"
    )


class _Clock:
    """Where the time of iterations goes; the first one, which compiles, is left out of the summary."""

    def __init__(self):
        self._total: collections.Counter[str] = collections.Counter()
        self._now: dict[str, float] = {}
        self._iterations = -1

    def start(self) -> None:
        """An iteration begins."""
        self._now = {"start": time.perf_counter()}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Around a part."""
        before = time.perf_counter()
        yield
        self._now[name] = time.perf_counter() - before

    def seconds(self) -> dict[str, float]:
        """Of the iteration that ends now, as metrics."""
        found = {f"{name}_seconds": self._now[name] for name in ("generation", "scoring", "gradient")}
        found["iteration_seconds"] = time.perf_counter() - self._now["start"]
        found["useful_share"] = (found["generation_seconds"] + found["gradient_seconds"]) / found["iteration_seconds"]
        self._iterations += 1
        if self._iterations:
            self._total.update(found)
        return found

    def summary(self) -> str:
        """Of all iterations of this process but the first."""
        if self._iterations < 1:
            return "too few iterations to tell where time goes"
        total = self._total["iteration_seconds"]
        shares = ", ".join(
            f"{name} {self._total[f'{name}_seconds'] / total:.0%}" for name in ("generation", "gradient", "scoring")
        )
        return f"{total / self._iterations:.2f} s an iteration: {shares}"


RATES = ("generation_seconds", "scoring_seconds", "gradient_seconds", "iteration_seconds", "useful_share")
