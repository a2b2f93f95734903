"""C++ for CPUs: compiled for this machine at first use, cached, called through ctypes.

Owns the builder, for the sources of any package, and the copying and hashing of KV pages with a Python twin for
machines without a compiler. Knows addresses and lengths; nothing of grants, links or tensors.
"""

from kvstore.native.build import Sources, build_library, cache_folder, load_library

__all__ = ["Sources", "build_library", "cache_folder", "load_library"]
