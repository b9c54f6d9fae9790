"""Several processes train as one: one is killed, told to stop or never comes, and all start again.

Run by itself, this file is `gqa.train` that says what it reads and may get a signal just before a step:
`python tests/reliability/test_processes.py STEP SIGNAL --config=FILE --workdir=DIR --coordinator=…`.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import signal
import socket
import sys
import time

import numpy as np
import pytest

from gqa import command_line, distributed, models, train
from gqa.checkpoints import hf
from gqa.data import loader
from gqa.errors import InputError
from gqa.training import metrics

STEPS = 6
OVERRIDES = {
    "train.steps": STEPS,
    "train.save_every": 2,
    "train.eval_every": STEPS,
    "model.changes.num_layers": 1,
    "mesh": dict(data=1, fsdp=2, tensor=1),
}
NEVER = (0, "SIGKILL")


@pytest.fixture
def free_port():
    """The number of a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def start_all(run_python, free_port):
    """A function (config, workdir, step, signal, process that gets it) -> both processes, finished."""

    def run(path, workdir, step=NEVER[0], signal_name=NEVER[1], struck=None):
        def one(number: int):
            disturbed = (step, signal_name) if number == struck else NEVER
            return run_python(
                *(__file__, *disturbed, f"--config={path}", f"--workdir={workdir}"),
                *(f"--coordinator=127.0.0.1:{free_port}", "--num_processes=2", f"--process_id={number}"),
            )

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))

    return run


@pytest.fixture
def start(start_all, config_file):
    """`start_all` of one config."""
    return functools.partial(start_all, config_file("llama", OVERRIDES))


@pytest.fixture
def assert_whole(tiny_run, monkeypatch, config_file, compilation_cache, tmp_path):
    """A function (workdir, outputs of the last start) that compares the run with one of one process and device."""

    def compare(workdir, processes):
        config = tiny_run("llama", OVERRIDES)
        alone = OVERRIDES | {"mesh": dict(data=1, fsdp=1, tensor=1)}
        arguments = [f"--config={config_file('llama', alone)}", f"--workdir={tmp_path / 'alone'}"]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        train.main()
        found, expected = (
            {(line["split"], line["step"]): line["loss"] for line in metrics.read(folder)}
            for folder in (workdir, tmp_path / "alone")
        )
        assert len(expected) == STEPS + 2
        assert found == pytest.approx(expected, rel=1e-5)
        # Each process read its half of the batches that one process reads.
        batches = loader.train_batches(config.records, config.train.batch_size, config.train.seed)
        for number, process in enumerate(processes):
            lines = [line.removeprefix("read ") for line in process.stdout.splitlines() if line.startswith("read ")]
            read = [json.loads(line) for line in lines]
            rows = list(range(4 * number, 4 * number + 4))
            assert read == [[step, rows, digest(batches(step)["targets"][rows])] for step in range(read[0][0], STEPS)]
        assert (workdir / "model" / "model.safetensors").exists()

    return compare


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def test_one_of_two_is_killed(start, assert_whole, tmp_path):
    """Before the fifth step, with the save of the fourth under way: the other does not wait for that."""
    workdir = tmp_path / "run"
    first, second = start(workdir, 4, "SIGKILL", struck=1)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 1, first.stderr
    last = first.stderr.splitlines()[-1]
    assert last.startswith("error: process 0 of 2 has lost another one (")
    assert last.endswith("start all of them again: the run goes on from its newest checkpoint")
    again = start(workdir, *NEVER)
    assert [process.returncode for process in again] == [0, 0], again[0].stderr + again[1].stderr
    assert_whole(workdir, again)


