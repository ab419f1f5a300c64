"""The core: what waits, what runs, what is loaded. No HTTP, no gRPC, no model code."""
