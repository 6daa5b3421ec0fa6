"""What a data folder has to look like, and what was found in one that does not."""

from __future__ import annotations

from pathlib import Path

__all__ = ["TORCH_LAYOUTS", "expected_and_found"]

# folders that torchvision makes under its root, and files in them
TORCH_LAYOUTS = {
    "torch/cifar10": "cifar-10-batches-py/ with data_batch_1 to 5, test_batch and batches.meta",
    "torch/cifar100": "cifar-100-python/ with train, test and meta",
    "torch/mnist": "MNIST/raw/ with train- and t10k- images-idx3-ubyte and labels-idx1-ubyte",
    "torch/kmnist": "KMNIST/raw/ with train- and t10k- images-idx3-ubyte and labels-idx1-ubyte",
    "torch/fashion_mnist": "FashionMNIST/raw/ with train- and t10k- images-idx3-ubyte and labels-"
    "idx1-ubyte",
    "torch/qmnist": "QMNIST/raw/ with the qmnist-* files",
    "torch/imagenet": "train/ and val/, or ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, "
    "and ILSVRC2012_devkit_t12.tar.gz",
}


def expected_and_found(expected: str, folder: Path) -> str:
    """``expected ...; found ...``: up to six names of what is in ``folder``."""
    if not folder.exists():
        return f"expected {expected}; found no {folder}"
    if not folder.is_dir():
        return f"expected {expected}; found a file"
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"expected {expected}; found {', '.join(names[:6]) or 'nothing'}{more}"
