"""Named data sets; nothing here touches the network."""

import sys

import pytest

from awqc.calibration import all_tokens, load_tokens
from awqc.calibration.hub import find_dataset
from awqc.errors import CalibrationError

datasets = pytest.importorskip("datasets")

WAY_OUT = "or give a .txt, .jsonl or .parquet file, or calib='self'"


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: ``hub.rows`` is what any data set holds, ``hub.asked`` what was asked for."""

    class Hub:
        rows: list = []
        asked: list = []
        fetched = 0

        def load(self, path, name, *, split, streaming):
            self.asked.append((path, name, split, streaming))
            return self.stream()

        def stream(self):
            for row in self.rows:
                self.fetched += 1
                yield row

    hub = Hub()
    hub.asked = []
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    return hub


@pytest.mark.parametrize(
    ("calib", "split", "asked"),
    [
        ("pileval", None, ("mit-han-lab/pile-val-backup", None, "validation", True)),
        ("wikitext", None, ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True)),
        (
            "wikitext:wikitext-103-raw-v1",
            "test",
            ("Salesforce/wikitext", "wikitext-103-raw-v1", "test", True),
        ),
        ("c4", None, ("allenai/c4", "en", "train", True)),
        ("someone/something", None, ("someone/something", None, "train", True)),
        ("someone/something:de", "dev", ("someone/something", "de", "dev", True)),
    ],
)
def test_names(hub, tokenizer, calib, split, asked):
    hub.rows = [{"text": "w1 w2\n"}]
    found = load_tokens(calib, tokenizer=tokenizer, split=split)
    assert hub.asked == [asked]
    assert found.ids.tolist() == [[7, 8]]
    assert found.source == f"the {find_dataset(calib, split)}"


def test_the_source_names_config_and_split():
    assert str(find_dataset("c4", None)) == "data set allenai/c4:en [train]"
    assert str(find_dataset("a/b", "dev")) == "data set a/b [dev]"


def test_only_what_is_needed_is_fetched(hub, tokenizer):
    hub.rows = [{"text": f"w{n % 90} " * 20} for n in range(10_000)]
    found = load_tokens("a/b", tokenizer=tokenizer, max_calib_samples=4, max_calib_seq_len=10)
    assert found.ids.shape == (4, 10)
    assert len({row[0].item() for row in found.ids}) == 4
    assert hub.fetched < 50


def test_a_long_document_does_not_fill_all_blocks(hub, tokenizer):
    hub.rows = [{"text": f"w{n} " * 10_000} for n in range(10, 30)]
    found = load_tokens("a/b", tokenizer=tokenizer, max_calib_samples=4, max_calib_seq_len=10)
    assert len({row[0].item() for row in found.ids}) == 4


def test_rows_that_are_lines_are_joined_to_one_text(hub, tokenizer):
    hub.rows = [{"text": "w1 w2\n"}, {"text": ""}, {"text": "w3\n"}]
    assert load_tokens("wikitext", tokenizer=tokenizer).ids.tolist() == [[7, 8, 9]]
    assert all_tokens("wikitext", tokenizer=tokenizer).tolist() == [7, 8, 9]
    assert load_tokens("c4", tokenizer=tokenizer).ids.tolist() == [[7, 8, 0, 9]]


def test_columns_of_a_data_set(hub, tokenizer):
    hub.rows = [{"title": "w1", "body": "w2"}]
    assert load_tokens("a/b", tokenizer=tokenizer, column="body").ids.tolist() == [[8]]
    with pytest.raises(CalibrationError) as error:
        load_tokens("a/b", tokenizer=tokenizer, column="text")
    assert str(error.value) == (
        "item 0 of the data set a/b [train] has no column 'text': its columns are 'title', 'body'"
    )


def test_an_empty_data_set(hub, tokenizer):
    hub.rows = [{"text": ""}]
    with pytest.raises(CalibrationError) as error:
        load_tokens("wikitext", tokenizer=tokenizer)
    assert str(error.value) == (
        "no calibration tokens: the data set Salesforce/wikitext:wikitext-2-raw-v1 [train] is empty; "
        "give text or token ids, or calib='self'"
    )


def test_no_network(tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError) as error:
        load_tokens("pileval", tokenizer=tokenizer)
    message = str(error.value)
    assert message.startswith(
        "calib='pileval' is no local file, and the data set mit-han-lab/pile-val-backup [validation] "
        "cannot be fetched ("
    )
    assert message.endswith(f"): check the name and the network, {WAY_OUT}")


def test_network_lost_on_the_way(hub, tokenizer):
    def stream():
        yield {"text": "w1"}
        raise ConnectionError("connection reset\nby peer")

    hub.stream = stream
    with pytest.raises(CalibrationError) as error:
        load_tokens("a/b", tokenizer=tokenizer)
    assert str(error.value) == (
        "calib='a/b' is no local file, and the data set a/b [train] cannot be fetched (connection reset): "
        f"check the name and the network, {WAY_OUT}"
    )


def test_without_the_datasets_package(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError) as error:
        load_tokens("c4", tokenizer=tokenizer)
    assert str(error.value) == (
        "calib='c4' is no local file, and reading the data set allenai/c4:en [train] needs the datasets "
        f"package: pip install 'awqc[data]', {WAY_OUT}"
    )
