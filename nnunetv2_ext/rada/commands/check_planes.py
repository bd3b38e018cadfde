"""``nnUNetv2_ext check-planes``: the annotated planes of a preprocessed sparse dataset, before it is trained on."""

import argparse
from pathlib import Path

EPILOG = """\
Example:
  nnUNetv2_ext check-planes -d 104 -c 3d_fullres

Axes and slices are those of the preprocessed arrays, which nnU-Net may have transposed; lost planes are also given in
slices of the raw label. The picture shows patients.
Exit status: 0, or 1 if preprocessing erased a plane.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of a preprocessed dataset")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="where to put the picture (default: nnunetv2_ext/rada beside the plans)"
    )
    parser.add_argument("--json", action="store_true", help="print the planes as JSON, and write no picture")
    parser.add_argument("--cases", type=int, default=4, help="cases in the picture, 0 for none (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the report and write the picture."""
    if args.cases < 0:
        raise ValueError(f"--cases is the number of cases in the picture, 0 for none, got {args.cases}")
    import json

    from nnunetv2_ext.rada.annotation.check import as_dict, check
    from nnunetv2_ext.rada.annotation.preprocessed import open_sparse

    data = open_sparse(args.d, args.c, args.p)
    if args.json:
        found = as_dict(data)
        print(json.dumps(found, indent=2))
        return 1 if found["lost"] else 0
    folder = args.o or data.base / "nnunetv2_ext" / "rada"
    picture = folder / f"planes_{args.p}_{args.c}.png" if args.cases > 0 else None
    return 0 if check(data, picture, args.cases) else 1
