"""LiteRT (TensorFlow Lite) files of int8 models, written without TensorFlow."""
