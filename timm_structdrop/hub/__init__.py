"""Publishing and loading models: pushes, verified loading, and model cards."""

from timm_structdrop.hub.background import RunPushes
from timm_structdrop.hub.card import make_card
from timm_structdrop.hub.export import export_model
from timm_structdrop.hub.load import load_verified
from timm_structdrop.hub.push import check_push, push_to_hub

__all__ = [
    "RunPushes",
    "check_push",
    "export_model",
    "load_verified",
    "make_card",
    "push_to_hub",
]
