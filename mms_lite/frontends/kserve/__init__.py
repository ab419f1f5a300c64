"""The KServe v2 protocol (Open Inference Protocol) and Triton's extensions of it, over REST and gRPC."""
