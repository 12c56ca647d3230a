"""Functions of the user's, compiled into the kernels as passes over a tile of scores."""
