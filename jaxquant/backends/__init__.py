"""What runs an int8 program: kernels and forms of XLA's operations, and where each of them runs."""
