"""Dice and average precision of each class on a fold's validation cases, voxels of all cases pooled.

Average precision needs the probabilities, so the model predicts here, by nnU-Net's own predictor. It judges lesions of
a thousandth of an image: there an empty map has a pixel accuracy above 99 %, and Dice is 0 below a probability of half.

    python examples/average_precision.py $nnUNet_results/Dataset032_NAME/nnUNetTrainerPhoto__nnUNetPlans__2d -f 0

One JSON line comes out: {"MODEL": ..., "fold": 0, "Dice": {class: ...}, "AP": {class: ...}}.
Definition: https://scikit-learn.org/stable/modules/generated/sklearn.metrics.average_precision_score.html
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from sklearn.metrics import average_precision_score


def score(truths, segmentations, probabilities, labels):
    """Pooled Dice and average precision of each foreground class or region.

    truths, segmentations: lists of integer arrays of one shape a case; probabilities: (classes, ...) a case, in the
    order of nnU-Net's output; labels: its LabelManager. A class that no truth has gets None for both.
    """
    names = {name: value for name, value in labels.label_dict.items() if name not in ("background", "ignore")}
    dice, precision = {}, {}
    for channel, (name, value) in enumerate(names.items(), start=0 if labels.has_regions else 1):
        wanted = np.atleast_1d(value)
        valid = [truth != labels.ignore_label for truth in truths]
        truth = np.concatenate([np.isin(array, wanted)[keep] for array, keep in zip(truths, valid, strict=True)])
        found = np.concatenate([np.isin(array, wanted)[keep] for array, keep in zip(segmentations, valid, strict=True)])
        scores = np.concatenate([array[channel][keep] for array, keep in zip(probabilities, valid, strict=True)])
        any_truth = truth.any()
        dice[name] = round(2 * float((truth & found).sum() / (truth.sum() + found.sum())), 4) if any_truth else None
        precision[name] = round(float(average_precision_score(truth, scores)), 4) if any_truth else None
    return dice, precision


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("-f", type=int, required=True, metavar="FOLD", help="fold whose validation cases are scored")
    parser.add_argument("-device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--mirroring", action="store_true", help="predict with mirroring, as nnUNetv2_predict does")
    parser.add_argument("--step", type=float, default=0.5, help="step of the sliding window, as nnUNetv2_predict's")
    args = parser.parse_args(arguments)
    predictor = nnUNetPredictor(
        tile_step_size=args.step,
        use_mirroring=args.mirroring,
        perform_everything_on_device=False,
        device=torch.device(args.device),
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(str(args.model), (args.f,), "checkpoint_final.pth")
    name = maybe_convert_to_dataset_name(args.model.resolve().parent.name)
    cases = load_json(f"{nnUNet_preprocessed}/{name}/splits_final.json")[args.f]["val"]
    files = get_filenames_of_train_images_and_targets(f"{nnUNet_raw}/{name}", predictor.dataset_json)
    reader = predictor.plans_manager.image_reader_writer_class()
    truths, segmentations, probabilities = [], [], []
    for case in cases:
        image, properties = reader.read_images(files[case]["images"])
        segmentation, probability = predictor.predict_single_npy_array(image, properties, None, None, True)
        truths.append(reader.read_seg(files[case]["label"])[0][0])
        segmentations.append(np.asarray(segmentation))
        probabilities.append(np.asarray(probability, np.float32))
    labels = predictor.plans_manager.get_label_manager(predictor.dataset_json)
    dice, precision = score(truths, segmentations, probabilities, labels)
    print(json.dumps({"model": str(args.model), "fold": args.f, "Dice": dice, "AP": precision}))


if __name__ == "__main__":
    main()
