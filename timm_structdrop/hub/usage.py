"""The code of a card: classification, feature maps and embeddings, each block complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Usage"]


@dataclass(frozen=True)
class Usage:
    """What the code blocks of a card depend on.

    Attributes:
        name: what `timm.create_model` loads the weights by.
        channels: of the images, as the model takes them.
        num_classes: outputs of the classifier.
        digits: the images are scikit-learn's digits; otherwise one of its photographs is shown.
        feature_shapes: shapes of what a `features_only` model returns for one image, if known.
        map_shape: shape of what `forward_features` returns for one image.
        embedding: length of an embedding.
    """

    name: str
    channels: int
    num_classes: int
    digits: bool
    feature_shapes: Sequence[tuple[int, ...]]
    map_shape: tuple[int, ...]
    embedding: int

    def classification(self) -> str:
        """Code that gives the class of an image, in Markdown."""
        k = min(5, self.num_classes)
        return self._block(
            "",
            f"""\
logits = model(transform(image).unsqueeze(0))  # (1, {self.num_classes})
top = logits.softmax(dim=1).topk({k})
names = model.pretrained_cfg.get("label_names") or range({self.num_classes})
for index, probability in zip(top.indices[0].tolist(), top.values[0].tolist()):
    print(f"{{names[index]}}: {{probability:.1%}}")""",
        )

    def feature_maps(self) -> str:
        """Code that gives the maps of an image at several depths, in Markdown."""
        shapes = "".join(f"\n# {shape}" for shape in self.feature_shapes)
        return self._block(
            ", features_only=True",
            f"""\
for maps in model(transform(image).unsqueeze(0)):
    print(tuple(maps.shape)){shapes}""",
        )

    def embeddings(self) -> str:
        """Code that gives what the classifier would see of an image, in Markdown."""
        return self._block(
            ", num_classes=0",
            f"""\
embedding = model(transform(image).unsqueeze(0))  # (1, {self.embedding})

# or, with any number of classes:
maps = model.forward_features(transform(image).unsqueeze(0))  # {self.map_shape}
embedding = model.forward_head(maps, pre_logits=True)  # (1, {self.embedding})""",
        )

    def _block(self, option: str, use: str) -> str:
        imports, image = self._image()
        return f"""\
```python
import timm, timm_structdrop  # the second import registers the model
{imports}

model = timm.create_model("{self.name}", pretrained=True{option}).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)

{image}
{use}
```"""

    def _image(self) -> tuple[str, str]:
        mode = "L" if self.channels == 1 else "RGB"
        if self.digits:
            return (
                "from timm_structdrop.data import DigitsDataset",
                f'image, label = DigitsDataset(is_train=False, input_img_mode="{mode}")[0]',
            )
        return (
            "from PIL import Image\nfrom sklearn.datasets import load_sample_image",
            f'image = Image.fromarray(load_sample_image("flower.jpg")).convert("{mode}")',
        )
