"""Publishing a model: everything that belongs to it in one commit, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn

from timm_structdrop.analysis import cluster_layers, cluster_maps, draw_cluster_maps
from timm_structdrop.errors import UserError
from timm_structdrop.files import save_png
from timm_structdrop.hub.card import make_card, updated_readme
from timm_structdrop.hub.export import export_model, shared_rate
from timm_structdrop.hub.failures import hub_errors, with_retries
from timm_structdrop.hub.licenses import check_license

__all__ = ["check_push", "push_to_hub"]

_logger = logging.getLogger(__name__)

PICTURE, README = "clusters.png", "README.md"


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    license: str,
    facts: Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    images: Tensor | None = None,
) -> CommitInfo:
    """Push a model to the Hub: the repository is made if needed, and gets one commit.

    The commit holds ``config.json`` (architecture, arguments that bring back every setting, data
    config, labels, SHA-256 of the weights), ``model.safetensors``, ``README.md`` with the card of
    :func:`make_card` (text around an earlier card stays) and, for a model with fitted clusters
    where matplotlib is installed, their picture ``clusters.png``. Where anything fails, the
    repository stays as it was.

    Args:
        model: made by ``timm.create_model``, with or without attached regularizers.
        repo_id: ``user/name`` or ``organization/name``.
        license: the Hub's identifier of the license, such as ``apache-2.0``.
        facts: provenance for the card, see :func:`make_card`.
        private: make a repository that only its owner sees. An existing one keeps its visibility;
            True is an error for one that is public.
        revision: the branch to push to, made from ``main`` if needed; None for ``main``.
        token: of a user with write access; None for the one that ``hf auth login`` stored, or
            ``HF_TOKEN``.
        commit_message: first line of the commit.
        label_names: names of the classes, by index; those of ``facts`` if None.
        data_config: timm's data config of the training images; the model's own if None.
        images: (N, C, H, W), normalised, for the first rows of the picture; None for no such rows.

    Returns:
        huggingface_hub's ``CommitInfo``; that of the last commit where nothing has changed.

    Raises:
        UserError: what :func:`check_push` raises; or the model cannot be exported, or the Hub
            refuses or cannot be reached: one line names the cause.
    """
    check_push(repo_id, license, token)
    api = HfApi(token=token, library_name="timm_structdrop")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        labels = label_names if label_names is not None else (facts or {}).get("label_names")
        sha256 = export_model(model, folder, data_config=data_config, label_names=labels)
        picture = _draw_clusters(model, folder / PICTURE, images)
        known = {"label_names": labels, "drop_prob": shared_rate(model), **(facts or {})}
        known |= {"sha256": sha256, "picture": picture, "rate_saved": True}
        card = str(make_card(model, license=license, repo_id=repo_id, facts=known))
        with hub_errors("push to", repo_id):
            # as a whole: a commit in between changes the README that this one follows
            return with_retries(
                lambda: _commit(api, repo_id, folder, card, private, revision, commit_message)
            )


def check_push(repo_id: str, license: str, token: str | None = None) -> None:
    """What can be known of a push before there is anything to push, without asking the Hub.

    Args:
        repo_id: as for :func:`push_to_hub`.
        license: as for :func:`push_to_hub`.
        token: as for :func:`push_to_hub`.

    Raises:
        UserError: the repository has no name as the Hub's have, the license is none of the Hub's,
            or there is no token.
    """
    if not isinstance(repo_id, str) or repo_id.count("/") != 1:
        raise UserError(f"a repository is named user/name; got {repo_id!r}")
    with hub_errors("push to", repo_id):
        validate_repo_id(repo_id)
        check_license(license)
        if not (token or get_token()):
            raise LocalTokenNotFoundError


def _commit(
    api: HfApi,
    repo_id: str,
    folder: Path,
    card: str,
    private: bool | None,
    revision: str | None,
    message: str,
) -> CommitInfo:
    """One commit with the folder's files and the card, on top of what is there now."""
    with suppress(KeyError):  # a 409 whose answer does not say where what is there lies
        api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.model_info(repo_id, revision=revision)
    if private and not info.private:
        raise UserError(
            f"{repo_id} is public already: make it private on its page, or push to another name"
        )
    readme = updated_readme(_existing_readme(api, info), card).encode()
    files: dict[str, Path | bytes] = {path.name: path for path in folder.iterdir()}
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(*file) for file in sorted({**files, README: readme}.items())],
        commit_message=message,
        revision=revision,
        parent_commit=info.sha,
    )


def _existing_readme(api: HfApi, info: Any) -> str | None:
    """The README of the commit that the new one will follow."""
    if README not in {file.rfilename for file in info.siblings or ()}:
        return None
    with TemporaryDirectory() as cache:
        path = api.hf_hub_download(info.id, README, revision=info.sha, cache_dir=cache)
        return Path(path).read_text(encoding="utf-8", errors="replace")


def _draw_clusters(model: nn.Module, path: Path, images: Tensor | None) -> str | None:
    """The picture's name; None where there is nothing to draw, or nothing to draw with."""
    layers = cluster_layers(model)
    if not layers or not all(layer.is_fitted for layer in layers.values()):
        return None
    name = str(model.pretrained_cfg["architecture"])  # type: ignore[index]
    size = model.pretrained_cfg["input_size"]  # type: ignore[index]
    try:
        maps = cluster_maps(model, torch.zeros(1, *size) if images is None else images)[0]
        if images is None:
            maps = replace(maps, images=maps.images[:0], features=maps.features[:0])
        save_png(draw_cluster_maps(maps, name), path)
    except UserError as error:
        _logger.warning(f"There is no picture of the clusters: {error}")
        return None
    return path.name
