"""When a finished model lacks nothing but the last channels of a dataset."""

import shlex

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.facts import DatasetFacts


def advice(facts: DatasetFacts) -> list[Advice]:
    """For the first such model, of the same labels and configuration."""
    for model in facts.elsewhere:
        old = len(model.channels)
        same = model.labels == facts.labels and model.configuration == facts.configuration
        if not same or not 0 < old < len(facts.channels) or model.channels != facts.channels[:old]:
            continue
        new, folder = ", ".join(facts.channels[old:]), shlex.quote(model.folder)
        where = f"{facts.id} {facts.configuration} {model.fold} -p nnUNetPlans_pemma"
        return [
            Advice(
                "run",
                f"nnUNetTrainerPEMMA, if cases without {new} are to be segmented too",
                f"{model.folder} was trained on {', '.join(model.channels)}: where {new} is missing, its prediction "
                "stays, by construction; what the channel brings was not measured on real images",
                (
                    f"nnUNetv2_ext add-channel prepare -d {facts.id} -base {folder} -f {model.fold}",
                    f"nnUNetv2_extract_fingerprint -d {facts.id}",
                    f"nnUNetv2_preprocess -d {facts.id} -plans_name nnUNetPlans_pemma -c {facts.configuration}",
                    f'nnUNet_ext_settings="pemma.base={folder}" nnUNetv2_train {where} -tr nnUNetTrainerPEMMA',
                ),
                f"nnUNetv2_train {where} -tr nnUNetTrainerExt, with as many steps as both trainings together",
                "every case has every channel, and nobody needs the old model",
            )
        ]
    return []
