"""Every op in plain PyTorch: the definition that tests hold kernels to, and what runs where no kernel is built; and in
``tpt.py`` the published algorithm, which whole images are held to."""
