"""``nnUNetv2_ext advise``: what to run on a dataset, what not, and which control beside it."""

import argparse
import json

EPILOG = """\
Examples:
  nnUNetv2_ext advise -d 4
  nnUNetv2_ext advise -d 4 -c 2d --json

Reads dataset.json and some label maps in nnUNet_raw; plans, split and finished folds where there are any. Nothing is
written. Each line of advice has a reason: a rule of nnU-Net, or what was measured and on which data.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of a dataset in nnUNet_raw")
    parser.add_argument("-c", metavar="CONFIGURATION", help="default: 3d_fullres, or 2d for single slices")
    parser.add_argument("-p", metavar="PLANS", help="default: nnUNetPlans, or the only ones there are")
    parser.add_argument(
        "--cases", type=int, default=32, metavar="N", help="label maps to read, 0 for all (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print facts and advice as JSON")


def run(args: argparse.Namespace) -> int:
    from nnunetv2_ext.advice.report import all_advice, as_dict, as_text
    from nnunetv2_ext.data.facts import look_at

    facts = look_at(args.d, args.c, args.p, args.cases)
    said = all_advice(facts)
    print(json.dumps(as_dict(facts, said), indent=2) if args.json else as_text(facts, said))
    return 0
