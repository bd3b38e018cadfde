"""``nnUNetv2_ext weights``: what is in a file of weights, and what ``init_from`` would do with it."""

import argparse
from pathlib import Path

EPILOG = """\
Examples:
  nnUNetv2_ext weights checkpoint_final.pth
  nnUNetv2_ext weights checkpoint_final.pth -d 4 -c 3d_fullres
  nnUNet_ext_settings="init_parts=encoder" nnUNetv2_ext weights checkpoint_final.pth -d 4

Nothing is trained or written. The exit status is 1 if init_from would refuse the file for these plans.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a checkpoint, or the folder of a fold")
    parser.add_argument("-d", metavar="DATASET", help="id or name of a planned dataset")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    import sys

    from nnunetv2_ext.core.resolve import resolve
    from nnunetv2_ext.data.preprocessed import open_preprocessed
    from nnunetv2_ext.parts.settings import HouseSettings
    from nnunetv2_ext.parts.start.source import facts_of, read_source
    from nnunetv2_ext.parts.start.start import Home, look_at
    from nnunetv2_ext.parts.start.units import asked_by

    settings = resolve(HouseSettings).settings
    source = read_source(args.file.expanduser(), settings.init_trust)  # type: ignore[attr-defined]
    if args.d is None:
        # nnU-Net lists a tensor of the encoder under up to four names
        tensors = {(tensor.data_ptr(), tensor.shape): tensor.numel() for tensor in source.weights.values()}
        of = f", of {source.family}" if source.family else ""
        print(f"{source.path}: {len(tensors)} tensors, {sum(tensors.values()):,} values, {source.dimensions}-D{of}")
        for name, fact in facts_of(source.configuration, source.dataset_json).items():
            print(f"  {name:<15} {fact}")
        configuration = " -c 2d" if source.dimensions == 2 else ""
        print(
            f"next: nnUNetv2_ext weights {source.path} -d DATASET{configuration} says what a training on that dataset "
            "would load"
        )
        return 0
    found = open_preprocessed(args.d, args.c, args.p, files=False)
    home = Home(found.configuration.configuration, found.dataset_json)
    start = look_at(found.build_network(), source, home, asked_by(settings, found.is_cascaded))
    print(start.table)
    if start.refusal:
        print(f"refused: {start.refusal}", file=sys.stderr)
        return 1
    return 0
