"""What a night and a run read: shards, packed rows, token lengths, manifest and digests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift import config, data, preparing, tokenizer
from nightshift.config import Config
from nightshift.packing import HeldOut, pack
from nightshift.tokenizer import Tokenizer
from nightshift.values import Stop

TEXT = [f"def f{n}(x):\n    return x * {n}  # naïve, 東京 😀\n" for n in range(300)]
WORDS = tokenizer.train(TEXT, 320)
BOS = 9999


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A config whose data set is prepared."""
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "home"))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(json.dumps({"text": text * 3}) for text in TEXT))
    source = f"local:{tmp_path / 'corpus'}"
    made = config.load(profile="demo", source=source, vocab_size=300, seq_len=32, val_tokens=320)
    preparing.prepare(made, quiet=True)
    return made


# ---- shards


@given(tokens=st.lists(st.integers(0, 65535), min_size=1, max_size=50))
@settings(max_examples=30, deadline=None)
def test_shard_round_trip_by_path_and_descriptor(tmp_path_factory: pytest.TempPathFactory, tokens: list[int]) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    data.write_shard(path, np.array(tokens, dtype=np.uint16))
    header = np.frombuffer(path.read_bytes()[:1024], dtype=np.int32)
    assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
    fd = os.open(path, os.O_RDONLY)
    try:
        for source in (path, fd, fd):
            read = data.read_shard_tokens(source)
            assert isinstance(read, np.memmap) and read.dtype == np.uint16 and read.tolist() == tokens
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("words", "body"),
    [((1, 1, 4), 8), ((20240520, 2, 4), 8), ((20240520, 1, 4), 6), ((20240520, 1, 4), 10), ((20240520, 1, 0), 0)],
)
def test_bad_shard_is_named(words: tuple[int, ...], body: int, tmp_path: Path) -> None:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = words
    (tmp_path / "x.bin").write_bytes(header.tobytes() + b"\0" * body)
    with pytest.raises(Stop, match=r"x\.bin: "):
        data.read_shard_tokens(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(Stop, match=r"x\.bin: not a token shard"):
        data.read_shard_tokens(tmp_path / "x.bin")


# ---- rows


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose tokens tell where they are from: BOS, then 1, 2, 3 ... from a start of their own."""
    starts = np.cumsum([0, *lengths])
    return [np.array([BOS, *range(s, s + n - 1)], dtype=np.uint16) for s, n in zip(starts, lengths, strict=False)]


@given(lengths=st.lists(st.integers(2, 40), max_size=120), seq_len=st.integers(1, 16), num_rows=st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_rows_are_full_and_made_of_document_heads(lengths: list[int], seq_len: int, num_rows: int) -> None:
    documents = documents_of(lengths)
    rows = pack(documents, seq_len, num_rows)
    assert rows.shape[1] == seq_len + 1 and len(rows) <= num_rows
    assert len(rows) >= min(num_rows, sum(min(n, seq_len + 1) for n in lengths) // (2 * (seq_len + 1)))
    whole: list[list[int]] = []
    cropped: list[list[int]] = []
    for row in rows:
        assert row[0] == BOS
        *before, last = (part.tolist() for part in np.split(row, np.flatnonzero(row == BOS)[1:]))
        whole += before
        cropped.append(last)  # or whole, where it happens to end there
    unused = [document.tolist() for document in documents]
    for part in whole:
        unused.remove(part)  # each document is used once
    for part in sorted(cropped, key=len, reverse=True):
        unused.remove(next(document for document in unused if document[: len(part)] == part))


def test_best_fit_takes_the_longest_that_fits_then_crops_the_shortest() -> None:
    documents = documents_of([9, 3, 5, 7, 2, 20])
    row = pack(documents, seq_len=9, num_rows=1)[0].tolist()
    assert row == [*documents[0].tolist(), BOS]  # 9 fits 10; then nothing fits the 1 left, and 2 is cropped to it


@given(lengths=st.lists(st.integers(1, 40), max_size=200), seq_len=st.integers(1, 12), num_rows=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_what_held_out_drops_is_never_missed(lengths: list[int], seq_len: int, num_rows: int) -> None:
    held = HeldOut(seq_len, num_rows)
    for document in documents_of(lengths):
        held.add(document)
    assert len(held.documents) == len(lengths) or held.full
    rows = pack(held.documents, seq_len, num_rows)
    assert len(rows) == len(pack(documents_of(lengths), seq_len, num_rows))
    if held.full:
        assert len(rows) == num_rows


@given(lengths=st.lists(st.integers(1, 40), max_size=60), seq_len=st.integers(1, 12), num_rows=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_rows_end_to_end_predict_each_token_once(lengths: list[int], seq_len: int, num_rows: int) -> None:
    held = HeldOut(seq_len, num_rows, end_to_end=True)
    for document in documents_of(lengths):
        held.add(document)
    text = [token for document in documents_of(lengths) for token in document.tolist()]
    rows = held.rows()
    assert rows.shape == (min(num_rows, max(0, len(text) - 1) // seq_len), seq_len + 1)
    assert rows[:, :-1].flatten().tolist() == text[: rows[:, 1:].size]
    assert rows[:, 1:].flatten().tolist() == text[1 : rows[:, 1:].size + 1]


# ---- tokenizer


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_token_bytes_add_up_to_the_text(text: str) -> None:
    (tokens,) = WORDS.encode([text])
    assert tokens[0] == WORDS.bos_id == 319 and WORDS.bos_id not in tokens[1:]
    assert WORDS.encoding.decode(tokens[1:].tolist()) == text
    lengths = WORDS.token_bytes()
    assert lengths.dtype == np.int32 and lengths.shape == (320,) and lengths[WORDS.bos_id] == 0
    assert lengths[tokens].sum() == len(text.encode())


def test_tokenizer_is_the_same_after_saving_and_when_learned_again(tmp_path: Path) -> None:
    WORDS.save(tmp_path / "a.json")
    assert Tokenizer.load(tmp_path / "a.json") == WORDS == tokenizer.train(iter(TEXT), 320)
    assert len(WORDS.ranks) == 319


def test_a_text_too_short_for_its_vocabulary_leaves_ids_unused() -> None:
    words = tokenizer.train(["abab"], 1000)
    assert len(words.ranks) < 300 and words.bos_id == 999 and words.token_bytes().shape == (1000,)
    assert words.encode(["abab"])[0][0] == 999


def test_gpt2_vocabulary_that_is_another_one_is_refused() -> None:
    for vocab in ({"a": 0}, {"a": 0, "<|endoftext|>": 5}, {"\n": 0, "<|endoftext|>": 1}):
        with pytest.raises(ValueError):
            tokenizer.from_gpt2(vocab)
    words = tokenizer.from_gpt2({"a": 0, "Ġb": 1, "é": 2, "<|endoftext|>": 3})
    assert words.token_bytes().tolist() == [1, 2, 1, 0] and words.ranks[b" b"] == 1


# ---- data sets


def test_importing_data_pulls_in_nothing_heavy() -> None:
    script = "import sys, nightshift.data; print(*[m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "pyarrow", "huggingface_hub", "tiktoken", "rustbpe", "rich", "anthropic"]
    result = subprocess.run([sys.executable, "-c", script, *heavy], cwd=config.ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "")


def test_folder_tells_sources_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path))
    assert data.folder(config.load(profile="demo")) == tmp_path / "python-v1024-t256"
    relative = data.folder(config.load(profile="local"))
    absolute = data.folder(config.load(profile="local", source=f"local:{config.ROOT / 'corpus'}"))
    other = data.folder(config.load(profile="local", source=f"local:{tmp_path / 'corpus'}"))
    assert relative == absolute != other and other.name.startswith("local-corpus-")
    monkeypatch.delenv("NIGHTSHIFT_DATA")
    assert data.home() == Path.home() / ".cache" / "nightshift"


@pytest.mark.parametrize("profile", ["demo", "single", "speedrun", "local"])
def test_no_data_is_one_line_with_the_command(profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path))
    with pytest.raises(Stop) as stop:
        data.open_dataset(config.load(profile=profile))
    message = str(stop.value)
    assert f"`python prepare.py --profile {profile}`" in message and "\n" not in message and stop.value.code == 1
    assert ("python loop.py --profile demo" in message) == (profile in ("single", "speedrun"))


def test_data_set_opens_whole(small: Config) -> None:
    dataset = data.open_dataset(small)
    data.verify_digests(dataset)
    assert dataset == preparing.prepare(small, quiet=True)
    folder = Path(small.source.removeprefix("local:"))
    indirect = f"local:{folder.parent / 'elsewhere' / '..' / folder.name}"
    spelled = config.load(profile="demo", source=indirect, vocab_size=300, seq_len=32, val_tokens=320)
    assert data.open_dataset(spelled).digest == dataset.digest
    assert (dataset.vocab_size, dataset.seq_len, dataset.bos_id) == (300, 32, 299)
    assert len(dataset.shards) == len(dataset.doc_starts) == 1
    assert isinstance(dataset.rows("val"), np.memmap) and dataset.rows("test").shape[1] == 33
    starts, tokens = np.load(dataset.doc_starts[0]), data.read_shard_tokens(dataset.shards[0])
    assert starts.dtype == np.uint32 and starts.tolist() == np.flatnonzero(tokens == 299).tolist() and starts[0] == 0
    counts = dataset.manifest["counts"]
    assert counts["train"] == {"documents": len(starts), "tokens": len(tokens)}
    assert counts["val"]["bytes_per_token"] > 1


def test_every_changed_byte_is_caught_and_mended(small: Config) -> None:
    dataset = data.open_dataset(small)
    for name in dataset.manifest["files"]:
        path = dataset.root / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(Stop, match=f"{name}: changed since it was prepared.*`python prepare.py --profile demo"):
            data.verify_digests(dataset)
        path.write_bytes(content[:-1])
        with pytest.raises(Stop, match=f"{name}: missing, or its size"):
            data.open_dataset(small)
        path.unlink()
        with pytest.raises(Stop, match=name):
            data.verify_digests(dataset)
        assert preparing.prepare(small, quiet=True) == dataset
        assert path.read_bytes() == content


def test_other_settings_are_refused_then_prepared(small: Config) -> None:
    more = config.load(profile="demo", source=small.source, vocab_size=300, seq_len=32, val_tokens=160)
    with pytest.raises(Stop, match="prepared with val_tokens 320, and 160 is wanted"):
        data.open_dataset(more)
    assert len(preparing.prepare(more, quiet=True).rows("val")) == 5
    (data.folder(more) / "manifest.json").write_text("{")
    with pytest.raises(Stop, match="manifest.json: not readable"):
        data.open_dataset(more)


def test_unwritable_home_is_one_line(tmp_path: Path, small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "file"))
    with pytest.raises(Stop, match="NIGHTSHIFT_DATA to another folder") as stop:
        preparing.prepare(small, quiet=True)
    assert "\n" not in str(stop.value)


def test_texts_too_short_for_a_row_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "home"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(Stop, match="too few to hold out"):
        preparing.prepare(config.load(profile="demo", source=f"local:{tmp_path}"), quiet=True)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXT[:5]))
    with pytest.raises(Stop, match="does not fill one row of 256 tokens"):
        preparing.prepare(config.load(profile="demo", source=f"local:{tmp_path}"), quiet=True)
