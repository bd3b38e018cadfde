"""``nnUNetv2_ext unlabelled``: a pool of unlabelled scans beside a preprocessed dataset."""

import argparse
from pathlib import Path

EPILOG = """\
Example:
  nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres
  nnUNetv2_ext unlabelled -d 4 -c 3d_fullres -i SCANS

SCANS holds images named as nnU-Net's (CASE_0000.nii.gz), no labels. They are preprocessed with the plans of the
labelled dataset, and lie below nnUNet_preprocessed/DATASET/nnunetv2_ext/unlabelled. The dataset itself stays as it is.
Labelled and test cases are refused, under another name too. An interrupted run goes on with the same command.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of a planned dataset")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="such as 3d_fullres")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    parser.add_argument("-i", required=True, type=Path, metavar="FOLDER", help="images without labels")
    parser.add_argument("-np", type=int, metavar="N", help="processes (default: nnUNet_def_n_proc, at most one a CPU)")
    subjects = parser.add_mutually_exclusive_group()
    subjects.add_argument("--group-regex", metavar="REGEX", help="its first group is the subject in a case's name")
    subjects.add_argument("--groups", type=Path, metavar="FILE", help="JSON or CSV: which cases are of one subject")


def run(args: argparse.Namespace) -> int:
    import os

    from nnunetv2_ext.core.processes import usable_cpus
    from nnunetv2_ext.data.fill_pool import fill_pool

    processes = args.np if args.np is not None else min(int(os.environ.get("nnUNet_def_n_proc", 8)), usable_cpus())
    if processes < 1:
        raise ValueError(f"-np {processes}: give a number of processes of 1 or more")
    fill_pool(args.d, args.c, args.p, args.i, processes, args.group_regex, args.groups)
    return 0
