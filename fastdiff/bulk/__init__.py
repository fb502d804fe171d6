"""Many images of one setting, drawn exactly once into a folder by as many processes and machines as there are.

    from fastdiff import bulk

    bulk.generate("fashion-mnist", 50_000, "runs/fashion", format="webdataset", steps=50)
    bulk.verify("runs/fashion")
    bulk.export("runs/fashion", adm="samples.npz")

An image depends only on the settings and its index, so the work may be cut anywhere and done twice: a shard, the images
of a fixed range of indices, is written where it is complete, and the first file of a shard stays.
"""

from fastdiff.bulk.checking import Verified, verify
from fastdiff.bulk.drawing import Progress, Report, generate
from fastdiff.bulk.exporting import export

__all__ = ["Progress", "Report", "Verified", "export", "generate", "verify"]
