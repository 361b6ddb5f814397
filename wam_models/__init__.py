"""A thin model package on top of wam_kernels: the dual-expert world-action model, its training and its rollout."""
