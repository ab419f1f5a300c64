"""The protocols: wire <-> InferRequest and InferResponse, and nothing else."""
