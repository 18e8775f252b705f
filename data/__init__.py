"""Cells: reading h5ad files, the converted corpus, the order of cells, and batches."""
