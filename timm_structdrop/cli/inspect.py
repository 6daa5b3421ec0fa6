"""Look into a model: how structured its layers' activations are, and what DropCluster learned.

Writes pictures and their numbers. With a DropCluster layer, its clusters and the mask of a training
step too, and for clusters that came with the model, whether they follow the data; without one,
where it should go.

With --cams, class activation maps instead: where the evidence for each image's class lies and how
spread it is, side by side with other models of the same images:

  inspect resnet20 --checkpoint PLAIN --cams --compare resnet20_camdrop CAMDROP
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from timm_structdrop.analysis import (
    LAYER_CHOICES,
    ClusterMaps,
    ClusterStudy,
    HopkinsReport,
    cluster_layers,
    cluster_maps,
    cluster_places,
    cluster_study,
    collect_maps,
    draw_cluster_maps,
    draw_hopkins_histograms,
    draw_hopkins_map,
    draw_training_mask,
    fit_clusters,
    hopkins_report,
    training_mask,
)
from timm_structdrop.cli._cams import add_cam_flags, inspect_cams
from timm_structdrop.cli._images import Subject, add_subject_flags, load_subject
from timm_structdrop.errors import UserError
from timm_structdrop.files import Files, output_folder
from timm_structdrop.layers.dropcluster import resample_labels
from timm_structdrop.recipes.parser import at_least, fraction
from timm_structdrop.words import counted, table

__all__ = ["add_flags", "run"]

LEAST_IMAGES = 10  # for correlations over images
USUAL_CLUSTERS = 15
SAMPLES, CAM_SAMPLES = 2, 8  # images in a picture of clusters, and of class activation maps


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m timm_structdrop inspect``."""
    add_subject_flags(parser, split="validation", num_images=64)
    add = parser.add_argument_group("Inspection").add_argument
    add("--output", default="output/inspect", metavar="DIR", help="folder of what is written")
    add(
        "--layers",
        default="stages",
        choices=tuple(LAYER_CHOICES),
        help="which layers are measured: after each stage, or after every convolution",
    )
    add(
        "--threshold",
        type=fraction,
        default=0.6,
        metavar="X",
        help="a layer is structured if its median channel reaches this Spatial Hopkins statistic; "
        "0.5 is no structure, 1 the most",
    )
    add(
        "--num-points",
        type=at_least(1),
        default=64,
        metavar="N",
        help="random pixels of each map that the statistic is computed at",
    )
    add(
        "--num-samples",
        type=at_least(1),
        metavar="N",
        help=f"images shown in the pictures; {SAMPLES}, or {CAM_SAMPLES} with --cams, if not given",
    )
    add("-b", "--batch-size", type=at_least(1), default=64, metavar="N", help="images per step")
    add_cam_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Write numbers and pictures of a model's clusters, or its class activation maps."""
    if not args.cams and (args.compare or args.cam_layer):
        raise UserError("--compare and --cam-layer are of class activation maps; got no --cams")
    args.num_samples = args.num_samples or (CAM_SAMPLES if args.cams else SAMPLES)
    subject = load_subject(args)
    files = Files(output_folder(args.output))
    print(
        f"{subject.facts['model']} ({subject.facts['weights']} weights), {subject.images_text()}\n"
    )
    if args.cams:
        inspect_cams(args, subject, files)
    else:
        inspect_layers(args, subject, files)
        fitted_here = [n for n, own in cluster_layers(subject.model).items() if not own.is_fitted]
        if fitted_here:
            fit_clusters(subject.model, subject.images)
        inspect_clusters(args, subject, fitted_here, files)
    files.draw()
    print("\nWritten:", *files.paths, sep="\n  ")


def inspect_layers(args: argparse.Namespace, subject: Subject, files: Files) -> None:
    """The Hopkins report: printed, written, and its pictures."""
    layers = cluster_layers(subject.model)
    report = hopkins_report(
        subject.model,
        subject.images,
        layers=args.layers,
        n_points=args.num_points,
        threshold=args.threshold,
        n_clusters=max((layer.n_clusters for layer in layers.values()), default=USUAL_CLUSTERS),
        batch_size=args.batch_size,
        seed=args.seed,
    )
    print(report_table(report))
    files.json("hopkins.json", {**subject.facts, **report.numbers()})
    files.csv("hopkins.csv", report.rows())
    files.picture("hopkins-histograms.png", draw_hopkins_histograms, report, subject.name)
    best = report.recommended
    mapped = list(layers) or ([best.name] if best else [])
    for layer in report.layers:
        if layer.name in mapped:
            name = f"hopkins-map{_suffix(layer.name, mapped)}.png"
            files.picture(name, draw_hopkins_map, layer, subject.name, report.n_images)


