"""The compiled kernels: with what they are built (``toolkit``), how (``plan``), and when (``load``)."""
