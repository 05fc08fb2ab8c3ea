"""Experiments on real networks. They use the public interface of `jaxquant` alone."""
