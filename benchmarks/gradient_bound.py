"""CamDrop's bound on the gradients of biases, Eq. (16), measured on a trained model.

    python -m benchmarks.gradient_bound [--checkpoint RUN] [--num-images N] [--draws N]

Without a checkpoint, ResNet-8 is trained on scikit-learn's digits at 32 px first, where the maps of
its groups are those of the paper's ResNet-110 on CIFAR-10 (about a minute on one core). At each
convolution the norms ||dS/db||_1 of each image and bias are taken without a mask, with dropout's
and with CamDrop's, gamma 0.9 and r = 8 as in the paper; once with masks as in Eq. (12), from which
the bound is derived, and once with what is kept rescaled, as the layers do (Eqs. 2 and 10).
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._record import add_output, circumstances, output_stem, quietly_trained, write_study
from benchmarks._text import table, versions
from timm_structdrop.analysis import Place, find_places
from timm_structdrop.cli._images import Subject, add_subject_flags, load_subject
from timm_structdrop.errors import UserError, run_command
from timm_structdrop.layers import cam_drop_2d
from timm_structdrop.models.modes import eval_mode
from timm_structdrop.training import Progress
from timm_structdrop.training.steps import classifier_weight, target_weights

TRAINING = (
    "--dataset digits --num-classes 10 --in-chans 1 --img-size 32 --epochs 10 --batch-size 32 "
    "--opt adamw --lr 0.003 --weight-decay 0.01 --warmup-epochs 1 --sched-on-updates --smoothing 0 "
    "--shift 1 --scale 1 1 --ratio 1 1 --hflip 0 --color-jitter 0 --train-interpolation bilinear "
    "--workers 0"
)

MASKS = ("none", "dropout", "dropout, as many units as CamDrop", "camdrop")
CLAIMS = (
    ("dropout", "none"),
    ("camdrop", "none"),
    ("camdrop", "dropout"),
    ("camdrop", "dropout, as many units as CamDrop"),
)


@dataclass(frozen=True, eq=False)
class GradientBound:
    """The norms of Eq. (16) at one place of a model, for the biases in front of it.

    Attributes:
        name: the place: the masks act on its output, the biases are added to what goes in.
        norms: for each of :data:`MASKS` ||dS / db_i||_1 = sum_k |dS_k / db_i| of each draw of the
            mask, image and bias, (draws, N, C) float32; ``none`` has one draw.
        gradients: the same for |dL / db_i|, L the cross-entropy of the image.
        dropped: the fraction of units that each mask drops.
        rescaled: whether kept units are multiplied, as the layers do, or not, as in Eq. (12).
    """

    name: str
    norms: dict[str, Tensor]
    gradients: dict[str, Tensor]
    dropped: dict[str, float]
    rescaled: bool

    def claim(self, smaller: str, larger: str) -> dict[str, Any]:
        """How ``||.||`` under one mask compares with that under another.

        Returns:
            ``mean_difference``, smaller minus larger, the mean over draws and biases, then over
            images, with its ``standard_error`` over the images; ``ratio`` of the two means;
            ``share_holds``, of all draws, images and biases those in which it is at most the other,
            and ``share_equal`` of these; and the ``verdict`` on the mean: ``holds`` or ``fails`` if
            the difference is two standard errors from 0, else ``undecided``.
        """
        a, b = self.norms[smaller], self.norms[larger]
        differences = (a.double().mean((0, 2)) - b.double().mean((0, 2))).cpu()
        mean = float(differences.mean())
        error = float(differences.std()) / math.sqrt(len(differences))
        close = torch.isclose(a, b.expand_as(a), rtol=1e-5, atol=0.0)
        verdict = "holds" if mean < -2 * error else "fails" if mean > 2 * error else "undecided"
        return {
            "smaller": smaller,
            "larger": larger,
            "mean_difference": mean,
            "standard_error": error,
            "ratio": float(a.double().mean() / b.double().mean()),
            "share_holds": float(((a <= b) | close).double().mean()),
            "share_equal": float(close.double().mean()),
            "verdict": verdict,
        }

    def numbers(self) -> dict[str, Any]:
        """Everything, JSON-able: the norms of each mask, with the deviation over images of an
        image's mean, the claims, and the share in which Eq. (15), |dL/db| <= ||.||, holds."""
        _, images, biases = self.norms["none"].shape
        masks = {}
        for mask, norms in self.norms.items():
            per_image = norms.double().mean((0, 2))
            # equality is reached where the probabilities are 0 and 1, up to rounding
            bounded = self.gradients[mask] <= norms * (1 + 1e-5)
            masks[mask] = {
                "draws": len(norms),
                "dropped": self.dropped[mask],
                "mean_norm": float(per_image.mean()),
                "std_over_images": float(per_image.std()),
                "mean_gradient": float(self.gradients[mask].double().mean()),
                "share_bounded": float(bounded.double().mean()),
            }
        return {
            "place": self.name,
            "n_images": images,
            "n_biases": biases,
            "rescaled": self.rescaled,
            "masks": masks,
            "claims": [self.claim(*pair) for pair in CLAIMS],
        }


