"""Every op in plain PyTorch: the definition that kernels and tests are held to, and what runs where no kernel is built."""
