"""``nnUNetv2_ext add-channel``: a dataset with a further channel, made ready for a finished model without it."""

import argparse
from pathlib import Path

EPILOG = """\
Examples:
  nnUNetv2_ext add-channel inspect -d 12 -base MODEL_FOLDER
  nnUNetv2_ext add-channel prepare -d 12 -base MODEL_FOLDER
  nnUNetv2_ext add-channel zeros -i FOLDER --channels 2

`inspect` and `prepare` look at dataset 12, whose first channels are those of the model. `prepare` writes plans.
`zeros` writes an image of zeros for each channel that a case of a folder lacks; that is how a case says so.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the steps' arguments."""
    steps = parser.add_subparsers(dest="step", required=True, metavar="prepare|inspect|zeros")
    for name, text in (("prepare", "write plans for the dataset"), ("inspect", "what prepare would do, and why not")):
        step = steps.add_parser(name, help=text)
        step.add_argument("-d", required=True, metavar="DATASET", help="id or name: old channels first, then new ones")
        step.add_argument("-base", type=Path, required=True, metavar="MODEL_FOLDER",
                          help="finished model of the old channels")  # fmt: skip
        step.add_argument("-f", default="0", metavar="FOLD", help="of the base, or all (default: %(default)s)")
        step.add_argument("-p", default="nnUNetPlans_pemma", metavar="PLANS", help="new plans (default: %(default)s)")
        step.add_argument("--normalization", default="ZScoreNormalization", metavar="SCHEME",
                          help="of the new channels (default: %(default)s)")  # fmt: skip
    zeros = steps.add_parser("zeros", help="write zeros for missing channels")
    zeros.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="images named CASE_0000 and so on")
    zeros.add_argument("--channels", type=int, default=2, help="that a case is to have (default: %(default)s)")
    zeros.add_argument("--ending", default=".nii.gz", help="of the images (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prepare, or write zeros, and say what was done."""
    if args.step == "zeros":
        from nnunetv2_ext.pemma.channels import write_zeros

        if args.channels < 2:
            raise ValueError(f"--channels {args.channels}: a new channel is the second or a later one; give 2 or more")
        written = write_zeros(args.i, args.channels, args.ending)
        print("\n".join(f"wrote {file}" for file in written) or "every case has all of its channels")
        return 0
    from nnunetv2_ext.data.channels import channel_names
    from nnunetv2_ext.pemma.prepare import prepare

    prepared = prepare(args.d, args.base, args.f, args.normalization, args.p)
    base, name = prepared.base, prepared.base.configuration_name
    patch = " x ".join(map(str, base.configuration["patch_size"]))
    print(f"base: {base.file}, {base.trainer}, {name}, patch {patch}, channels {', '.join(base.channels)}")
    print(f"dataset: {prepared.raw.name}, channels {', '.join(channel_names(prepared.raw.json))}")
    print("\n".join(prepared.said))
    if args.step == "inspect":
        print(f"`prepare` would write {prepared.file}")
        return 0
    prepared.write()
    number = prepared.raw.name[7:10]
    print(f"wrote {prepared.file}")
    if not (prepared.file.parent / "dataset_fingerprint.json").is_file():  # nnU-Net's training copies it
        print(f"next: nnUNetv2_extract_fingerprint -d {number}")
    print(f"next: nnUNetv2_preprocess -d {number} -plans_name {args.p} -c {name}")
    print(
        f'then: nnUNet_ext_settings="pemma.base={args.base}" nnUNetv2_train {number} {name} {args.f} '
        f"-tr nnUNetTrainerPEMMA -p {args.p}"
    )
    return 0