def gradient_bound(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    place: Place,
    *,
    keep_prob: float = 0.9,
    block_size: int = 8,
    rescale: bool = False,
    draws: int = 8,
    seed: int = 0,
) -> GradientBound:
    """The L1 norms of Eq. (16) without a mask, with dropout and with CamDrop, image by image.

    The paper says |dL/db_i| <= ||dS/db_i||^(c) <= ||dS/db_i||^(t) <= ||dS/db_i||: masks, CamDrop's
    (c) more than dropout's (t), tighten the bound of a bias's update. S are the K logits, b_i a
    bias of the layer in front of the mask; that of a convolution is shared by the pixels. Batch
    norms are in eval mode, so that an image's gradients are its own. CamDrop seeds blocks at the
    candidates only and thus drops fewer units than dropout at the same gamma; dropout at CamDrop's
    fraction of units stands beside it.

    Args:
        model: a CNN with a linear classifier; as before afterwards.
        images: (N, C, H, W), N at least 2.
        target: class of each image, (N,) int64.
        place: an activation, or a layer with a bias and no activation behind it, such as the last
            batch norm of a residual branch.
        keep_prob: gamma in (0, 1].
        block_size: r of CamDrop, clamped to the map.
        rescale: multiply what is kept, by 1 / gamma (Eq. 2) and by CHW / count_ones(M) (Eq. 10).
            Eq. (12), from which (16) is derived, does not.
        draws: masks of each kind, at least 1.
        seed: of the masks.

    Raises:
        UserError: the place has no bias in front of it, or an argument is out of its range.
    """
    if len(images) < 2 or draws < 1:
        raise UserError(
            f"a bound needs 2 images and 1 draw at least; got {len(images)} images, {draws} draws"
        )
    if not 0.0 < keep_prob <= 1.0:
        raise UserError(f"keep_prob must be in (0, 1]; got {keep_prob}")
    rate = 1.0 - keep_prob
    weight = next(model.parameters())
    images, target = images.to(weight.device, weight.dtype), target.to(weight.device)
    alpha = target_weights(classifier_weight(model), target, len(images))
    found: dict[str, list[tuple[Tensor, Tensor, float]]] = {mask: [] for mask in MASKS}
    with torch.random.fork_rng(devices=_devices(weight)), eval_mode(model):
        torch.manual_seed(seed)
        for draw in range(draws):
            kept: dict[str, Tensor] = {}

            def camdrop(x: Tensor, kept: dict[str, Tensor] = kept) -> Tensor:
                kept["camdrop"] = _factors(x, alpha, rate, block_size)
                return kept["camdrop"]

            def dropout(x: Tensor) -> Tensor:
                return _bernoulli(x, rate)

            def as_many(x: Tensor, kept: dict[str, Tensor] = kept) -> Tensor:
                return _bernoulli(x, float((kept["camdrop"] == 0).float().mean()))

            kinds = dict(zip(MASKS[1:], (dropout, as_many, camdrop), strict=True))
            # CamDrop first: one of the others drops as many units as it did
            for mask in ("camdrop", *MASKS[1:3]) + (("none",) if draw == 0 else ()):
                kind = kinds.get(mask)
                found[mask].append(_norms(model, images, target, place, kind, rescale))
    return GradientBound(
        place.name,
        {mask: torch.stack([one[0] for one in each]).cpu() for mask, each in found.items()},
        {mask: torch.stack([one[1] for one in each]).cpu() for mask, each in found.items()},
        {mask: sum(one[2] for one in each) / len(each) for mask, each in found.items()},
        rescale,
    )


