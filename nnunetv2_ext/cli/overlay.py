"""``nnUNetv2_ext overlay``: a picture a case of a segmentation over its image."""

import argparse
from pathlib import Path
from typing import Any

EPILOG = """\
Examples:
  nnUNetv2_ext overlay -i IMAGES -p PREDICTIONS -o PICTURES
  nnUNetv2_ext overlay -i IMAGES -p PREDICTIONS -o PICTURES --truth LABELS

A volume is shown in its fullest slice across each axis, upright. The dataset.json that nnUNetv2_predict puts beside its
predictions names the labels; elsewhere give -d or -djfile. The pictures show patients.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-i", required=True, type=Path, metavar="IMAGES", help="as for nnUNetv2_predict")
    parser.add_argument("-p", required=True, type=Path, metavar="FOLDER", help="segmentations")
    parser.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="new or empty folder for the pictures")
    parser.add_argument("--truth", type=Path, metavar="FOLDER", help="true segmentations, drawn beside")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="these only")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-djfile", type=Path, metavar="FILE", help="dataset.json, which names the labels")
    which.add_argument("-d", metavar="DATASET", help="id or name of a dataset in nnUNet_preprocessed or nnUNet_raw")


def run(args: argparse.Namespace) -> int:
    """Draw every case, and say where the pictures are."""
    from nnunetv2_ext.cli.evaluate import dataset_json_file
    from nnunetv2_ext.core.files import read_json, require_writable
    from nnunetv2_ext.core.progress import progress_bar
    from nnunetv2_ext.data.folders import cases_of_images
    from nnunetv2_ext.evaluate.pairs import case_files

    content = read_json(dataset_json_file(args, args.p, args.truth))
    ending = str(content["file_ending"])
    there = case_files(args.p, ending, "segmentations")
    truth = case_files(args.truth, ending, "the truth") if args.truth else {}
    cases = args.cases or list(there)
    for what, files in (("segmentation", there), *([("truth", truth)] if args.truth else [])):
        if missing := [case for case in cases if case not in files]:
            raise ValueError(f"case {missing[0]} has no {what}; name cases that have, with --cases")
    images = cases_of_images(args.i, ending)
    if missing := [case for case in cases if case not in images]:
        raise ValueError(f"case {missing[0]} has no image {missing[0]}_0000{ending} in {args.i}: give its folder")
    if args.o.exists() and any(args.o.iterdir()):
        raise ValueError(f"{args.o} is not empty, and nothing is overwritten: name another folder")
    args.o.mkdir(parents=True, exist_ok=True)
    require_writable(args.o)
    for case in progress_bar(cases, "drawing"):
        maps = {"segmentation": there[case], **({"truth": truth[case]} if truth else {})}
        draw_case(case, images[case], maps, content, args.o / f"{case}.png")
    print(f"{len(cases)} pictures in {args.o}; they show patients")
    return 0


def draw_case(case: str, images: list[Path], maps: dict[str, Path], dataset_json: dict[str, Any], path: Path) -> None:
    """Write the picture of one case: a row a view; the image, then the image under each label map.

    Raises:
        ValueError: a file is damaged, or a label map lies on another grid than the image.
    """
    import matplotlib.style
    import numpy as np
    from matplotlib.figure import Figure

    from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice
    from nnunetv2_ext.core.labelmaps import names_of_values
    from nnunetv2_ext.core.orientation import directions_of, view_across
    from nnunetv2_ext.data.case import Volume, find_reader, read_image, read_label_map, require_same_grid, spacing_of
    from nnunetv2_ext.data.channels import are_colours, channel_names

    ending = str(dataset_json["file_ending"])
    reader = find_reader(ending, dataset_json.get("overwrite_image_reader_writer"), images[0])
    image, properties = read_image(case, images, reader)
    labels: dict[str, Any] = {}
    for name, file in maps.items():
        labels[name], of_label = read_label_map(case, file, reader, name)
        volumes = Volume(name, labels[name].shape, of_label), Volume("image", image.shape[1:], properties)
        require_same_grid(case, *volumes, "give the image that was segmented")
    in_colours = are_colours(channel_names(dataset_json))
    shown = image[:3].transpose(1, 2, 3, 0) / max(255.0, float(image.max())) if in_colours else image[0]
    classes = names_of_values(dataset_json)
    fullest = next(iter(labels.values()))
    flat = image.shape[1] == 1
    directions, spacing = directions_of(properties), spacing_of(properties)
    views = [view_across(axis, directions) for axis in ([0] if flat else range(3))]
    with matplotlib.style.context("default"):
        heights = [view.height(image.shape[1:], spacing, 4.0) for view in views]
        columns = 1 + len(labels)
        figure = Figure(figsize=(4.2 * columns, sum(heights) + 0.9), layout="constrained")
        figure.suptitle(case, fontsize=11, wrap=True)
        grid = figure.subplots(len(views), columns, squeeze=False, height_ratios=heights)
        for row, view in zip(grid, views, strict=True):
            assert view.axis is not None
            index = fullest_slice(fullest, view.axis)
            parts = [shown] if shown.ndim == 3 else [shown[..., channel] for channel in range(3)]
            cuts = [view.cut(part, index) for part in parts]
            cut = cuts[0] if len(cuts) == 1 else np.stack(cuts, -1)
            options: dict[str, Any] = {"spacing": view.spacing(spacing), "letters": view.letters}
            draw_slice(row[0], cut, title="image" if flat else f"image, {view.caption(index)}", **options)
            for cell, (name, label) in zip(row[1:], labels.items(), strict=True):
                draw_slice(cell, cut, view.cut(label, index), classes, title=name, **options)
        present = {int(v) for label in labels.values() for v in np.unique(label)}
        add_legend(figure, classes, present)
        figure.savefig(path, dpi=110)
