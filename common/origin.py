"""Where a model came from: what the download wrote down, and of what a training has made its result."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Optional

from common.files import weights_fingerprint, written_whole
from common.model_directory import base_of

RECORD = Path(".cache", "huggingface", "origin.json")  # where the hub's library keeps what it knows of a directory


def write_origin(model_dir: str, name: str, revision: str) -> None:
    """Write down that the model in `model_dir` is `name` of the hub, in this revision."""
    record = {"name": name, "revision": revision, "weights": weights_fingerprint(model_dir)}
    with written_whole(Path(model_dir) / RECORD) as new:
        new.write_text(json.dumps(record), encoding="utf-8")


def origin_of(model_dir: str) -> dict:
    """{"name": its id on the hub, "revision"} of a model's directory; of a hub id itself its name; {}: not known, as of
    weights that are others now, a stand-in's or a trained model's."""
    path = Path(model_dir)
    with suppress(OSError, ValueError, TypeError, AttributeError):
        record = json.loads((path / RECORD).read_bytes())
        if record.pop("weights", None) == weights_fingerprint(model_dir):
            return {key: str(value) for key, value in record.items()}
    return {"name": model_dir} if is_hub_id(model_dir) and not path.exists() else {}


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def made_of(model_dir: str, merged: Optional[str] = None) -> dict:
    """For run.json: the base, and the adapter that was trained further or `merged` into it, as they were given."""
    base = base_of(merged or model_dir)
    adapter = merged or (model_dir if base != model_dir else None)
    return {"base": base, **({"adapter": adapter} if adapter else {}), **({"merged": True} if merged else {})}
