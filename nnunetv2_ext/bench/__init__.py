"""What a trainer costs: step time, predict time and memory against plain nnUNetTrainer on the same plan and batch."""
