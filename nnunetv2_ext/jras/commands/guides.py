"""``nnUNetv2_ext guides MODEL_FOLDER IMAGE -o PANEL.png``: what a J-RAS model reads of its guides, as a picture."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model_folder", type=Path, help="nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("image", type=Path, nargs="+", help="image file; one per channel, in the dataset's order")
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture to write (PNG); it shows patients")
    parser.add_argument("-l", "--label", type=Path, help="true label of the image, drawn beside the prediction")
    parser.add_argument("-f", "--fold", default="0", help="fold whose guides are shown (default: %(default)s)")
    parser.add_argument("-chk", "--checkpoint", default="checkpoint_final.pth", help="default: %(default)s")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Write the picture and print the guides with their shares of the attention."""
    import torch

    from nnunetv2_ext.core.devices import check_device
    from nnunetv2_ext.core.files import require_picture, require_writable
    from nnunetv2_ext.data.find import find_checkpoint
    from nnunetv2_ext.jras.look import cases_of_guides, known_case, load_model, look_at_image
    from nnunetv2_ext.jras.panel import draw_reading

    check_device(args.device)
    require_writable(args.output.absolute().parent)
    require_picture(args.output, "-o")
    predictor = load_model(args.model_folder, args.fold, args.checkpoint, torch.device(args.device))
    file = find_checkpoint(args.model_folder, args.fold, args.checkpoint)
    view = look_at_image(predictor, args.image, args.label, cases_of_guides(file))
    configuration = predictor.configuration_manager
    spacing = configuration.spacing[-len(configuration.patch_size) :]
    title = f"{args.model_folder.name}, fold {args.fold}"
    draw_reading(view, args.output, title, predictor.dataset_json, predictor.label_manager, spacing)
    if (case := known_case(file, predictor.dataset_json, args.image[0])) is not None:
        print(
            f"WARNING: {case}, or another case of its subject, is in the guide bank: it retrieves itself. Look at an "
            "image that the model was not trained on"
        )
    print("attention  guide")
    for guide in view.guides:
        print(f"{guide.attention:9.3f}  {guide.row} of {guide.case or 'a case that this model does not name'}")
    print(f"wrote {args.output}; it shows image patches of the guides' cases")
    return 0
