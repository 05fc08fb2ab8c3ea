"""Deployment: saved models, StableHLO, ONNX and the command line."""
