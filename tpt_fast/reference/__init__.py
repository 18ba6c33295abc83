"""Every op in plain PyTorch: the definition that tests hold kernels to, and what runs where no kernel is built."""
