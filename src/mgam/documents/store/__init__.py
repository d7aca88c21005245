"""The store of a digest: a folder of safetensors segments and a manifest, written by one, read by many.

A segment is visible only when it is complete; what is complete is never written again. Nothing in a folder is trusted:
names are known beforehand, sizes are compared before memory is taken, links are not followed, and every byte has a
checksum.
"""

from mgam.documents.store.layout import Layout, Shape
from mgam.documents.store.manifest import VERSION, Manifest, Segment, Text
from mgam.documents.store.store import Store
from mgam.documents.store.verify import Fault, verify

__all__ = ["VERSION", "Fault", "Layout", "Manifest", "Segment", "Shape", "Store", "Text", "verify"]
