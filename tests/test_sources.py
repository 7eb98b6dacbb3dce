"""The sources that need no network, for real: Python's own library, and a folder of mixed files."""

from __future__ import annotations

import fcntl
import json
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparations import SMALL, opened, parquet, prepare, start, story, train_text, tree

from nightshift import config, data, preparing, sources
from nightshift.values import Stop


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
def test_demo_is_prepared_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    in_order = [story(n) for n in range(300) if story(n) in texts]
    assert [text for text in texts if text in written] != in_order  # shuffled
    assert dataset.manifest["counts"]["train"]["documents"] == len(texts)
    assert (dataset.rows("val")[:, 0] == dataset.bos_id).all()


def test_text_for_a_time_to_target_night_is_held_out_end_to_end(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = SMALL | {"source": f"local:{corpus}"}
    prepare(flags, tmp_path / "home")
    code, out, err = prepare(flags | {"objective": "time_to_target"}, tmp_path / "home")
    assert (code, err) == (0, "") and out.startswith("preparing again"), out
    dataset = opened(flags | {"objective": "time_to_target"}, tmp_path / "home", monkeypatch)
    rows = dataset.rows("val")
    assert len(rows) > 1 and (rows[:-1, -1] == rows[1:, 0]).all()
    assert rows[0, 0] == dataset.bos_id and not (rows[:, 0] == dataset.bos_id).all()


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
    dataset = preparing.prepare(config.load(**SMALL, source=f"local:{folder}", train_tokens=30_000), quiet=True)
    assert len(dataset.rows("val")) >= 1 and len(dataset.rows("test")) >= 1
    assert 30_000 <= dataset.manifest["counts"]["train"]["tokens"] < 60_000


def test_a_million_spaces_are_only_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    odd = "start" + " " * 2_000_000 + "end <|bos|>"
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [odd, *map(story, range(100))]))
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "home"))
    dataset = preparing.prepare(config.load(**SMALL, source=f"local:{folder}"), quiet=True)
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
        preparing.prepare(config.load(**SMALL, source=f"local:{corpus}"), quiet=True)
    assert expected in str(stop.value) and "\n" not in str(stop.value) and str(corpus) in str(stop.value)


def test_parquet_without_text_is_named(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "home"))
    pq.write_table(pa.table({"content": ["x"]}), corpus / "z.parquet")
    with pytest.raises(Stop, match=r"z\.parquet: no column text, but content"):
        preparing.prepare(config.load(**SMALL, source=f"local:{corpus}"), quiet=True)
    pq.write_table(pa.table({"text": [1]}), corpus / "z.parquet")
    with pytest.raises(Stop, match=r"z\.parquet: the column text holds int64"):
        preparing.prepare(config.load(**SMALL, source=f"local:{corpus}"), quiet=True)


def test_a_folder_without_documents_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "home"))
    with pytest.raises(Stop, match="empty: holds no documents"):
        (tmp_path / "empty").mkdir()
        preparing.prepare(config.load(**SMALL, source=f"local:{tmp_path / 'empty'}"), quiet=True)
    with pytest.raises(Stop, match="gone: no such folder"):
        preparing.prepare(config.load(**SMALL, source=f"local:{tmp_path / 'gone'}"), quiet=True)
    with pytest.raises(Stop, match="did you mean climbmix"):
        preparing.prepare(config.load(**SMALL, source="climbmx"), quiet=True)


# ---- interrupted, repeated, at the same time


def test_killed_at_any_moment_and_repeated_ends_the_same(corpus: Path, tmp_path: Path) -> None:
    (corpus / "long.txt").write_text("".join(story(n, words=200) for n in range(2000)))
    flags = SMALL | {"source": f"local:{corpus}"}
    assert prepare(flags, tmp_path / "undisturbed")[0] == 0
    (whole,) = [path for path in (tmp_path / "undisturbed").iterdir() if path.is_dir()]
    home = tmp_path / "home"
    part = home / (whole.name + ".part")
    killed = 0
    for milestone in ("", "tokenizer.json", "spool", "train_000000.bin", "manifest.json"):
        process = start(flags, home)
        while not (part / milestone).exists() and process.poll() is None:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if (home / whole.name).exists():
            assert tree(home / whole.name) == tree(whole)
    assert killed >= 3  # a process may come through the last milestones before it is hit
    assert prepare(flags, home)[0] == 0
    assert tree(home / whole.name) == tree(whole)
    assert sorted(path.name for path in home.iterdir()) == [whole.name, "prepare.lock"]


def test_one_process_prepares_at_a_time(corpus: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with (home / "prepare.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(SMALL | {"source": f"local:{corpus}"}, home)
        assert process.stdout is not None and "waiting for it" in process.stdout.readline()
        assert [path.name for path in home.iterdir()] == ["prepare.lock"]
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and "learning a vocabulary" in out


def test_what_another_process_made_meanwhile_is_taken(corpus: Path, tmp_path: Path) -> None:
    flags = SMALL | {"source": f"local:{corpus}"}
    assert prepare(flags, tmp_path / "home")[0] == 0
    (made,) = [path for path in (tmp_path / "home").iterdir() if path.is_dir()]
    made.rename(tmp_path / made.name)
    with (tmp_path / "home" / "prepare.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(flags, tmp_path / "home")
        assert process.stdout is not None and "waiting for it" in process.stdout.readline()
        (tmp_path / made.name).rename(made)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and len(out.splitlines()) == 1  # the digest
