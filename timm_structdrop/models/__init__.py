"""Architectures, the places in a model where a regularizer can sit, and timm's registrations.

Importing this package registers the models. A new architecture is one file here that calls
`register_architecture`, and its name in the list below.
"""

from importlib import import_module

_ARCHITECTURE_FILES = ("cifar_resnet", "imagenet_resnet", "lenet", "timm_cnns", "vgg_cifar")
_ENTRYPOINT_FILES = ("structdrop_small", "structdrop_variants", "structdrop_attached")

# in this order: the entrypoints read the registry of architectures
for _file in (*_ARCHITECTURE_FILES, *_ENTRYPOINT_FILES):
    import_module(f"{__name__}.{_file}")