def _norms(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    place: Place,
    mask: Callable[[Tensor], Tensor] | None,
    rescale: bool,
) -> tuple[Tensor, Tensor, float]:
    """||dS / db||_1 and |dL / db| of each image, both (N, C), and the fraction of units dropped."""
    share: list[float] = []

    def apply(x: Tensor) -> Tensor:
        if mask is None:
            share.append(0.0)
            return x
        factors = mask(x.detach())
        kept = factors != 0
        share.append(float((~kept).double().mean()))
        return x * (factors if rescale else kept.to(x.dtype))

    with _probed(model, place, apply) as biases:
        logits = model(images)
    if not biases:
        raise UserError(f"the place must run in a forward pass; {place.name} does not")
    parts = []
    for k in range(logits.shape[1]):
        (part,) = torch.autograd.grad(logits[:, k].sum(), biases[0], retain_graph=True)
        parts.append(part.flatten(1))
    jacobian = torch.stack(parts)
    errors = logits.detach().softmax(1) - F.one_hot(target, logits.shape[1])
    gradient = torch.einsum("nk,knc->nc", errors.to(jacobian.dtype), jacobian)
    return jacobian.abs().sum(0), gradient.abs(), share[0]


@contextmanager
def _probed(
    model: nn.Module, place: Place, mask: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Forwards inside add a zero to each image's channels in front of the place, (N, C, 1, 1),
    whose gradient is that of the image's own bias, and mask what comes out of the place."""
    module = model.get_submodule(place.name)
    activates = getattr(module, "act", None)
    has_bias = isinstance(getattr(module, "bias", None), Tensor)
    own_parameters = any(True for _ in module.parameters(recurse=False))
    if (own_parameters and not has_bias) or not isinstance(activates, nn.Identity | None):
        raise UserError(
            "the place must be an activation or a layer with a bias and no activation in it; "
            f"{place.name} is {type(module).__name__}"
        )
    biases: list[Tensor] = []

    def shifted(x: Tensor) -> Tensor:
        biases.append(torch.zeros_like(x[:, :, :1, :1]).requires_grad_())
        return x + biases[-1]

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (shifted(args[0]), *args[1:])

    def leave(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return mask(shifted(output) if has_bias else output)

    with ExitStack() as hooks:
        hooks.enter_context(module.register_forward_hook(leave))
        if not has_bias:
            hooks.enter_context(module.register_forward_pre_hook(enter))
        yield biases


def _bernoulli(x: Tensor, rate: float) -> Tensor:
    kept = torch.rand(x.shape, device=x.device, dtype=torch.float32) >= rate
    return kept.to(x.dtype) / (1.0 - rate)


def _factors(x: Tensor, alpha: Tensor, rate: float, block_size: int) -> Tensor:
    """What CamDrop multiplies each unit by: its gradient, as none flows through the map."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        dropped = cam_drop_2d(x, alpha, rate, block_size)
        return torch.autograd.grad(dropped.sum(), x)[0]


def _devices(weight: Tensor) -> list[torch.device]:
    return [weight.device] if weight.device.type == "cuda" else []


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="resnet8", metavar="NAME", help="resnet8 if not given")
    add("--checkpoint", metavar="RUN", help="a run of train.py, instead of training the model here")
    add("--num-images", type=int, default=100, metavar="N", help="validation images (100)")
    add("--seed", type=int, default=42, metavar="S", help="of images and masks (42)")
    add("--keep-prob", type=float, default=0.9, metavar="P", help="gamma (0.9)")
    add("--block-size", type=int, default=8, metavar="N", help="r of CamDrop (8)")
    add("--draws", type=int, default=4, metavar="N", help="masks of each kind (4)")
    add_output(parser, "gradient-bound")
    return parser


def measure(args: argparse.Namespace, subject: Subject) -> Iterator[dict[str, Any]]:
    """The figures of each place, with and without rescaling."""
    places = find_places(subject.model, tuple(subject.images.shape[2:]), "convs")
    progress = Progress("Gradient bound", 2 * len(places), log_interval=1)
    for rescale in (False, True):
        for place in places:
            found = gradient_bound(
                subject.model, subject.images, subject.targets, place, keep_prob=args.keep_prob,
                block_size=args.block_size, rescale=rescale, draws=args.draws, seed=args.seed,
            )  # fmt: skip
            progress.update(len(subject.images), {})
            yield {"rescaled": rescale, **found.numbers()}
    progress.close()


def trained_subject(args: argparse.Namespace) -> Subject:
    """The model of the run, or of one on the digits, and validation images of its data set."""
    parser = argparse.ArgumentParser()
    add_subject_flags(parser, split="validation", num_images=args.num_images)
    with tempfile.TemporaryDirectory() as folder:
        run = args.checkpoint or quietly_trained(
            Path(folder) / "run", [*TRAINING.split(), "--model", args.model]
        )
        flags = [args.model, "--checkpoint", str(run), "--seed", str(args.seed)]
        return load_subject(parser.parse_args(flags))


def report(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    facts = results["subject"]
    lines = [
        "# The gradient bound of CamDrop, Eq. (16)",
        "",
        f"`{results['command']}`: {facts['model']} trained on {facts['dataset']}, "
        f"{results['top1']:.1f} % of the {facts['num_images']} {facts['split']} images right; "
        f"gamma {results['keep_prob']:g}, r = {results['block_size']}, {results['draws']} masks of "
        f"each kind; {results['hardware']}; {versions(results)}.",
        "",
        "The paper: |dL/db| <= ||dS/db||(CamDrop) <= ||dS/db||(dropout) <= ||dS/db||. Each cell is "
        "the ratio of the means of the smaller to the larger norm, over images, biases and masks, "
        "then the verdict on the difference of the means (two standard errors over the images), "
        "then the share of single comparisons that hold.",
    ]
    for rescaled in (False, True):
        how = "kept units rescaled, as the layers do" if rescaled else "masks as in Eq. (12)"
        rows, header = [], ["place", "mean norm +- std", "dropped (CamDrop)"]
        for found in results["places"]:
            if found["rescaled"] != rescaled:
                continue
            none, camdrop = found["masks"]["none"], found["masks"]["camdrop"]
            row = [found["place"], f"{none['mean_norm']:.3f} +- {none['std_over_images']:.3f}"]
            row.append(f"{100 * camdrop['dropped']:.2f} %")
            for claim in found["claims"]:
                row.append(
                    f"{claim['ratio']:.3f}, {claim['verdict']}, {100 * claim['share_holds']:.0f} %"
                )
            rows.append(row)
        header += [f"{claim['smaller']} <= {claim['larger']}" for claim in found["claims"]]
        lines += ["", f"## {how[0].upper()}{how[1:]}", "", *table(header, rows)]
        lines += ["", "In the mean: " + "; ".join(verdicts(results["places"], rescaled)) + "."]
    bounded = min(
        mask["share_bounded"] for found in results["places"] for mask in found["masks"].values()
    )
    lines += [
        "",
        f"Eq. (15), |dL/db| <= ||dS/db||: in at least {100 * bounded:.1f} % of all cases.",
    ]
    return "\n".join(lines) + "\n"


def verdicts(places: list[dict[str, Any]], rescaled: bool) -> list[str]:
    """At how many places each inequality holds."""
    found = [place for place in places if place["rescaled"] == rescaled]
    words = []
    for index, claim in enumerate(found[0]["claims"]):
        said = [place["claims"][index]["verdict"] for place in found]
        words.append(
            f"{claim['smaller']} <= {claim['larger']} holds at {said.count('holds')} and fails at "
            f"{said.count('fails')} of {len(said)} places"
        )
    return words


def main() -> None:
    args = flags().parse_args()
    torch.set_num_threads(1)
    output = output_stem(args.output)
    subject = trained_subject(args)
    with torch.no_grad():
        device = next(subject.model.parameters()).device
        right = subject.model(subject.images.to(device)).argmax(1).cpu() == subject.targets
    facts = {name: fact for name, fact in subject.facts.items() if name != "weights"}
    results = {
        **circumstances("benchmarks.gradient_bound"),
        "subject": facts,
        "training": args.checkpoint or f"train.py {TRAINING} --model {args.model}",
        "top1": 100 * float(right.double().mean()),
        "keep_prob": args.keep_prob,
        "block_size": args.block_size,
        "draws": args.draws,
        "places": list(measure(args, subject)),
    }
    write_study(results, report(results), output)


if __name__ == "__main__":
    run_command(main)
