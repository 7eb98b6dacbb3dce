"""ClimbMix and FineWeb through huggingface_hub itself, from a hub on loopback: real small files, faults included."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub, serving
from preparations import SMALL, opened, parquet, prepare, start, story, train_text

from nightshift import config, data, preparing, tokenizer
from nightshift.values import Stop

CLIMBMIX = SMALL | {"profile": "single", "source": "climbmix", "train_tokens": 60_000_000}
FINEWEB: dict[str, Any] = {"profile": "speedrun", "seq_len": 16, "val_tokens": 320, "train_tokens": 150_000_000}
LAST = "datasets/karpathy/climbmix-400b-shuffle/shard_06542.parquet"
FIRST = "datasets/karpathy/climbmix-400b-shuffle/shard_00000.parquet"
SECOND = "datasets/karpathy/climbmix-400b-shuffle/shard_00001.parquet"
FINEWEB_VAL = "datasets/kjj0/fineweb10B-gpt2/fineweb_val_000000.bin"
FINEWEB_TRAIN = "datasets/kjj0/fineweb10B-gpt2/fineweb_train_00000{}.bin"


# ---- climbmix


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files = {
        FIRST: parquet(tmp_path / "0.parquet", [story(n) for n in range(300)] + [None]),
        SECOND: parquet(tmp_path / "1.parquet", [story(n) for n in range(300, 600)]),
        LAST: parquet(tmp_path / "last.parquet", [story(n) for n in range(600, 700)]),
    }
    with serving(Hub(files)) as hub:
        yield hub


def test_climbmix_keeps_its_order_and_resumes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padding = [os.urandom(30_000) for _ in range(300)] * 2  # the hub library writes 10 MiB at a time
    table = pa.table({"text": [story(n) for n in range(600)], "padding": padding})
    pq.write_table(table, tmp_path / "0.parquet", use_dictionary=False, compression="none")
    hub.files[FIRST] = (tmp_path / "0.parquet").read_bytes()
    hub.cut_after[FIRST] = 15_000_000
    code, _, err = prepare(CLIMBMIX, tmp_path / "home", hub.url)
    assert (code, err) == (0, "")
    asked = [bytes_range for method, name, bytes_range in hub.requests if (method, name) == ("GET", FIRST)]
    assert asked == ["", "bytes=10485760-"]
    dataset = opened(CLIMBMIX, tmp_path / "home", monkeypatch)
    assert train_text(dataset) == [story(n) for n in (*range(600), *range(300, 600))]
    assert dataset.rows("val").shape == dataset.rows("test").shape == (10, 33)
    before = len(hub.requests)
    assert prepare(CLIMBMIX, tmp_path / "home", hub.url)[0] == 0
    assert len(hub.requests) == before  # whole already: the hub is not asked


def test_killed_download_leaves_nothing_and_is_repeated(hub: Hub, tmp_path: Path) -> None:
    hub.hold[SECOND] = threading.Event()
    process = start(CLIMBMIX, tmp_path / "home", hub.url)
    while not (("GET", SECOND, "") in hub.requests and list(tmp_path.glob("home/hub/**/*.incomplete"))):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.hold.pop(SECOND).set()
    assert prepare(CLIMBMIX, tmp_path / "home", hub.url)[0] == 0
    assert not list(tmp_path.glob("home/hub/**/*.incomplete"))
    fetched = [name for method, name, _ in hub.requests if method == "GET" and name in hub.files]
    assert fetched == [FIRST, SECOND, SECOND, LAST]


@pytest.mark.parametrize("fault", ["not parquet", "bytes flipped", "cut short"])
def test_corrupt_shard_is_named_and_mended_by_repeating(fault: str, hub: Hub, tmp_path: Path) -> None:
    good = hub.files[FIRST]
    middle = len(good) // 4
    flipped = good[:middle] + bytes(255 - b for b in good[middle : middle + 200]) + good[middle + 200 :]
    hub.files[FIRST] = {"not parquet": b"<html>sorry</html>", "bytes flipped": flipped, "cut short": good[:-100]}[fault]
    if fault == "bytes flipped":
        hub.etags[FIRST] = Hub({FIRST: good}).etag(FIRST)  # the hub tells the digest that was published
    code, _, err = prepare(CLIMBMIX, tmp_path / "home", hub.url)
    assert code == 1 and err.count("\n") == 1
    assert "shard_00000.parquet" in err and "`python prepare.py --profile single`" in err
    hub.files[FIRST] = good
    hub.etags.clear()
    assert prepare(CLIMBMIX, tmp_path / "home", hub.url)[0] == 0


def test_missing_shard_and_no_network_are_one_line(hub: Hub, tmp_path: Path) -> None:
    del hub.files[SECOND]
    embedded = "`python prepare.py --profile demo`"
    code, _, err = prepare(CLIMBMIX, tmp_path / "home", hub.url)
    assert (code, err.count("\n")) == (1, 1) and "no file shard_00001.parquet" in err and embedded in err
    started = time.monotonic()
    code, _, err = prepare(CLIMBMIX, tmp_path / "empty")
    assert (code, err.count("\n")) == (1, 1) and embedded in err and err.startswith("climbmix: ")
    assert "`python prepare.py --profile single` tries again" in err and time.monotonic() - started < 10


def test_what_is_downloaded_needs_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(CLIMBMIX, tmp_path / "home", hub.url)[0] == 0
    other = CLIMBMIX | {"vocab_size": 280}
    code, _, err = prepare(other, tmp_path / "home")
    assert (code, err) == (0, "")
    assert train_text(opened(other, tmp_path / "home", monkeypatch)) == [story(n) for n in range(600)]


# ---- fineweb10B


def gpt2_vocab() -> dict[str, int]:
    """As many entries as GPT-2 has, in its alphabet: single bytes first, then pairs."""
    alphabet = list(tokenizer._gpt2_bytes())
    words = alphabet + [a + b for a in alphabet for b in alphabet]
    return {word: n for n, word in enumerate(words[:50256])} | {"<|endoftext|>": 50256}


def shard(path: Path, tokens: np.ndarray) -> bytes:
    data.write_shard(path, tokens)
    return path.read_bytes()


@pytest.fixture
def fineweb(tmp_path: Path) -> Iterator[tuple[Hub, list[np.ndarray]]]:
    dice = np.random.default_rng(0)
    shards = [dice.integers(0, 50256, size, dtype=np.uint16) for size in (1000, 5000, 4000)]
    for tokens in shards:
        tokens[::100] = 50256
    hub = Hub({FINEWEB_VAL: shard(tmp_path / "val.bin", shards[0])})
    hub.files |= {FINEWEB_TRAIN.format(n): shard(tmp_path / f"{n}.bin", shards[n]) for n in (1, 2)}
    hub.files["openai-community/gpt2/vocab.json"] = json.dumps(gpt2_vocab()).encode()
    hub.etags["openai-community/gpt2/vocab.json"] = "a" * 40  # the hub names small files by their git hash
    with serving(hub):
        yield hub, shards


def test_fineweb_is_read_as_published(
    fineweb: tuple[Hub, list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, (val, *train) = fineweb
    code, _, err = prepare(FINEWEB, tmp_path / "home", hub.url)
    assert code == 0, err
    dataset = opened(FINEWEB, tmp_path / "home", monkeypatch)
    assert (dataset.vocab_size, dataset.bos_id, len(dataset.shards)) == (50257, 50256, 2)
    assert [path.read_bytes() for path in dataset.shards] == [hub.files[FINEWEB_TRAIN.format(n)] for n in (1, 2)]
    assert np.load(dataset.doc_starts[0]).tolist() == list(range(0, 5000, 100))
    for rows, first in ((dataset.rows("val"), 0), (dataset.rows("test"), 320)):
        assert rows.shape == (20, 17) and rows.dtype == np.uint16
        assert rows[:, :-1].ravel().tolist() == val[first : first + 320].tolist()
        assert rows[:, 1:].ravel().tolist() == val[first + 1 : first + 321].tolist()
    lengths = dataset.token_bytes()
    assert lengths[[0, 255, 256, 50255, 50256]].tolist() == [1, 1, 2, 2, 0] and lengths.shape == (50257,)
    assert dataset.manifest["counts"]["train"] == {"documents": 90, "tokens": 9000}


@pytest.mark.parametrize("fault", ["wrong header", "cut short"])
def test_corrupt_bin_is_named_and_mended_by_repeating(
    fault: str, fineweb: tuple[Hub, list[np.ndarray]], tmp_path: Path
) -> None:
    hub, _ = fineweb
    name = FINEWEB_TRAIN.format(2)
    good = hub.files[name]
    hub.files[name] = b"\0" * 4 + good[4:] if fault == "wrong header" else good[:-2]
    code, _, err = prepare(FINEWEB, tmp_path / "home", hub.url)
    assert code == 1 and err.count("\n") == 1
    assert "fineweb_train_000002.bin" in err and "`python prepare.py --profile speedrun`" in err
    hub.files[name] = good
    assert prepare(FINEWEB, tmp_path / "home", hub.url)[0] == 0


def test_a_shard_damaged_on_disk_is_fetched_again(
    fineweb: tuple[Hub, list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, _ = fineweb
    assert prepare(FINEWEB, tmp_path / "home", hub.url)[0] == 0
    dataset = opened(FINEWEB, tmp_path / "home", monkeypatch)
    with dataset.shards[1].open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(Stop, match="train_000001.bin: changed"):
        data.verify_digests(dataset)
    assert prepare(FINEWEB, tmp_path / "home", hub.url)[0] == 1  # the download is the same file: it is removed
    assert prepare(FINEWEB, tmp_path / "home", hub.url)[0] == 0
    assert opened(FINEWEB, tmp_path / "home", monkeypatch).digest == dataset.digest


def test_fineweb_wants_its_own_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path))
    for flags in ({"profile": "demo", "source": "fineweb10B"}, {"profile": "speedrun", "seq_len": 1000}):
        with pytest.raises(Stop, match="--profile speedrun") as stop:
            preparing.prepare(config.load(**flags), quiet=True)
        assert stop.value.code == 2
