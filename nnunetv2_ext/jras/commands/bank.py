"""``nnUNetv2_ext bank MODEL --images I --labels L -o MODEL2``: other guides for a trained J-RAS model, or none."""

import argparse
from pathlib import Path

EPILOG = (
    "The weights stay as they are, bit for bit. Predict with nnUNetv2_predict_from_modelfolder, or name the result "
    "TRAINER__PLANS__CONFIGURATION below nnUNet_results. PRIVACY: a bank holds image patches of its cases."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model_folder", type=Path, help="nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("-o", "--output", type=Path, required=True, help="model folder to write; must not exist")
    parser.add_argument("-i", "--images", type=Path, help="folder with the new guides' images, CASE_0000.nii.gz ...")
    parser.add_argument("-l", "--labels", type=Path, help="folder with their labels, CASE.nii.gz")
    parser.add_argument(
        "--queries",
        type=Path,
        help="folder with the images that will be predicted: a case whose subject is among them is refused as a guide",
    )
    parser.add_argument("--seed", type=int, default=0, help="which draw of patches (default: %(default)s)")
    parser.add_argument("--strip", action="store_true", help="leave no guides: without patients' patches, plain path")


def run(args: argparse.Namespace) -> int:
    """Write the model."""
    from nnunetv2_ext.core.export import export_model
    from nnunetv2_ext.jras.replace import replace_bank, require_guides

    given = [folder is not None for folder in (args.images, args.labels)]
    if any(given) if args.strip else not all(given):
        raise ValueError("give the new guides with --images and --labels, or --strip to leave none")
    if args.strip:
        require_guides(args.model_folder)
        written = export_model(args.model_folder, args.output, edits=("strip-bank",))
    else:
        written = replace_bank(args.model_folder, args.images, args.labels, args.output, args.queries, args.seed)
    for path in written:
        print(f"wrote {path}")
    return 0
