"""Code for GPUs: OpenCL C and PTX for the device, LLVM IR for the host that launches it."""
