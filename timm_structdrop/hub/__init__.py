"""The Hugging Face Hub: model cards."""

from timm_structdrop.hub.card import make_card

__all__ = ["make_card"]
