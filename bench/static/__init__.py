"""What machine code says about speed, without a GPU: instructions of a step, what limits it, and predicted TFLOP/s.

``sass`` reads disassembled kernels and finds their loops, ``model`` has the clocks of an H100 and predicts, ``kernels``
lists what is counted.
"""
