"""What keeps the kernels from running."""


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


class CompilerTimeout(BuildError):
    """The compiler did not come to an end."""
