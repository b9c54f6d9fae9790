import os

import pytest

from gqa.data import corpus
from gqa.errors import InputError


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def names(source, split=None):
    return [document.name for document in corpus.documents(source, split)]


def test_folder_gives_text_files_in_order_without_copies_and_undecodable_ones(tmp_path):
    source = write(
        tmp_path,
        {
            "b.py": b"b = 1\n",
            "a/z.txt": "été\n".encode(),
            "a/y.md": b"# y\n",
            "copy_of_b.py": b"\xef\xbb\xbfb = 1\n",  # with a byte order mark
            "blank.txt": b"\n\n",
            "latin1.txt": b"\xe9t\xe9\n",
            "image.png": b"not text",
        },
    )
    assert [(document.name, document.text) for document in corpus.documents(source)] == [
        ("a/y.md", "# y\n"),
        ("a/z.txt", "été\n"),
        ("b.py", "b = 1\n"),
    ]


def test_split_depends_on_the_name_alone(tmp_path):
    files = {f"{i}.txt": b"text %d" % i for i in range(400)}
    whole = write(tmp_path / "whole", files)
    part = write(tmp_path / "part", {name: files[name] + b" changed" for name in files if name.startswith("1")})
    heldout = set(names(whole, "heldout"))
    assert len(heldout) == 24  # of 400, by their SHA-256; 20 are expected
    assert set(names(whole, "train")) == set(files) - heldout
    assert set(names(part, "heldout")) == {name for name in heldout if name.startswith("1")}


def test_few_documents_still_hold_one_out(tmp_path):
    source = write(tmp_path, {"a.txt": b"a", "b.txt": b"b", "c.txt": b"c"})
    assert len(names(source, "train")) == 2
    assert len(names(source, "heldout")) == 1


def test_file_is_cut_into_blocks_of_lines(tmp_path):
    text = "".join(f"line {i}\n" for i in range(3000))
    path = tmp_path / "book.txt"
    path.write_text(text)
    blocks = list(corpus.documents(str(path)))
    assert [block.name for block in blocks] == ["book.txt:0", "book.txt:1", "book.txt:2", "book.txt:3"]
    assert "".join(block.text for block in blocks) == text
    assert all(block.text.endswith("\n") and len(block.text) < 8192 + 10 for block in blocks)
    assert {block.split for block in blocks} == {"train", "heldout"}


@pytest.mark.parametrize("blank", [" ", ""])
def test_long_lines_are_cut_too_between_words_if_there_are_any(blank, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("short\n" + blank.join(map(str, range(6000))) + blank)
    blocks = [block.text for block in corpus.documents(str(path))]
    assert "".join(blocks) == path.read_text()
    assert all(8192 <= len(block) <= 8192 + 10 for block in blocks[:-1])
    assert all(block.endswith(blank) for block in blocks) and len(blocks) > 2


def test_a_file_s_name_may_be_any_bytes(tmp_path):
    source = write(tmp_path, {f"{i}.txt": b"text %d" % i for i in range(5)})
    with open(os.path.join(os.fsencode(source), b"\xff.txt"), "wb") as file:
        file.write(b"text")
    found = corpus.Corpus(source)
    assert sorted(map(os.fsencode, found.names("train") + found.names("heldout")))[-1] == b"\xff.txt"
    assert len(found.digest("train")) == 16


def test_digest_follows_content_and_names_of_its_split(tmp_path):
    files = {f"{i}.txt": b"text %d" % i for i in range(60)}
    first = write(tmp_path / "first", files)
    same = write(tmp_path / "same", files)
    train_name = names(first, "train")[0]
    changed = write(tmp_path / "changed", {**files, train_name: b"other"})
    assert len(corpus.digest(first, "train")) == 16
    assert corpus.digest(first, "train") == corpus.digest(same, "train")
    assert corpus.digest(first, "train") != corpus.digest(changed, "train")
    assert corpus.digest(first, "heldout") == corpus.digest(changed, "heldout")
    assert corpus.digest(first, "train") != corpus.digest(first, "heldout")


def test_embedded_is_the_standard_library_and_keeps_its_split_in_embedded_large():
    small, large = corpus.Corpus("embedded"), corpus.Corpus("embedded_large")
    assert {"argparse.py", "json/decoder.py"} <= {*small.names("train"), *small.names("heldout")}
    for split in corpus.SPLITS:
        found = set(large.names(split))
        assert set(small.names(split)) <= found
        assert not [name for name in found if {"test", "tests", "__pycache__"} & set(name.split("/"))]
        assert any(name.startswith("jax/") for name in found)


def test_missing_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(InputError, match="source 'embeded' not found; expected embedded, embedded_large or a path"):
        corpus.Corpus("embeded")
    with pytest.raises(InputError, match="has 0 documents"):
        corpus.Corpus(str(tmp_path))
    (tmp_path / "only.txt").write_text("one")
    with pytest.raises(InputError, match="has 1 documents of text, none in the train split"):
        corpus.Corpus(str(tmp_path))
