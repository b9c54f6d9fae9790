"""Public datasets without a network: TFDS's mock data, a dataset that TFDS writes itself, and seqio's own pipeline.

Needs the extra `data`, and is run by `pytest -m tfds tests/parity/test_tfds_tasks.py`.
"""

import numpy as np
import pytest

from gqa.data import tables, tasks
from gqa.data.loader import heldout_batches, train_batches
from gqa.data.prepare import PrepareSpec, prepare
from gqa.errors import InputError

pytestmark = [
    pytest.mark.tfds,
    pytest.mark.filterwarnings("ignore"),  # of TensorFlow, Keras and protobuf, about each other
]

LENGTHS = {  # of rows: GQA §3.1, and T5's pre-training
    "c4_span_corruption": (512, 114),
    "c4_lm": (None, 512),
    "cnn_dailymail": (512, 256),
    "arxiv": (2048, 512),
    "pubmed": (2048, 512),
    "media_sum": (2048, 512),
    "multi_news": (2048, 512),
    "wmt14_en_de": (512, 256),
    "trivia_qa": (2048, 32),
}
NEWS = [("Ann says x+y.", "x+y"), ("Bob says z and z and z and z and z.", "z z z z z z z z z z")]


def test_every_public_task_is_here():
    public = {name for name, task in tasks.NAMED_TASKS.items() if (task.source or "").startswith("tfds:")}
    assert set(LENGTHS) == public


@pytest.mark.parametrize("name", LENGTHS)
def test_batches_of_mock_data_have_the_paper_s_lengths(name, tiny_vocabulary, tmp_path):
    import tensorflow_datasets as tfds

    spec = PrepareSpec(name, None, str(tiny_vocabulary), None, None)
    with tfds.testing.mock_data(num_examples=20):
        prepare(spec, tmp_path / "records")
        if (metric := tasks.NAMED_TASKS[name].metric) is not None:
            for split in ("train", "heldout", "test"):
                example = next(tasks.examples(name, split))
                assert example.targets == example.references[0]
                assert all(isinstance(text, str) for text in (example.inputs, *example.references)), metric
    inputs_length, targets_length = LENGTHS[name]
    for batch in (train_batches(tmp_path / "records", 2, seed=0)(0), heldout_batches(tmp_path / "records", 2, None)(0)):
        assert batch["targets"].shape == batch["loss_weights"].shape == (2, targets_length)
        assert batch["targets_segments"].any()
        assert ("inputs" in batch) == (inputs_length is not None)
        if inputs_length:
            assert batch["inputs"].shape == (2, inputs_length)


@pytest.fixture(scope="module")
def news(tmp_path_factory):
    """A folder with a dataset of two articles, `tiny_news`, written by TFDS."""
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds

    folder = str(tmp_path_factory.mktemp("tfds"))
    columns = {"article": [article for article, _ in NEWS], "highlights": [summary for _, summary in NEWS]}
    data = tf.data.Dataset.from_tensor_slices(columns)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny_news",
        version="1.0.0",
        features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in columns}),
        split_datasets={"train": data, "validation": data, "test": data},
        data_dir=folder,
    )
    seqio.set_tfds_data_dir_override(folder)
    yield folder
    seqio.set_tfds_data_dir_override(None)


@pytest.mark.usefixtures("news")
def test_prefix_targets_and_masks_of_a_dataset(tiny_vocabulary, tmp_path):
    fields = {"inputs": "article", "targets": "highlights"}
    spec = PrepareSpec("cnn_dailymail", "tfds:tiny_news:1.0.0", str(tiny_vocabulary), 64, 16, fields)
    manifest = prepare(spec, tmp_path / "records")
    assert manifest.num_documents == {"train": 2, "heldout": 2}
    assert manifest.num_trimmed["heldout"] == {"inputs": 0, "targets": 1}
    vocabulary = spec.open_vocabulary()
    batches = heldout_batches(tmp_path / "records", 1, None)
    rows = [{name: array[0] for name, array in batches(step).items()} for step in range(2)]
    row = min(rows, key=lambda row: row["loss_weights"].sum())  # TFDS shuffles what it writes
    assert row["inputs"][:24].tolist() == vocabulary.encode("summarize: Ann says x+y.")
    assert row["inputs"][24] == 1
    x, plus, y = vocabulary.encode("x+y")
    assert row["targets"].tolist() == [x, plus, y, 1] + [0] * 12
    assert row["loss_weights"].tolist() == [1] * 4 + [0] * 12
    assert row["decoder_inputs"].tolist() == [0, x, plus, y] + [0] * 12


@pytest.mark.usefixtures("news")
def test_rows_are_those_of_seqio_s_own_pipeline(tiny_vocabulary, tmp_path):
    """Tokens, trimming and EOS; seqio's packing is its own, so each example has a row to itself."""
    import seqio
    import tensorflow as tf

    vocabulary = seqio.SentencePieceVocabulary(str(tiny_vocabulary), extra_ids=100)
    features = {name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}
    seqio.TaskRegistry.add(
        "tiny_news",
        source=seqio.TfdsDataSource(tfds_name="tiny_news:1.0.0"),
        preprocessors=[
            lambda dataset: dataset.map(
                lambda row: {"inputs": tf.strings.join(["summarize: ", row["article"]]), "targets": row["highlights"]}
            ),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=features,
    )
    lengths = {"inputs": 24, "targets": 16}
    dataset = seqio.get_mixture_or_task("tiny_news").get_dataset(lengths, "train", shuffle=False)
    expected = list(seqio.EncDecFeatureConverter(pack=False)(dataset, lengths).as_numpy_iterator())
    fields = {"inputs": "article", "targets": "highlights"}
    spec = PrepareSpec("cnn_dailymail", "tfds:tiny_news:1.0.0", str(tiny_vocabulary), 24, 16, fields)
    prepare(spec, tmp_path / "records")
    batches = heldout_batches(tmp_path / "records", 1, None)
    assert len(batches) == len(expected) == 2
    for found, theirs in zip(map(batches, range(2)), expected, strict=True):
        np.testing.assert_array_equal(found["inputs"][0], theirs["encoder_input_tokens"])
        np.testing.assert_array_equal(found["targets"][0], theirs["decoder_target_tokens"])
        np.testing.assert_array_equal(found["loss_weights"][0], theirs["decoder_loss_weights"])
        weighted = found["loss_weights"][0] > 0  # behind them, seqio shifts one EOS more
        np.testing.assert_array_equal(found["decoder_inputs"][0][weighted], theirs["decoder_input_tokens"][weighted])


def test_an_absent_dataset_is_refused():
    with pytest.raises(InputError, match=r"^dataset no_such_news:1\.0\.0 is not there and cannot be downloaded: .+$"):
        next(tasks.examples("cnn_dailymail", "train", source="tfds:no_such_news:1.0.0"))


def test_parquet_reads_as_the_other_tables_do(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"q": ["x", None, "z"], "id": [1, 2, 3], "a": ["1", "2", "3"]}), path)
    rows = list(tables.read_rows(path, {"inputs": "q", "targets": "a"}))
    assert rows[::2] == [{"inputs": "x", "targets": "1"}, {"inputs": "z", "targets": "3"}]
    assert str(rows[1]) == f"{path} row 2: 'q' is a NoneType; expected a text"
    with pytest.raises(InputError, match=r"a\.parquet has no column 'b' among q, id, a"):
        list(tables.read_rows(path, {"text": "b"}))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"a\.parquet is no whole Parquet file"):
        list(tables.read_rows(path, {"text": "q"}))
