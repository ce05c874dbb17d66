"""A compiled kernel for the CPU, built where it is used; everything also runs without it."""
