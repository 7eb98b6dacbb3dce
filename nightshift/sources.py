"""Where text comes from: Python's own standard library, a folder of one's own, ClimbMix; and FineWeb's ready tokens."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nightshift import data, hub
from nightshift.config import Config
from nightshift.values import Stop

if TYPE_CHECKING:
    import pyarrow.parquet

Split = Literal["train", "val", "test"]
Document = tuple[Split, str]
NAMES = ("python", "local:DIR", "climbmix", "fineweb10B")
DOCUMENT_CHARS = 20_000  # a longer source file or .txt is several documents

CLIMBMIX = "karpathy/climbmix-400b-shuffle"
CLIMBMIX_LAST = 6542  # shard_06542.parquet is held out, as it is in nanochat
CLIMBMIX_SHARD_TOKENS = 50_000_000  # at the least: a shard holds about 250 million characters
CLIMBMIX_SHARDS = 10  # where train_tokens is null

FINEWEB = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARD_TOKENS = 100_000_000
FINEWEB_SHARDS = 9  # where train_tokens is null: what a record run of the speedrun reads, and some more
FINEWEB_LAST = 103


@dataclass(frozen=True)
class Corpus:
    """Documents, each with its split. `documents` starts over at each call, and yields the same in the same order."""

    documents: Callable[[], Iterator[Document]]
    num_documents: int
    sample_chars: int  # of training text, the first so many: the vocabulary is learned from these
    shuffle: bool  # whether the documents lie in an order that training should not see


@dataclass(frozen=True)
class ReadyTokens:
    """FineWeb as the speedrun published it: .bin shards in GPT-2's vocabulary."""

    train: tuple[Path, ...]
    val: Path
    vocab: dict[str, int]


def open_source(config: Config, quiet: bool = False) -> Corpus | ReadyTokens:
    """The source of `config`, downloaded as far as need be. Stop where it cannot be had or read."""
    if config.source == "python":
        return python(config)
    if config.source.startswith("local:"):
        return local(config)
    if config.source == "climbmix":
        return climbmix(config, quiet)
    if config.source == "fineweb10B":
        return fineweb(config, quiet)
    close = difflib.get_close_matches(config.source, NAMES, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(NAMES)}"
    raise Stop(f"no source {config.source!r}; {hint}", 2)


def fingerprint(config: Config) -> str:
    """Of local:DIR, what tells that its files have changed: their names, sizes and times; of other sources nothing."""
    if not config.source.startswith("local:"):
        return ""
    stats = [(path, path.stat()) for path in _local_files(config)]
    lines = [f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


# ---- python


def python(config: Config) -> Corpus:
    """The *.py files of the running Python's standard library, 300 bytes to 300 kB each, without duplicates.

    All pieces of a file share its split. The order is shuffled by a seeded generator.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[int, str] = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).parts
        if {"site-packages", "dist-packages"} & set(inside) or not 300 < path.stat().st_size < 300_000:
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue  # the standard library tests its decoders on such files
        texts.setdefault(_key(text), text)
    pieces = [(key, piece) for key, text in texts.items() for piece in _cut(text)]
    split_of = _hold_out(config, [key for key, _ in pieces], ("val", "test"))
    documents: list[Document] = [(split_of(key), piece) for key, piece in pieces]
    random.Random(0).shuffle(documents)
    return Corpus(lambda: iter(documents), len(documents), sample_chars=8_000_000, shuffle=False)


# ---- local:DIR


def local(config: Config) -> Corpus:
    """The documents of *.parquet (column text), *.jsonl (key text) and *.txt below DIR, in the order of their paths.

    A file whose name begins with val or test is that split; one that no file is, is taken out of the others by hash.
    """
    files = [(_split_of_file(path), path) for path in _local_files(config)]
    missing = tuple(s for s in _HELD_OUT if s not in [split for split, _ in files])
    read = partial(_read, data.command(config))
    keys: list[int] = []
    num_documents = 0
    for split, path in files:  # reads everything once, so that a bad file is found before hours are spent
        for text in read(path):
            num_documents += 1
            if missing and split == "train":
                keys.append(_key(text))
    split_of = _hold_out(config, keys, missing) if missing else None

    def documents() -> Iterator[Document]:
        for split, path in files:
            for text in read(path):
                yield (split_of(_key(text)) if split_of and split == "train" else split), text

    return Corpus(documents, num_documents, sample_chars=2_000_000_000, shuffle=True)


def _local_files(config: Config) -> list[Path]:
    root = data.local_folder(config.source)
    if not root.is_dir():
        raise Stop(f"{root}: no such folder, and {config.source} reads it: put .parquet, .jsonl or .txt files there")
    files = [path for path in sorted(root.rglob("*")) if path.suffix in _READERS and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not files:
        raise Stop(f"{root}: holds no documents; {config.source} reads .parquet (column text), .jsonl (key text), .txt")
    return files


def _split_of_file(path: Path) -> Split:
    stem = path.stem.lower()
    return "val" if stem.startswith("val") else "test" if stem.startswith("test") else "train"


def _read(command: str, path: Path) -> Iterator[str]:
    """A file's documents, the empty ones left out. Stop, naming file and fault, where it cannot be read."""
    try:
        yield from filter(None, _READERS[path.suffix](path))
    except (OSError, ValueError) as error:
        fault = str(error).partition("\n")[0]
        raise Stop(f"{path}: {fault}; mend or remove the file, then `{command}`") from None


def _read_parquet(path: Path) -> Iterator[str | None]:
    with _arrow_faults():
        for batch in _open_parquet(path).iter_batches(batch_size=1024, columns=["text"]):
            yield from batch.column(0).to_pylist()


@contextmanager
def _arrow_faults() -> Iterator[None]:
    """Turns pyarrow's errors into ValueError: some of them are no more than its own base class."""
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


def _open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """ValueError or OSError where it is no parquet file with a column of text."""
    import pyarrow
    import pyarrow.parquet

    with _arrow_faults():
        file = pyarrow.parquet.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise ValueError(f"no column text, but {', '.join(file.schema_arrow.names)}")
    kind = file.schema_arrow.field("text").type
    if kind not in (pyarrow.string(), pyarrow.large_string()):
        raise ValueError(f"the column text holds {kind}, not strings")
    return file


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f"line {number} is not a JSON object with a string under text")
            # JSON can spell half a surrogate pair, which no UTF-8 has
            yield text if text.isascii() else text.encode(errors="replace").decode()


