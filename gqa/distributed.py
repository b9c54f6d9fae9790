"""Several processes as one run: how they find each other, and how they end when one of them is gone.

On TPU pods, under SLURM, in Kubernetes' indexed jobs and under Open MPI the processes find each other; elsewhere each
is told with `--coordinator=HOST:PORT --num_processes=N --process_id=I`.
"""

import argparse
import contextlib
import itertools
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping

from gqa import compiler_flags
from gqa.errors import InputError

_WAIT_MS = 7 * 24 * 3600 * 1000  # for what one process does while the others wait; a dead one ends the wait earlier
# How XLA's collectives (Gloo, NCCL) and JAX's coordination say that a process is gone.
_LOST = re.compile(r"gloo|nccl|coordination|connection|unavailable|heartbeat|peer", re.IGNORECASE)
_calls = itertools.count()
# The first word of what processes say to each other when they meet, the longest line of it, and the wait for one.
_NAME, _LINE, _GREETING_SECONDS = "gqa", 1000, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `running` reads."""
    group = parser.add_argument_group(
        "several processes",
        "Start the same command once per host (or per GPU). TPU pods, SLURM, Kubernetes' indexed jobs and Open MPI are "
        "recognised; elsewhere give the first three options to each. WORKDIR is on a disk that all of them share.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, reached by all others")
    group.add_argument("--num_processes", type=int, metavar="N", help="how many there are; 1: this one alone")
    group.add_argument("--process_id", type=int, metavar="I", help="this one's number, from 0")
    group.add_argument(
        "--start_timeout", type=int, default=300, metavar="SECONDS", help="wait for the others to start (default 300)"
    )
    group.add_argument(
        "--heartbeat_timeout",
        type=int,
        default=100,
        metavar="SECONDS",
        help="a process not heard of for so long has died, and the others end (default 100)",
    )


@contextlib.contextmanager
def running(arguments: argparse.Namespace) -> Iterator[None]:
    """Sets the backend's flags and joins the processes of the run, before JAX starts; ends as `leaving_at_once` does.

    Raises `InputError` for options that do not fit together and for a coordinator that is not there in time.
    """
    expected = compiler_flags.expected()
    compiler_flags.set_flags(expected)
    if not _join(arguments, expected):
        yield
        return
    with leaving_at_once():
        yield


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """An error inside ends this process with a line and code 1, without another word, where it is one of several.

    The usual end waits for processes that may be gone (JAX's own, and that of a save under way), and they for this one.
    """
    import jax

    try:
        yield
    except InputError:
        raise  # found by all processes alike: they end together
    except Exception as error:
        if jax.process_count() == 1:
            raise
        process = f"error: process {jax.process_index()} of {jax.process_count()} has"
        if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
            cause = str(error).splitlines()[0]
            end = f"lost another one ({cause}); start all of them again: the run goes on from its newest checkpoint"
        else:
            traceback.print_exception(error)
            end = "failed; the others end too"
        print(f"\n{process} {end}", file=sys.stderr)  # not behind the bar
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _join(arguments: argparse.Namespace, expected_backend: str) -> bool:
    """Whether this process is one of several; if so they have met when this returns."""
    for name in ("start_timeout", "heartbeat_timeout"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name}={getattr(arguments, name)}; expected at least 1 second")
    given = {name: getattr(arguments, name) for name in ("coordinator", "num_processes", "process_id")}
    if given["num_processes"] == 1:
        return False
    explicit = any(value is not None for value in given.values())
    if not explicit and not in_cluster(os.environ, expected_backend):
        return False
    settings = {}
    if not explicit and expected_backend != "tpu":  # hosts of a pod are there together
        given, settings = _detected(arguments.start_timeout)
    print(f"waiting up to {arguments.start_timeout} s for all processes to start", file=sys.stderr)
    if explicit or settings:
        # JAX aborts a process that does not find the others: they meet before.
        host, port = _check(given)
        settings |= dict(coordinator_address=given["coordinator"], **{name: given[name] for name in list(given)[1:]})
        if given["process_id"] == 0:
            _gather(port, given["num_processes"], arguments.start_timeout)
        else:
            _greet(host, port, given["process_id"], given["num_processes"], arguments.start_timeout)
    import jax

    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=arguments.start_timeout,
            heartbeat_timeout_seconds=arguments.heartbeat_timeout,
            shutdown_timeout_seconds=arguments.heartbeat_timeout,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise _not_found(error) from error
    return True


def _not_found(reason: object) -> InputError:
    return InputError(
        f"the processes do not find each other: {reason}; give --coordinator, --num_processes and --process_id, "
        "or --num_processes=1 for this one alone"
    )


def _detected(seconds: int) -> tuple[dict, dict]:
    """What the scheduler says of the run's processes, as the options would, and which devices are this one's."""
    # JAX reads it in `initialize`, which aborts; it has no public access to it.
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, seconds)
    except (RuntimeError, ValueError, OSError, LookupError) as error:
        raise _not_found(error) from error
    if None in found[:3]:
        raise _not_found("the scheduler does not say who they are")
    given = dict(zip(("coordinator", "num_processes", "process_id"), found[:3], strict=True))
    return given, {"local_device_ids": found[3]}


def in_cluster(environment: Mapping[str, str], expected_backend: str) -> bool:
    """Whether a scheduler that JAX knows has started several processes, or a TPU (whose hosts are a pod's) is here."""
    if expected_backend == "tpu":
        return True
    if {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        return int(environment.get("SLURM_NTASKS", 1)) > 1
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_SIZE"]) > 1
    return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()


def _check(given: Mapping) -> tuple[str, int]:
    """Host and port of the coordinator."""
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise InputError(f"{', '.join(missing)} missing; --coordinator, --num_processes and --process_id go together")
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator={given['coordinator']}; expected HOST:PORT, such as 10.0.0.1:7777")
    count, number = given["num_processes"], given["process_id"]
    if count < 1:
        raise InputError(f"--num_processes={count}; expected at least 1")
    if not 0 <= number < count:
        raise InputError(
            f"--process_id={number} is not one of --num_processes={count}; nearest: {min(max(number, 0), count - 1)}"
        )
    return host.strip("[]"), int(port)


def _gather(port: int, count: int, seconds: float) -> None:
    """In process 0: waits for a greeting of each other process, then tells all of them to go on.

    JAX listens on the same port afterwards.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=count)
    except OSError as error:
        raise InputError(f"--coordinator: port {port} is not free here ({error.strerror}); choose another") from error
    deadline = time.monotonic() + seconds
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as connections:
        with listener:
            while len(came) < count - 1 and time.monotonic() < deadline:
                listener.settimeout(max(deadline - time.monotonic(), 0.1))
                with contextlib.suppress(OSError):  # nobody came, or somebody who left at once
                    connection = connections.enter_context(listener.accept()[0])
                    connection.settimeout(_GREETING_SECONDS)
                    number = _greeted(connection.makefile("rb").readline(_LINE), count)
                    if number is None:
                        connection.close()
                    else:
                        came[number] = connection
                came = {number: connection for number, connection in came.items() if _is_there(connection)}
        missing = ", ".join(str(number) for number in range(1, count) if number not in came)
        problem = f"--num_processes={count}: process {missing} did not come within {seconds} s" if missing else ""
        for connection in came.values():
            with contextlib.suppress(OSError):  # it fits what the system buffers
                connection.sendall(f"{_NAME} {problem}\n".encode())
    if problem:
        raise InputError(f"{problem}; start the same command in each, with --process_id=0..{count - 1}")


def _greeted(line: bytes, count: int) -> int | None:
    """The number of the process that a greeting is of; None for what is no greeting of this run."""
    found = re.fullmatch(rf"{_NAME} (\d+) of {count}\n", line.decode(errors="replace"))
    return int(found[1]) if found and 0 < int(found[1]) < count else None


def _is_there(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _greet(host: str, port: int, number: int, count: int, seconds: float) -> None:
    """In another process: greets process 0, again and again, until it says that all are there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1)) as connection:
                if connection.getsockname() == connection.getpeername():
                    # Nothing listens, and the system gave this end the very port that it looks for.
                    raise ConnectionRefusedError("connected to itself")
                connection.sendall(f"{_NAME} {number} of {count}\n".encode())
                answer = connection.makefile("rb").readline(_LINE).decode(errors="replace")
            if answer.startswith(_NAME):
                break
            found = "something else listens there" if answer else "it hung up"
        except OSError as error:
            found = error
        if time.monotonic() + 0.2 > deadline:
            raise InputError(
                f"--coordinator={host}:{port} does not answer within {seconds} s ({found}); is process 0 of "
                f"--num_processes={count} running there, and is the port open?"
            )
        time.sleep(0.2)
    if problem := answer.removeprefix(_NAME).strip():
        raise InputError(problem)


def is_primary() -> bool:
    """Whether this process is the one that writes files: number 0, the only one where there are not several."""
    import jax

    return jax.process_index() == 0


def on_primary(function: Callable[[], None]) -> None:
    """Calls `function` in process 0 while the others wait; an `InputError` there is raised by all of them.

    All processes make these calls in the same order.
    """
    import jax

    if jax.process_count() == 1:
        function()
        return
    # Not a collective: on CPUs these give up after 30 seconds. JAX has no public access to its key-value store, which
    # Orbax uses in this way too.
    from jax._src.distributed import global_state

    client, key = global_state.client, f"gqa/on_primary/{next(_calls)}"
    if not is_primary():
        failure = client.blocking_key_value_get(key, _WAIT_MS)
        if failure:
            raise InputError(failure)
        return
    try:
        function()
    except InputError as error:
        client.key_value_set(key, str(error))
        raise
    client.key_value_set(key, "")


def gathered(tree):
    """`tree` with every array whole in this host's memory, in process 0; `None` in the others.

    One process alone has it as it is.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return tree

    def gather(leaf):
        whole = multihost_utils.process_allgather(leaf, tiled=True)
        return whole if is_primary() else None

    leaves, structure = jax.tree.flatten(tree)
    whole = [gather(leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, whole) if is_primary() else None


def stop_together(step: int) -> bool:
    """Whether a SIGTERM that any process got stops all of them after this step; to be asked at every step.

    JAX's handler notes the signal: a run of several processes leaves SIGTERM to it.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def forward_interrupt(number, frame) -> None:
    """A handler that makes Ctrl-C in one process stop all of them, as SIGTERM does."""
    signal.raise_signal(signal.SIGTERM)