def report_table(report: HopkinsReport) -> str:
    """The layers, the skipped ones, and the recommendation."""
    best = report.recommended
    rows = []
    for layer in report.layers:
        values = layer.per_channel
        structured = "yes" if report.is_structured(layer) else "no"
        rows.append(
            [
                layer.name,
                str(len(values)),
                f"{layer.size[0]}x{layer.size[1]}",
                f"{layer.median:.3f}",
                f"{float(values.min()):.3f}",
                f"{float(values.max()):.3f}",
                "yes, recommended" if layer is best else structured,
            ]
        )
    header = ["layer", "channels", "map", "median Spatial Hopkins", "min", "max", "structured"]
    lines = [table(header, rows)]
    for name, (height, width) in report.skipped.items():
        lines.append(f"{name} is skipped: its {height}x{width} maps are smaller than 3x3")
    rule = f"the median channel reaches {report.threshold:g}; 0.5 is no structure"
    if best is None:
        lines.append(f"No layer of {report.n_clusters} or more pixels is structured ({rule})")
    else:
        lines.append(
            f"Deepest structured layer: {best.name} ({rule})\n"
            f'  attach(model, "dropcluster", modules=["{best.name}"]) puts DropCluster there'
        )
    return "\n".join(lines)


def inspect_clusters(
    args: argparse.Namespace, subject: Subject, fitted_here: Collection[str], files: Files
) -> None:
    """Clusters and mask of each DropCluster layer: printed, written, and their pictures."""
    every = cluster_maps(subject.model, subject.images, args.num_samples, args.batch_size)
    for maps in every:
        suffix = _suffix(maps.name, every)
        mask = training_mask(subject.model, maps.name, args.seed)
        here = maps.name in fitted_here
        when = f"at {maps.fitted_at} (epoch or update, counted from 0)"
        when = "here, on these images" if here else when
        print(
            f"\nDropCluster at {maps.name}: {counted(maps.n_clusters, 'cluster')}, "
            f"{int((~maps.structured).sum())} of {counted(len(maps.labels), 'channel')} "
            f"unstructured, fitted {when}\n"
            f"Mask of one training step: p = {maps.drop_prob:g}, "
            f"{100 * float((~mask.kept).double().mean()):.1f} % of the units are zero"
        )
        figures = {**subject.facts, "fitted_here": here, **maps.numbers(), "mask": mask.numbers()}
        study = None if here else study_clusters(args, subject, maps)
        if study is not None:
            print(study_table(study))
            figures["study"] = study.numbers()
            files.csv(f"study{suffix}.csv", study.rows())
        files.json(f"clusters{suffix}.json", figures)
        files.csv(f"clusters{suffix}.csv", maps.rows())
        files.csv(f"labels{suffix}.csv", maps.label_rows())
        files.picture(f"clusters{suffix}.png", draw_cluster_maps, maps, subject.name)
        files.picture(f"mask{suffix}.png", draw_training_mask, maps, mask, subject.name)


def study_clusters(
    args: argparse.Namespace, subject: Subject, maps: ClusterMaps
) -> ClusterStudy | None:
    """Whether the clusters follow the data; None with too few images for correlations."""
    if len(subject.images) < LEAST_IMAGES:
        print(f"Correlations within clusters need {LEAST_IMAGES} images; got {len(subject.images)}")
        return None
    place = next(place for place in cluster_places(subject.model) if place.name == maps.name)
    activations = collect_maps(subject.model, place, subject.images, args.batch_size)
    labels = resample_labels(maps.labels, (activations.shape[2], activations.shape[3]))
    return cluster_study(
        maps.name, activations, labels, maps.structured, maps.n_clusters, seed=args.seed
    )


def study_table(study: ClusterStudy) -> str:
    numbers = study.numbers()
    channels = numbers["n_channels"]
    rows = []
    for key, figures in numbers["cells"].items():
        row = [figures["what"]]
        for mean in ("over_cells", "over_pairs"):
            higher = figures[mean]["clusters_are_higher_in_channels"]
            behind = "" if key == "clusters" else f" ({higher})"
            row.append(f"{figures[mean]['mean']:.3f} +- {figures[mean]['std']:.3f}{behind}")
        rows.append(row)
    header = ["cells", "mean over cells", "mean over pixel pairs"]
    return (
        f"Correlation of the pixels in a cell over {counted(numbers['n_images'], 'image')}, "
        f"mean +- std of {counted(channels, 'channel')}\n"
        f"(behind it, in how many of them that of the clusters is higher):\n{table(header, rows)}"
    )


def _suffix(name: str, names: Collection[Any]) -> str:
    """Part of a file's name that tells the layers apart where there are several."""
    return f"-{name}" if len(names) > 1 else ""
