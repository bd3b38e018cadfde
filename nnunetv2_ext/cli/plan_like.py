"""``nnUNetv2_ext plan-like``: plans for a dataset on which all of somebody's weights load."""

import argparse
import json
from pathlib import Path

EPILOG = """\
Example:
  nnUNetv2_ext plan-like checkpoint_final.pth -d 4
  nnUNetv2_preprocess -d 4 -plans_name nnUNetPlans_like -c 3d_fullres
  export nnUNet_ext_settings="init_from=checkpoint_final.pth"
  nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerExt -p nnUNetPlans_like

Network, patch, spacing, resampling and normalisation are the file's; batch size and labels are the dataset's.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a checkpoint, or the folder of a fold")
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of a planned dataset")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="its own plans (default: %(default)s)")
    parser.add_argument("-o", default="nnUNetPlans_like", metavar="PLANS", help="new plans (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from nnunetv2_ext.core.files import atomic_write_text, read_json
    from nnunetv2_ext.data.preprocessed import open_preprocessed
    from nnunetv2_ext.parts.start.plan import configuration_for, plans_like
    from nnunetv2_ext.parts.start.source import read_source
    from nnunetv2_ext.parts.start.start import Home, look_at
    from nnunetv2_ext.parts.start.units import Asked

    source = read_source(args.file.expanduser())
    configuration = configuration_for(source)
    flat = len(source.configuration["patch_size"]) == 2
    base = open_preprocessed(args.d, "2d" if flat else "3d_fullres", args.p, files=False)
    old = read_json(base.base / f"{args.p}.json")
    plans = plans_like(source, old, base.configuration.configuration, base.dataset_json, args.o)
    file = base.base / f"{args.o}.json"
    if args.o == args.p or (file.is_file() and read_json(file) != plans):
        raise ValueError(f"{file} exists with another plan, which stays as it is: give another name with -o")
    new = base.with_plans(plans, configuration)
    start = look_at(new.build_network(), source, Home(new.configuration.configuration, base.dataset_json), Asked())
    if start.refusal:
        raise ValueError(start.refusal)
    atomic_write_text(file, json.dumps(plans, indent=4) + "\n")
    print(start.table)
    patches = base.configuration.patch_size, new.configuration.patch_size
    if list(patches[0]) != list(patches[1]):
        planned = " x ".join(map(str, patches[0]))
        print(f"the batch size {new.configuration.batch_size} was planned for a patch of {planned}; see if it fits")
    print(f"wrote {file}")
    print(f"next: nnUNetv2_preprocess -d {base.base.name[7:10]} -plans_name {args.o} -c {configuration}")
    print(
        f'then: nnUNet_ext_settings="init_from={source.path}" nnUNetv2_train {base.base.name[7:10]} {configuration} 0 '
        f"-tr nnUNetTrainerExt -p {args.o}"
    )
    return 0
