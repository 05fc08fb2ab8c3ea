"""What every exporter needs of an int8 model, whatever it writes.

`model.lower` gives the network with its arrays as one value; the other modules answer questions of
it: what a tensor's integers are worth (`scales`), who reads and makes a tensor and which clips are
one (`uses`), a convolution's form (`convolution`), a site's weight with its epilogue folded in
(`weights`), how one is stored that is read in float (`stored`), and where the axes of a value are
(`values`).  None of them knows a file format.
"""
