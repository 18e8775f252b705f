"""Networks, layers and objectives; they know tensors and plain configs, nothing of runs or files."""
