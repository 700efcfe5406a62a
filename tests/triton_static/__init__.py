"""What can be known of Triton kernels on a GPU without one."""
