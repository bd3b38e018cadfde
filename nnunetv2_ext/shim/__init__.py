"""The folder that nnU-Net searches for our trainers, see ``nnunetv2_ext/_register.py``."""
