"""A model's graph as plain data in a file, and the model again from it.

What is stored is the float graph that was traced with sizes that vary: primitives by name, their
parameters, how tensors connect.  It holds no shapes but those of the inputs, the parameters and the
constants: reading it applies every primitive abstractly to what its operands are found to be, as a
trace does, so a file cannot claim a shape that is not so.  It holds no code: a primitive is one of
those that this package names.
"""
