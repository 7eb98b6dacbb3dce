"""Files of the Hugging Face hub, through huggingface_hub: it resumes downloads and keeps them in the data home.

HF_ENDPOINT and the library's other environment variables apply.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from nightshift import data
from nightshift.config import Config
from nightshift.values import Stop


def fetch(config: Config, repo: str, name: str, repo_type: str = "dataset", quiet: bool = False) -> Path:
    """The file `name` of `repo`, downloaded unless it is here already, its digest checked where the hub tells one.

    Stop, in one line, where it cannot be had; a damaged one is removed first, so that the command fetches it again.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError  # type: ignore[attr-defined]
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    else:
        enable_progress_bars()
    mend = f"`{data.command(config)}` tries again"
    try:
        path = Path(hf_hub_download(repo, name, repo_type=repo_type, cache_dir=data.home() / "hub"))
    except RemoteEntryNotFoundError:
        raise Stop(f"{config.source}: the hub's {repo} has no file {name}: {_without(config)}") from None
    except LocalEntryNotFoundError:
        raise Stop(f"{config.source}: no network, or no hub, to fetch {name} of {repo}: {_without(config)}") from None
    except (OSError, HTTPError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise Stop(f"{config.source}: {name} of {repo} did not arrive ({cause}): {mend}; {_without(config)}") from None
    blob = path.resolve()  # the hub's cache names a large file by its SHA-256, a small one by its git hash
    if re.fullmatch("[0-9a-f]{64}", blob.name) and data.sha256(blob) != blob.name:
        raise damaged(config, path, "its SHA-256 is not what the hub published")
    return path


def damaged(config: Config, path: Path, fault: str) -> Stop:
    """Removes a downloaded file that is not what it should be, and says so."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    again = f"`{data.command(config)}` fetches it again"
    return Stop(f"{path.name} of {config.source} is damaged and was removed ({fault}): {again}")


def _without(config: Config) -> str:
    return "with no network, `python prepare.py --profile demo` prepares text that Python carries"