@pytest.mark.full
def test_the_first_is_killed(start, assert_whole, tmp_path):
    """With the coordinator gone, the other ends by itself or is ended by JAX, which says that a task died."""
    workdir = tmp_path / "run"
    first, second = start(workdir, 4, "SIGKILL", struck=0)
    assert first.returncode == -signal.SIGKILL
    assert second.returncode in (1, -signal.SIGABRT)
    assert "has lost another one" in second.stderr or "another task died" in second.stderr
    again = start(workdir, *NEVER)
    assert [process.returncode for process in again] == [0, 0], again[0].stderr + again[1].stderr
    assert_whole(workdir, again)


@pytest.mark.full
def test_one_is_told_to_stop(start, assert_whole, tmp_path):
    workdir = tmp_path / "run"
    stopped = start(workdir, 2, "SIGTERM", struck=1)
    assert [process.returncode for process in stopped] == [130, 130], stopped[0].stderr + stopped[1].stderr
    lines = {line for process in stopped for line in process.stderr.splitlines() if line.startswith("SIGTERM at step")}
    assert len(lines) == 1  # the same step in both
    again = start(workdir, *NEVER)
    assert [process.returncode for process in again] == [0, 0], again[0].stderr + again[1].stderr
    assert_whole(workdir, again)


@pytest.mark.full
def test_an_adapter_beside_a_base_that_no_process_holds_whole(start_all, config_file, random_model, tmp_path):
    """It and the merged model come out."""
    hf.save(random_model(models.size("llama_mini")), tmp_path / "base", dtype="float32")
    adapter = dict(kernels=("mlp.up",), rank=4, alpha=8.0, dropout_rate=0.0, rank_stabilised=False)
    changes = {"model.size": None, "model.changes": {}, "model.checkpoint": str(tmp_path / "base"), "adapter": adapter}
    overrides = {name: value for name, value in OVERRIDES.items() if not name.startswith("model.")} | changes
    found = start_all(config_file("llama", overrides), tmp_path / "run")
    assert [process.returncode for process in found] == [0, 0], found[0].stderr + found[1].stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--num_processes=2"],
            "--coordinator, --process_id missing; --coordinator, --num_processes and …",
        ),
        (["--coordinator=a:1", "--num_processes=2"], "--process_id missing; --coordinator, --num_processes and …"),
        (
            ["--coordinator=host", "--num_processes=2", "--process_id=0"],
            "--coordinator=host; expected HOST:PORT, such as 10.0.0.1:7777",
        ),
        (
            ["--coordinator=a:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 is not one of --num_processes=2; nearest: 1",
        ),
        (["--coordinator=a:1", "--num_processes=0", "--process_id=0"], "--num_processes=0; expected at least 1"),
        (["--heartbeat_timeout=0"], "--heartbeat_timeout=0; expected at least 1 second"),
        (
            ["--coordinator=127.0.0.1:{port}", "--num_processes=2", "--process_id=1", "--start_timeout=1"],
            "--coordinator=127.0.0.1:{port} does not answer within 1 s (…",
        ),
        (
            ["--coordinator=127.0.0.1:{port}", "--num_processes=3", "--process_id=0", "--start_timeout=1"],
            "--num_processes=3: process 1, 2 did not come within 1 s; start the same command in each, with …",
        ),
    ],
)
def test_processes_that_cannot_be(options, message, free_port):
    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    arguments = parser.parse_args([option.format(port=free_port) for option in options])
    with pytest.raises(InputError) as caught, distributed.running(arguments):
        pass
    assert str(caught.value).startswith(message.format(port=free_port).partition("…")[0])


def slurm(port: int, number: int) -> dict[str, str]:
    """The environment of a process of two under SLURM, whose first host is this machine."""
    values = {"JOB_ID": 7, "STEP_NODELIST": "127.0.0.1", "NTASKS": 2, "PROCID": number, "LOCALID": 0}
    return {f"SLURM_{name}": str(value) for name, value in values.items()} | {"JAX_COORDINATOR_PORT": str(port)}


