"""What is in a journal, and what only looks like one."""

import pytest

from gqa.decode.journal import append, open_journal
from gqa.errors import InputError

IDENTITY = {"input": "a", "settings": [1]}


def opened(path, identity=IDENTITY):
    with open(path, "ab+") as file:
        return open_journal(file, path, identity)


def test_results_come_back_and_a_torn_line_goes(tmp_path):
    path = tmp_path / "journal"
    with open(path, "ab+") as file:
        assert open_journal(file, path, IDENTITY) == {}
        append(file, 3, [1, 2])
        append(file, 1, [])
    whole = path.read_bytes()
    path.write_bytes(whole + b"[2, [5")
    assert opened(path) == {3: [1, 2], 1: []} and path.read_bytes() == whole


@pytest.mark.parametrize(
    ("identity", "wrong"),
    [({**IDENTITY, "input": "b"}, "input"), ({"input": "a"}, "settings"), ({**IDENTITY, "more": 1}, "more")],
)
def test_results_of_another_run(tmp_path, identity, wrong):
    path = tmp_path / "journal"
    with open(path, "ab+") as file:
        open_journal(file, path, IDENTITY)
        append(file, 3, [1, 2])
    whole = path.read_bytes()
    with pytest.raises(InputError, match=f"holds a run with another {wrong}; delete it"):
        opened(path, identity)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"5\n6\n", b"[1]\n[1,[2]]\n", b'{"a": 1}\n{"b": 2}\n', b'{"a": 1}\n[[1], [2]]\n'])
def test_no_journal(tmp_path, content):
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no journal of this command's; delete it or name another"):
        opened(path)
    assert path.read_bytes() == content