def _read_txt(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        while text := file.read(DOCUMENT_CHARS):
            yield text


_READERS: dict[str, Callable[[Path], Iterator[str | None]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
}
_HELD_OUT: tuple[Split, ...] = ("val", "test")


# ---- climbmix


def climbmix(config: Config, quiet: bool = False) -> Corpus:
    """ClimbMix as published, in shuffled order: the first shards; the last one's halves are val and test."""
    num_shards = CLIMBMIX_SHARDS
    if config.train_tokens is not None:
        num_shards = min(CLIMBMIX_LAST, math.ceil(config.train_tokens / CLIMBMIX_SHARD_TOKENS))
    names = [f"shard_{n:05d}.parquet" for n in (*range(num_shards), CLIMBMIX_LAST)]
    *train, last = hub.fetch(config, CLIMBMIX, names, quiet=quiet)
    num_documents = [_rows_of(config, path) for path in (*train, last)]

    def documents() -> Iterator[Document]:
        for number, text in enumerate(_read_hub(config, last)):
            if text:
                yield ("val" if number < num_documents[-1] // 2 else "test"), text
        for text in filter(None, chain.from_iterable(_read_hub(config, path) for path in train)):
            yield "train", text

    return Corpus(documents, sum(num_documents), sample_chars=2_000_000_000, shuffle=False)


def _rows_of(config: Config, path: Path) -> int:
    try:
        return int(_open_parquet(path).metadata.num_rows)
    except (OSError, ValueError) as error:
        raise hub.damaged(config, path, str(error).partition("\n")[0]) from None


def _read_hub(config: Config, path: Path) -> Iterator[str | None]:
    try:
        yield from _read_parquet(path)
    except (OSError, ValueError) as error:
        raise hub.damaged(config, path, str(error).partition("\n")[0]) from None


# ---- fineweb10B


def fineweb(config: Config, quiet: bool = False) -> ReadyTokens:
    """The validation shard and the first training shards. Stop where the profile is not cut for GPT-2's tokens."""
    if config.vocab_size != 50257 or config.val_tokens % config.seq_len:
        raise Stop(
            f"fineweb10B is tokens of GPT-2's: vocab_size is 50257 (here {config.vocab_size}), and seq_len "
            f"{config.seq_len} must divide val_tokens {config.val_tokens}: `python prepare.py --profile speedrun`",
            2,
        )
    num_shards = FINEWEB_SHARDS
    if config.train_tokens is not None:
        num_shards = min(FINEWEB_LAST, math.ceil(config.train_tokens / FINEWEB_SHARD_TOKENS))
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in range(1, num_shards + 1))]
    (vocab_json,) = hub.fetch(config, "openai-community/gpt2", ["vocab.json"], repo_type="model", quiet=quiet)
    val, *train = hub.fetch(config, FINEWEB, names, quiet=quiet)
    for path in (val, *train):
        try:
            data.read_shard_tokens(path)
        except Stop as fault:
            raise hub.damaged(config, path, str(fault).partition(": ")[2]) from None
    try:
        vocab = json.loads(vocab_json.read_bytes())
    except ValueError as error:
        raise hub.damaged(config, vocab_json, str(error)) from None
    return ReadyTokens(tuple(train), val, vocab)


# ---- splitting


def _key(text: str) -> int:
    """64 bits of the text's SHA-256: where a document falls among all, whatever the order in which they come."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _cut(text: str) -> list[str]:
    return [text[start : start + DOCUMENT_CHARS] for start in range(0, len(text), DOCUMENT_CHARS)]


def _hold_out(config: Config, keys: Sequence[int], missing: tuple[Split, ...]) -> Callable[[int], Split]:
    """By a document's key, its split: those with the lowest keys are held out, an equal number for each missing split.

    It is a document in a hundred, more where val_tokens needs more (a row takes one document at least), never more
    than one in sixteen, and at least one.
    """
    if len(keys) <= len(missing):
        raise Stop(
            f"{config.source} has {len(keys)} documents to train on: too few to hold out some for "
            f"{' and '.join(missing)}; add text, then `{data.command(config)}`"
        )
    wanted = max(len(keys) // 100, 3 * config.val_tokens // (2 * config.seq_len))
    share = max(1, min(wanted, len(keys) // 16))
    ordered = sorted(keys)
    last = [ordered[share * (n + 1) - 1] for n in range(len(missing))]

    def split_of(key: int) -> Split:
        return next((split for split, limit in zip(missing, last, strict=True) if key <= limit), "train")

    return split_of