def test_a_schedulers_coordinator_that_is_not_there(free_port, monkeypatch):
    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    arguments = parser.parse_args(["--start_timeout=1"])
    for number, message in (
        (1, rf"--coordinator=127\.0\.0\.1:{free_port} does not answer within 1 s"),
        (0, r"--num_processes=2: process 1 did not come within 1 s"),
    ):
        for name, value in slurm(free_port, number).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=message), distributed.running(arguments):
            pass
    monkeypatch.setenv("SLURM_LOCALID", "no number")
    with pytest.raises(InputError, match=r"^the processes do not find each other: .*; give --coordinator, --num_proc"):
        distributed._detected(1)


def test_a_port_that_is_taken():
    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        arguments = parser.parse_args([f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--process_id=0"])
        with (
            pytest.raises(InputError, match=f"--coordinator: port {port} is not free"),
            distributed.running(arguments),
        ):
            pass


def test_processes_meet_among_strangers(free_port):
    """One that scans ports, one of another run, one that dies waiting; ours come after these."""

    def say(line: bytes) -> None:
        with socket.create_connection(("127.0.0.1", free_port)) as connection:
            connection.sendall(line)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(distributed._gather, free_port, 3, 20)
        while not first.done():
            try:
                say(b"GET / HTTP/1.1\r\n")
                break
            except ConnectionRefusedError:  # it does not listen yet
                time.sleep(0.01)
        say(b"gqa 1 of 2\n")
        say(b"gqa 2 of 3\n")
        others = [pool.submit(distributed._greet, "127.0.0.1", free_port, number, 3, 20) for number in (1, 2)]
        for each in (first, *others):
            each.result()


def test_greeting_nobody_but_itself(free_port, monkeypatch):
    """The system may give the connecting end the port that it connects to, where nobody listens."""
    address = ("127.0.0.1", free_port)
    connect = functools.partial(socket.create_connection, source_address=address)
    monkeypatch.setattr(distributed.socket, "create_connection", connect)
    with pytest.raises(InputError, match="does not answer within"):
        distributed._greet(*address, 1, 2, 0.5)


def test_something_else_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener, concurrent.futures.ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]

        def answer() -> None:
            greeting = b"gqa "
            while greeting == b"gqa ":
                with listener.accept()[0] as connection:
                    greeting = connection.recv(4)
                    connection.sendall(b"SSH-2.0\r\n")

        other = pool.submit(answer)
        with pytest.raises(InputError) as caught:
            distributed._greet("127.0.0.1", port, 1, 2, 0.5)
        socket.create_connection(("127.0.0.1", port)).close()
        other.result()
    assert str(caught.value) == (
        f"--coordinator=127.0.0.1:{port} does not answer within 0.5 s (something else listens there); is process 0 of "
        "--num_processes=2 running there, and is the port open?"
    )


@pytest.mark.parametrize(
    ("environment", "backend", "expected"),
    [
        ({}, "cpu", False),
        ({}, "tpu", True),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16"}, "gpu", True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, "gpu", False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, "gpu", False),  # a batch script without srun
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "gpu", False),  # a notebook in a pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, "gpu", True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "cpu", True),
    ],
)
def test_schedulers_are_recognised(environment, backend, expected):
    assert distributed.in_cluster(environment, backend) == expected


def main() -> None:
    strike, signal_name = int(sys.argv[1]), sys.argv[2]
    sys.argv[1:3] = []
    prefetch = loader.Batches.prefetch

    def observed(self, start_step, stop_step, depth):
        for step, batch in enumerate(prefetch(self, start_step, stop_step, depth), start_step):
            if step and step == strike:
                os.kill(os.getpid(), signal.Signals[signal_name])
                time.sleep(5)  # a run this short would end before JAX, which looks once a second, has told all
            print("read", json.dumps([step, list(self.rows), digest(batch["targets"])]), flush=True)
            yield batch

    loader.Batches.prefetch = observed
    command_line.run(train.main)


if __name__ == "__main__":
    main()
