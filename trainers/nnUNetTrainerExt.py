"""nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerExt

With other numbers, each of which takes a class of its own in plain nnU-Net:

    nnUNet_ext_settings="num_epochs=250 initial_lr=0.005 mirroring=false" nnUNetv2_train ... -tr nnUNetTrainerExt

`nnUNetv2_ext settings` lists them: epochs and their length, learning rate, weight decay, batch size, foreground share,
mirroring, seed, few training cases, early stop. A file named `stop` in the fold's folder ends the training cleanly.
"""

from nnunetv2_ext.parts.trainer import MethodTrainer


class nnUNetTrainerExt(MethodTrainer):
    """Plain nnU-Net with the common settings and nothing else; bit for bit nnUNetTrainer where none is set."""
