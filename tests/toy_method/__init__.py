"""Toy: the smallest method that uses a teacher, unlabelled patches, a head of the training and state per case."""
