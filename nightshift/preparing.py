"""Makes a data set: source → vocabulary → token shards and packed rows → manifest.

Everything is written into `<name>.part`, which takes its name when the manifest, written last, is in it. So a data set
is there whole or not at all, and whoever is interrupted starts over from the downloads, with the same result.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nightshift import data, hub, sources, tokenizer
from nightshift.config import Config
from nightshift.packing import HeldOut, consecutive
from nightshift.sources import Corpus, Document, ReadyTokens
from nightshift.tokenizer import Tokenizer, Tokens
from nightshift.values import Stop

FORMAT = 1
SHARD_TOKENS = 2**26
BATCH_CHARS = 4_000_000  # encoded at once
LINE_S = 30.0  # without a terminal, a line of progress so often
SPLITS = ("val", "test")


def prepare(config: Config, quiet: bool = False) -> data.Dataset:
    """Makes the data set of `config`, or finds it whole; interrupted and repeated, it ends the same to the byte.

    One that is there is checked to the byte, and made anew where it does not hold. One process prepares at a time, a
    second one waits. Stop where the source cannot be had or read.
    """
    root = data.folder(config)
    if (dataset := _prepared(config, quiet=True)) is not None:
        return dataset
    with _disk_faults(config, root), _alone(quiet):
        if (dataset := _prepared(config, quiet)) is not None:
            return dataset  # another process made it meanwhile
        part, old = root.with_name(root.name + ".part"), root.with_name(root.name + ".old")
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        hub.remove_leftovers()
        part.mkdir()
        counts, bos_id = _build(config, part, quiet)
        _write_manifest(config, part, counts, bos_id)
        if root.exists():
            root.rename(old)
        part.rename(root)
        shutil.rmtree(old, ignore_errors=True)
        return data.open_dataset(config)


def _prepared(config: Config, quiet: bool) -> data.Dataset | None:
    root = data.folder(config)
    if not root.exists():
        return None
    try:
        dataset = data.open_dataset(config)
        data.verify_digests(dataset)
    except Stop as reason:
        _say(f"preparing again: {str(reason).partition(': `')[0]}", quiet)
        return None
    if dataset.manifest["fingerprint"] != sources.fingerprint(config):
        _say(f"preparing again: the files of {config.source} have changed", quiet)
        return None
    return dataset


@contextmanager
def _alone(quiet: bool) -> Iterator[None]:
    """Holds the lock of the data home; the kernel lets go of it with the process."""
    data.home().mkdir(parents=True, exist_ok=True)
    with (data.home() / "prepare.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another process is preparing data in {data.home()}: waiting for it", quiet)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _disk_faults(config: Config, root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Stop(
            f"{error.filename or root}: {error.strerror or error}: the data could not be written; make room, or set "
            f"NIGHTSHIFT_DATA to another folder, then `{data.command(config)}`"
        ) from None


def _build(config: Config, part: Path, quiet: bool) -> tuple[dict[str, Any], int]:
    """Writes all but the manifest; returns what it counted, and BOS."""
    with _stage(f"reading {config.source}", quiet):
        source = sources.open_source(config, quiet)
    if isinstance(source, ReadyTokens):
        return _build_from_tokens(config, source, part, quiet)
    return _build_from_text(config, source, part, quiet)


# ---- out of text


def _build_from_text(config: Config, corpus: Corpus, part: Path, quiet: bool) -> tuple[dict[str, Any], int]:
    if not 257 <= config.vocab_size <= 65536:
        raise Stop(f"vocab_size is {config.vocab_size}; tokens of text take 257 (bytes and BOS) to 65536 (uint16)", 2)
    with _stage(f"learning a vocabulary of {config.vocab_size}", quiet):
        words = tokenizer.train(_sample(corpus), config.vocab_size)
        words.save(part / "tokenizer.json")
    num_rows = config.val_tokens // config.seq_len
    end_to_end = config.objective == "time_to_target"  # as the speedrun scores
    held = {split: HeldOut(config.seq_len, num_rows, end_to_end) for split in SPLITS}
    spool = part / "spool"
    lengths = _encode(config, corpus, words, held, spool, quiet)
    if not lengths:
        raise Stop(f"{config.source}: no training documents; add some, then `{data.command(config)}`")
    with _stage("writing shards and rows", quiet):
        _write_shards(part, spool, lengths, words.bos_id, corpus.shuffle)
        spool.unlink()
        counts: dict[str, Any] = {"train": {"documents": len(lengths), "tokens": sum(lengths)}}
        for split in SPLITS:
            counts[split] = _write_rows(config, part, split, held[split].rows(), words)
    return counts, words.bos_id


def _sample(corpus: Corpus) -> Iterator[str]:
    """The training documents from which the vocabulary is learned."""
    chars = 0
    for split, text in corpus.documents():
        if split == "train":
            yield text
            chars += len(text)
            if chars >= corpus.sample_chars:
                return


def _encode(
    config: Config, corpus: Corpus, words: Tokenizer, held: dict[str, HeldOut], spool: Path, quiet: bool
) -> list[int]:
    """Spools the training documents' tokens one after the other, keeps the held-out ones; returns the lengths."""
    lengths: list[int] = []
    missing = math.inf if config.train_tokens is None else config.train_tokens
    with (
        _progress(f"encoding {corpus.num_documents:,} documents", corpus.num_documents, quiet) as advance,
        spool.open("wb") as file,
    ):
        for batch in _batches(corpus.documents()):
            for (split, _), tokens in zip(batch, words.encode([text for _, text in batch]), strict=True):
                if split != "train":
                    held[split].add(tokens)
                elif missing > 0:
                    file.write(tokens[:SHARD_TOKENS].data)
                    lengths.append(min(len(tokens), SHARD_TOKENS))
                    missing -= lengths[-1]
            advance(len(batch))
            if missing <= 0 and all(split.full for split in held.values()):
                break
    return lengths


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document[1])
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _write_shards(part: Path, spool: Path, lengths: list[int], bos_id: int, shuffle: bool) -> None:
    """Cuts the spooled documents into shards, each of whole documents, in a seeded order where `shuffle` says so."""
    tokens: Tokens = np.memmap(spool, dtype=np.uint16, mode="r")
    ends = np.cumsum(lengths)
    order = np.random.default_rng(0).permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    shard: list[Tokens] = []
    room, number = SHARD_TOKENS, 0
    for document in order.tolist():
        if lengths[document] > room:
            _write_shard(part, number, np.concatenate(shard), bos_id)
            shard, room, number = [], SHARD_TOKENS, number + 1
        shard.append(tokens[ends[document] - lengths[document] : ends[document]])
        room -= lengths[document]
    _write_shard(part, number, np.concatenate(shard), bos_id)


