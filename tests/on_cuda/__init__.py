"""The ops' own tests on the GPU."""
