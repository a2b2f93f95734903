"""C++ kernels for CPUs: compiled for this machine at first use, called through ctypes.

Owns the sources (`cpp/`), how they are compiled (`build`), and what calls look like from Python (`library`). The
kernels see pointers and lengths, so compiling needs a C++ compiler and nothing else: no headers of torch or Python, no
build tool, and a few seconds. Where that fails, everything has a torch counterpart.
"""