def _write_shard(part: Path, number: int, tokens: Tokens, bos_id: int) -> None:
    data.write_shard(part / f"train_{number:06d}.bin", tokens)
    _write_doc_starts(part, number, tokens, bos_id)


def _write_doc_starts(part: Path, number: int, tokens: Tokens, bos_id: int) -> int:
    starts = np.flatnonzero(tokens == bos_id).astype(np.uint32)
    np.save(part / f"train_{number:06d}.doc_starts.npy", starts)
    return len(starts)


def _write_rows(config: Config, part: Path, split: str, rows: Tokens, words: Tokenizer) -> dict[str, Any]:
    """Writes a held-out split [N, seq_len + 1]; counts rows, predicted tokens, and bytes a token of text."""
    if not len(rows):
        raise Stop(
            f"{config.source}: the text held out for {split} does not fill one row of {config.seq_len} tokens: "
            f"add text, or lower seq_len in config.yaml, then `{data.command(config)}`"
        )
    np.save(part / f"{split}.npy", rows)
    lengths = words.token_bytes()[rows[:, 1:]]
    per_token = float(lengths.sum() / max(1, np.count_nonzero(lengths)))
    return {"rows": len(rows), "tokens": lengths.size, "bytes_per_token": per_token}


# ---- out of ready tokens


def _build_from_tokens(config: Config, source: ReadyTokens, part: Path, quiet: bool) -> tuple[dict[str, Any], int]:
    """Links the published shards in; val is the first tokens of the validation shard, test the ones that follow."""
    try:
        words = tokenizer.from_gpt2(source.vocab)
    except ValueError as fault:
        raise Stop(f"{config.source}: the vocab.json of GPT-2 that the hub sent is another one: {fault}") from None
    words.save(part / "tokenizer.json")
    documents, total = 0, 0
    with _progress(f"reading {len(source.train)} shards", len(source.train), quiet) as advance:
        for number, path in enumerate(source.train):
            os.link(path.resolve(), part / f"train_{number:06d}.bin")
            tokens = data.read_shard_tokens(path)
            documents += _write_doc_starts(part, number, tokens, words.bos_id)
            total += len(tokens)
            advance(1)
    counts: dict[str, Any] = {"train": {"documents": documents, "tokens": total}}
    val, num_rows = data.read_shard_tokens(source.val), config.val_tokens // config.seq_len
    for number, split in enumerate(SPLITS):
        rows = consecutive(val[number * num_rows * config.seq_len :], config.seq_len, num_rows)
        counts[split] = _write_rows(config, part, split, rows, words)
    return counts, words.bos_id


# ---- the manifest, and what one sees meanwhile


def _write_manifest(config: Config, part: Path, counts: dict[str, Any], bos_id: int) -> None:
    paths = sorted(part.iterdir())
    digests = data.sha256_all(paths)
    manifest = {
        "format": FORMAT,
        "settings": data.settings(config),
        "fingerprint": sources.fingerprint(config),
        "bos_id": bos_id,
        "counts": counts,
        "files": {p.name: {"sha256": d, "bytes": p.stat().st_size} for p, d in zip(paths, digests, strict=True)},
    }
    (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, flush=True)


@contextmanager
def _stage(title: str, quiet: bool) -> Iterator[None]:
    started = time.monotonic()
    yield
    _say(f"{title}: {time.monotonic() - started:.1f} s", quiet)


@contextmanager
def _progress(title: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Yields what to call with each further number done: a bar on a terminal, else a line now and then."""
    if sys.stdout.isatty() and not quiet:
        from rich.progress import Progress

        with Progress(transient=True) as bars:
            bar = bars.add_task(title, total=total)
            with _stage(title, quiet):
                yield lambda more: bars.advance(bar, more)
        return
    done, said = 0, time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        if time.monotonic() - said > LINE_S:
            said = time.monotonic()
            _say(f"{title}: {done / total:.0%}", quiet)

    with _stage(title, quiet):
        yield advance
