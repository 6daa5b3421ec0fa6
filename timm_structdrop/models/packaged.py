"""Checkpoints inside the package: weights, and beside them a JSON file of how they came about.

The folder is the registry: `<model>.json` describes `<model>.safetensors`, and gives the model a
pretrained tag.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from timm_structdrop.errors import UserError

__all__ = ["FOLDER", "check_file", "packaged", "packaged_cfg"]

FOLDER = Path(__file__).parent / "weights"
DATA_KEYS = ("input_size", "pool_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@cache
def packaged() -> dict[str, dict[str, Any]]:
    """The facts of the packaged checkpoints, by the name of their model.

    What a reader of the code needs to know of them: `tag`; `model_args`, the settings that the
    model was trained with; `data`, timm's data config; `num_classes`, `label_names`, `license`. The
    rest is for cards.
    """
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return found


def packaged_cfg(
    facts: dict[str, Any], base: dict[str, Any], file: Path | None = None
) -> PretrainedCfg:
    """The pretrained cfg of a packaged checkpoint.

    Args:
        facts: its entry of `packaged`.
        base: the architecture's cfg, for what does not depend on the weights.
        file: where the weights are, if not yet in their place.
    """
    own = {key: _tuple(facts["data"][key]) for key in DATA_KEYS}
    return PretrainedCfg(
        **{
            **base,
            **own,
            "file": str(file or FOLDER / f"{facts['model']}.safetensors"),
            "tag": facts["tag"],
            "num_classes": facts["num_classes"],
            "label_names": tuple(facts["label_names"]),
            "license": facts["license"],
            "description": f"trained on {facts['dataset_name']}, comes with timm_structdrop",
        }
    )


def check_file(file: object) -> None:
    """Raise UserError unless `file`, the `file` of a pretrained cfg or None, is there."""
    if file is None or Path(str(file)).exists():  # a folder with local-dir:
        return
    hint = ": install timm-structdrop again" if Path(str(file)).parent == FOLDER else ""
    raise UserError(f"pretrained weights must be an existing file; {file} is not there{hint}")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
