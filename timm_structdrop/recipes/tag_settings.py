"""The settings that come with a packaged checkpoint, said in the flags of a training from it."""

from __future__ import annotations

import argparse

from timm_structdrop.models.packaged import packaged

__all__ = ["with_tag_settings"]


def with_tag_settings(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags of train.py with what the packaged weights, if it starts from such, decide.

    A pretrained tag decides the image size, the channels, the normalisation and the settings of the
    regularizer. Said in the flags, they are in the run's `args.yaml`, for whatever builds the model
    again to load the run's checkpoint. Flags that are given stay.
    """
    name, _, tag = flags.model.partition(".")
    facts = packaged().get(name)
    if facts is None or not (tag == facts["tag"] or (flags.pretrained and not tag)):
        return flags
    data = facts["data"]
    said = vars(flags).copy()
    args = dict(facts["model_args"])
    usual = {"num_classes": facts["num_classes"]}
    usual |= {key: args.pop(key) for key in ("bn_momentum", "bn_eps") if key in args}
    said["model_kwargs"] = {**args, **flags.model_kwargs}
    if not flags.input_size:
        usual |= {"in_chans": data["input_size"][0], "img_size": data["input_size"][-1]}
    channels = flags.input_size[0] if flags.input_size else flags.in_chans
    for key in ("mean", "std", "crop_pct", "interpolation"):
        if key not in ("mean", "std") or len(data[key]) in (1, channels):
            usual[key] = data[key]
    said.update({key: value for key, value in usual.items() if said[key] in (None, "")})
    return argparse.Namespace(**said)
