"""Trainer classes by file name, installed as ``nnunetv2_ext.trainers``: one file per class, glue only."""
