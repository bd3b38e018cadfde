"""``nnUNetv2_ext fix-fingerprint``: CT intensities of a sparse dataset from its annotated voxels only."""

import argparse

EPILOG = """\
nnU-Net counts voxels with the ignore label as foreground when it measures intensities, by which it normalises CT.
For a CT dataset with an ignore label:
  nnUNetv2_plan_and_preprocess -d 104 --no_pp
  nnUNetv2_ext fix-fingerprint -d 104
  nnUNetv2_preprocess -d 104 -c 3d_fullres
Extracting the fingerprint again (--clean) undoes it. MR images are normalised one by one, and nothing is changed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of a planned dataset")


def run(args: argparse.Namespace) -> int:
    from nnunetv2_ext.data.fingerprint import fix_fingerprint

    fix_fingerprint(args.d)
    return 0
