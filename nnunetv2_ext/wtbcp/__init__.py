"""WT-BCP: unlabelled patches, labelled by a moving-average teacher, in five modes (arXiv 2504.14445)."""
