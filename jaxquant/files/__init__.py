"""Files: strict safetensors, written whole or not at all."""
