"""Settings of the experiments, one file a network over the common base."""
