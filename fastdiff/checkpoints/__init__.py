"""Checkpoints: loading models from untrusted files, saving them, and converting between the layouts of code bases.

```python
from fastdiff import checkpoint  # another name of fastdiff.checkpoints

model = checkpoint.load("folder")
checkpoint.save_folder("copy", model.unet, model.schedule, model.prediction)
```
"""

from fastdiff.checkpoints.conditional import PretrainedText, load_text
from fastdiff.checkpoints.convert import FORMATS, convert
from fastdiff.checkpoints.fitting import load_weights
from fastdiff.checkpoints.folders import read_scheduler
from fastdiff.checkpoints.layouts import LAYOUTS
from fastdiff.checkpoints.loading import Pretrained, builtin_models, load, schedule_of
from fastdiff.checkpoints.originals import PRESETS
from fastdiff.checkpoints.reading import weights_digest
from fastdiff.checkpoints.saving import save_folder, save_pipeline, save_unet

__all__ = [
    "FORMATS",
    "LAYOUTS",
    "PRESETS",
    "Pretrained",
    "PretrainedText",
    "builtin_models",
    "convert",
    "load",
    "load_text",
    "load_weights",
    "read_scheduler",
    "save_folder",
    "save_pipeline",
    "save_unet",
    "schedule_of",
    "weights_digest",
]
