"""A method outside the package: what export may take out of its models, what its trainer promises."""

from typing import Any

from nnunetv2_ext.core.outside import ExportEdit, Method, Promise, Trainer


def initial(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint | {"name": checkpoint["name"][0]}


def unsign(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.items() if key != "name"}


def erase(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint | {"network_weights": {}}


METHOD = Method(
    name="signed",
    summary="a method that leaves its name in the weights, and lets one take it out",
    trainers={
        "nnUNetTrainerSigned": Trainer(
            summary="signs its weights",
            promises={"": Promise(cpu=1.5), "num_epochs=7 seed=1": Promise(cpu=2.5, predict=3.0)},
        )
    },
    export_edits={
        "initial": ExportEdit("the first letter of the name", f"{__name__}:initial"),
        "unsign": ExportEdit("without the name", f"{__name__}:unsign", True, True),
        "erase": ExportEdit("without any weight", f"{__name__}:erase", True, notice="Nothing is left."),
    },
)
