"""Where kernels can go in a model: a file per op finds its sites and puts a kernel there."""
