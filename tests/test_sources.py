"""The sources, for real: Python's own library, a folder of mixed files, and both hub data sets from a loopback hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightshift import config, data, sources, tokenizer
from nightshift.values import Stop
from tests.hub import Hub, serving

PREPARE = """
import json, sys
from nightshift import config, data
from nightshift.values import Stop
try:
    print(data.prepare(config.load(**json.loads(sys.argv[1]))).digest)
except Stop as stop:
    print(stop, file=sys.stderr)
    sys.exit(stop.code)
"""
SMALL: dict[str, Any] = {"profile": "demo", "vocab_size": 300, "seq_len": 32, "val_tokens": 320}
CLIMBMIX = SMALL | {"profile": "single", "source": "climbmix", "train_tokens": 60_000_000}
FINEWEB: dict[str, Any] = {"profile": "speedrun", "seq_len": 16, "val_tokens": 320, "train_tokens": 150_000_000}
LAST = "datasets/karpathy/climbmix-400b-shuffle/shard_06542.parquet"
FIRST = "datasets/karpathy/climbmix-400b-shuffle/shard_00000.parquet"
SECOND = "datasets/karpathy/climbmix-400b-shuffle/shard_00001.parquet"
FINEWEB_VAL = "datasets/kjj0/fineweb10B-gpt2/fineweb_val_000000.bin"
FINEWEB_TRAIN = "datasets/kjj0/fineweb10B-gpt2/fineweb_train_00000{}.bin"


def start(flags: dict[str, Any], home: Path, hub_url: str = "") -> subprocess.Popen[str]:
    """A process that prepares; without a hub, nobody answers there."""
    env = dict(os.environ) | {"NIGHTSHIFT_DATA": str(home), "HF_ENDPOINT": hub_url or "http://127.0.0.1:9"}
    argv = [sys.executable, "-c", PREPARE, json.dumps(flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, cwd=config.ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def prepare(flags: dict[str, Any], home: Path, hub_url: str = "") -> tuple[int, str, str]:
    """Return code, standard output and standard error of a whole preparation."""
    process = start(flags, home, hub_url)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def opened(flags: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(home))
    dataset = data.open_dataset(config.load(**flags))
    data.verify_digests(dataset)
    return dataset


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def train_text(dataset: data.Dataset) -> list[str]:
    """The training documents, decoded, split at doc_starts."""
    decode = tokenizer.Tokenizer.load(dataset.root / "tokenizer.json").encoding.decode
    texts = []
    for shard, starts in zip(dataset.shards, dataset.doc_starts, strict=True):
        tokens = data.read_shard_tokens(shard)
        for document in np.split(tokens, np.load(starts)[1:]):
            assert document[0] == dataset.bos_id
            texts.append(decode(document[1:].tolist()))
    return texts


def story(number: int, words: int = 40) -> str:
    return " ".join(f"word{(number * 7 + n * n) % 97}" for n in range(words)) + f". The end of {number}, naïvely 😀.\n"


def parquet(path: Path, texts: list[str | None]) -> bytes:
    pq.write_table(pa.table({"text": texts, "other": list(range(len(texts)))}), path, row_group_size=50)
    return path.read_bytes()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Parquet, jsonl and txt in nested folders, one file of them the val split."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    parquet(folder / "a.parquet", [story(n) for n in range(200)] + [None, ""])
    lines = [json.dumps({"text": story(n), "id": n}) for n in range(200, 300)]
    (folder / "deep" / "b.jsonl").write_text("\n".join(lines) + "\n\n" + '{"text": "half a pair \\ud83d."}\n')
    (folder / "deep" / "c.txt").write_text("".join(story(n) for n in range(300, 500)), newline="")
    (folder / "validation.jsonl").write_text("\n".join(json.dumps({"text": story(n)}) for n in range(500, 540)))
    (folder / "notes.md").write_text("not read")
    return folder


# ---- python


def test_python_source_has_three_disjoint_splits_and_full_rows() -> None:
    demo = config.load(profile="demo")
    documents = list(sources.python(demo).documents())
    assert documents == list(sources.python(demo).documents())
    texts = {split: {text for s, text in documents if s == split} for split in ("train", "val", "test")}
    assert not texts["train"] & texts["val"] and not texts["train"] & texts["test"] and not texts["val"] & texts["test"]
    assert sum(len(text) for text in texts["train"]) > 20e6
    rows = demo.val_tokens // demo.seq_len
    assert len(texts["val"]) > rows and len(texts["test"]) > rows
    assert max(len(text) for _, text in documents) == sources.DOCUMENT_CHARS


@pytest.mark.slow
def test_demo_is_prepared_whole_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = prepare({"profile": "demo"}, tmp_path)
    assert (code, err) == (0, "")
    assert "learning a vocabulary of 1024" in out
    dataset = opened({"profile": "demo"}, tmp_path, monkeypatch)
    assert dataset.rows("val").shape == dataset.rows("test").shape == (128, 257)
    assert (dataset.rows("val")[:, 0] == dataset.bos_id).all()
    assert sum(len(data.read_shard_tokens(shard)) for shard in dataset.shards) > 5_000_000


# ---- local:DIR


def test_local_reads_every_kind_of_file(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = SMALL | {"source": f"local:{corpus}"}
    code, out, err = prepare(flags, tmp_path / "home")
    assert (code, err) == (0, "")
    dataset = opened(flags, tmp_path / "home", monkeypatch)
    assert out.splitlines()[-1] == dataset.digest
    texts = train_text(dataset)
    assert any(text == "half a pair ?." for text in texts)
    written = {story(n) for n in range(300)}
    held_out = written - set(texts)
    assert 1 <= len(held_out) <= 25  # the test split, by hash, out of the parquet and jsonl files
    assert not {story(n) for n in range(500, 540)} & set(texts)
    assert texts != sorted(texts, key=lambda text: int(text.rpartition("of ")[2].partition(",")[0] or 0))
    assert dataset.manifest["counts"]["train"]["documents"] == len(texts)
    assert (dataset.rows("val")[:, 0] == dataset.bos_id).all()


def test_local_prepares_again_when_its_files_change(corpus: Path, tmp_path: Path) -> None:
    flags = SMALL | {"source": f"local:{corpus}"}
    first = prepare(flags, tmp_path / "home")[1].splitlines()
    assert prepare(flags, tmp_path / "home")[1].splitlines() == first[-1:]  # nothing to do, nothing to say
    (corpus / "more.txt").write_text(story(1000))
    again = prepare(flags, tmp_path / "home")[1].splitlines()
    assert again[0].startswith("preparing again") and again[-1] != first[-1]


def test_one_long_text_alone_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "shakespeare.txt").write_text("".join(story(n) for n in range(1000)))
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "home"))
    dataset = data.prepare(config.load(**SMALL, source=f"local:{folder}", train_tokens=30_000), quiet=True)
    assert len(dataset.rows("val")) >= 1 and len(dataset.rows("test")) >= 1
    assert 30_000 <= dataset.manifest["counts"]["train"]["tokens"] < 60_000


def test_a_million_spaces_are_only_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    odd = "start" + " " * 2_000_000 + "end <|bos|>"
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [odd, *map(story, range(100))]))
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "home"))
    dataset = data.prepare(config.load(**SMALL, source=f"local:{folder}"), quiet=True)
    texts = train_text(dataset)
    assert odd in texts or len(texts) < 95


BAD_FILES = {
    "bad.parquet": (b"PAR1 but not really", "bad.parquet"),
    "bad.jsonl": (b'{"text": "fine"}\n{"txt": 1}\n', "line 2"),
    "bad.txt": (b"\xff\xfe\x00", "bad.txt"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_local_file_is_named(name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, expected = BAD_FILES[name]
    (corpus / "deep" / name).write_bytes(content)
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "home"))
    with pytest.raises(Stop, match=f"{name}.*python prepare.py --profile demo --source 'local:|{name}") as stop:
        data.prepare(config.load(**SMALL, source=f"local:{corpus}"), quiet=True)
    assert expected in str(stop.value) and "\n" not in str(stop.value) and str(corpus) in str(stop.value)


def test_parquet_without_text_is_named(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "home"))
    pq.write_table(pa.table({"content": ["x"]}), corpus / "z.parquet")
    with pytest.raises(Stop, match=r"z\.parquet: no column text, but content"):
        data.prepare(config.load(**SMALL, source=f"local:{corpus}"), quiet=True)
    pq.write_table(pa.table({"text": [1]}), corpus / "z.parquet")
    with pytest.raises(Stop, match=r"z\.parquet: the column text holds int64"):
        data.prepare(config.load(**SMALL, source=f"local:{corpus}"), quiet=True)


def test_a_folder_without_documents_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "home"))
    with pytest.raises(Stop, match="empty: holds no documents"):
        (tmp_path / "empty").mkdir()
        data.prepare(config.load(**SMALL, source=f"local:{tmp_path / 'empty'}"), quiet=True)
    with pytest.raises(Stop, match="gone: no such folder"):
        data.prepare(config.load(**SMALL, source=f"local:{tmp_path / 'gone'}"), quiet=True)
    with pytest.raises(Stop, match="did you mean climbmix"):
        data.prepare(config.load(**SMALL, source="climbmx"), quiet=True)


# ---- interrupted, repeated, at the same time


def test_killed_at_any_moment_and_repeated_ends_the_same(corpus: Path, tmp_path: Path) -> None:
    (corpus / "long.txt").write_text("".join(story(n, words=200) for n in range(2000)))
    flags = SMALL | {"source": f"local:{corpus}"}
    assert prepare(flags, tmp_path / "undisturbed")[0] == 0
    (whole,) = [path for path in (tmp_path / "undisturbed").iterdir() if path.is_dir()]
    home = tmp_path / "home"
    part = home / (whole.name + ".part")
    for milestone in ("", "tokenizer.json", "spool", "train_000000.bin", "manifest.json"):
        process = start(flags, home)
        while not (part / milestone).exists() and process.poll() is None:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (home / whole.name).exists():
            assert tree(home / whole.name) == tree(whole)
    assert prepare(flags, home)[0] == 0
    assert tree(home / whole.name) == tree(whole)
    assert sorted(path.name for path in home.iterdir()) == [whole.name, whole.name + ".lock"]


def test_a_second_process_waits_for_the_first(corpus: Path, tmp_path: Path) -> None:
    flags = SMALL | {"source": f"local:{corpus}"}
    processes = [start(flags, tmp_path / "home") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert outputs[0][-1] == outputs[1][-1]
    assert sum("waiting for it" in output[0] for output in outputs) == 1
    assert sum(any("learning a vocabulary" in line for line in output) for output in outputs) == 1


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
    hub.cut_after[SECOND] = len(hub.files[SECOND]) // 2
    code, _, err = prepare(CLIMBMIX, tmp_path / "home", hub.url)
    assert code == 0, err
    asked = [bytes_range for method, name, bytes_range in hub.requests if (method, name) == ("GET", SECOND)]
    assert len(asked) == 2 and asked[1].startswith("bytes=") and int(asked[1][6:].partition("-")[0]) > 0
    dataset = opened(CLIMBMIX, tmp_path / "home", monkeypatch)
    assert train_text(dataset) == [story(n) for n in range(600)]
    assert dataset.rows("val").shape == dataset.rows("test").shape == (10, 33)
    before = len(hub.requests)
    assert prepare(CLIMBMIX, tmp_path / "home", hub.url)[0] == 0
    assert len(hub.requests) == before  # whole already: the hub is not asked


def test_killed_download_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    hub.files[FIRST] = parquet(tmp_path / "big.parquet", [os.urandom(500).hex() for _ in range(30_000)])
    process = start(CLIMBMIX, tmp_path / "home", hub.url)
    while not any(path.stat().st_size > 0 for path in tmp_path.glob("home/hub/**/*.incomplete")):
        assert process.poll() is None
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    del hub.requests[:]
    assert prepare(CLIMBMIX, tmp_path / "home", hub.url)[0] == 0
    assert any(name == FIRST and method == "GET" for method, name, _ in hub.requests)


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
    for url, name in ((hub.url, "shard_00001.parquet"), ("", "shard_00001.parquet"), ("", "shard_00000.parquet")):
        home = tmp_path / "home" if name == "shard_00001.parquet" else tmp_path / "empty"
        code, _, err = prepare(CLIMBMIX, home, url)
        assert code == 1 and err.strip().splitlines()[-1].startswith("climbmix: ")
        assert name in err and "`python prepare.py --profile demo`" in err and "Traceback" not in err
        assert err.count("\n") == 1


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
            data.prepare(config.load(**flags), quiet=True)
        assert stop.value.code == 2
